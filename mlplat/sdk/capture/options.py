"""What to record, and the run that it is recorded for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache

from pydantic import ValidationError

from mlplat.errors import InvalidInput
from mlplat.metrics.model import Point
from mlplat.sdk.client import Client
from mlplat.settings import Settings

#: Seconds for which a background upload is tried again. Its sender tries anew later.
BACKGROUND_RETRY_S = 2.0


@dataclass(frozen=True)
class Capture:
    """What a run records by itself. What is None follows the settings ``MLPLAT_CAPTURE_*``, which are on.

    Attributes:
        code: git commit, branch, remote, the diff of what is not committed; the command line.
        environment: ``mlplat/environment.json`` and ``mlplat/requirements.txt``.
        console: what the process prints, live.
        console_fd: also what its children and C code print. This replaces file descriptors 1 and 2 by pipes,
            so programs no longer see a terminal, and a process that is killed may lose its last output.
        system_metrics: CPU, memory, disk, network and GPUs of the node.
        node: this node's name, when several write into one run: ``system/<node>/…``.
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
    """What recording needs of a run. ``started_ms`` is ms since 1970; ``fixed_tags`` are left as they are."""

    run_id: str
    url: str
    artifact_uri: str
    started_ms: int
    add_points: Callable[[list[Point]], None]
    fixed_tags: frozenset[str] = frozenset()


@lru_cache(maxsize=8)
def background_client(url: str) -> Client:
    """A client that gives up soon: whoever uses it tries again later, or goes without."""
    return Client(url, retry_for_s=BACKGROUND_RETRY_S)
