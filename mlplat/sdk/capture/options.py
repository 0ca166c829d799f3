"""What to record, and the run that it is recorded for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from pydantic import ValidationError

from mlplat.errors import InvalidInput
from mlplat.metrics.model import Point
from mlplat.sdk.files import RunFiles
from mlplat.settings import Settings


@dataclass(frozen=True)
class Capture:
    """What a run records by itself. What is None follows the settings ``MLPLAT_CAPTURE_*``, which are on.

    Attributes:
        code: git commit, branch, remote, the diff of what is not committed; the command line.
        environment: ``mlplat/environment.json`` and ``mlplat/requirements.txt``.
        console: what the process prints, live. Inside of a step that has started the run it is off unless it is asked
            for here: the attempt's log has the same, and is shown as the run's console.
        console_fd: also what its children and C code print. This replaces file descriptors 1 and 2 by pipes,
            so programs no longer see a terminal, and a process that is killed may lose its last output.
        system_metrics: CPU, memory, disk, network and GPUs of the node.
        node: this node's name in system metrics, ``system/<node>/…``. By default the node of the run's owner goes
            without, and others by their host's name.
    """

    code: bool | None = None
    environment: bool | None = None
    console: bool | None = None
    console_fd: bool | None = None
    system_metrics: bool | None = None
    node: str | None = None

    @classmethod
    def nothing(cls) -> Capture:
        """Records nothing."""
        return cls(code=False, environment=False, console=False, console_fd=False, system_metrics=False)

    def settings(self) -> Settings:
        """The settings with what was chosen here in place of theirs.

        Raises:
            InvalidInput: a value that is not allowed.
        """
        chosen = {f"capture_{name}": value for name, value in asdict(self).items() if value is not None}
        try:
            settings = Settings(**chosen)
            return settings if settings.capture else Settings(**(_NOTHING | chosen))
        except ValidationError as error:
            first = error.errors()[0]
            raise InvalidInput(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


_NOTHING = {f"capture_{part}": False for part in ("code", "environment", "console", "console_fd", "system_metrics")}


@dataclass(frozen=True)
class RunLink:
    """What recording needs of a run. ``started_ms`` gives ms since 1970 and may ask the platform; ``fixed_tags`` are
    left as they are."""

    run_id: str
    files: RunFiles
    started_ms: Callable[[], int]
    add_points: Callable[[list[Point]], None]
    set_tags: Callable[[Mapping[str, str]], None]
    fixed_tags: frozenset[str] = frozenset()
