"""The one object through which a run records by itself: ``start``, ``finish``.

Nothing here holds a run up or fails it: starting takes the caller a few milliseconds, the rest goes on in
threads, and what does not work is logged at debug level. What is recorded goes the way of all that is logged, so
it waits on disk while the platform is away.
"""

from __future__ import annotations

import atexit
import json
import logging
import multiprocessing
import socket
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.util import Finalize
from pathlib import Path

from mlplat.sdk.capture.console import RunConsole
from mlplat.sdk.capture.entry import entry_point
from mlplat.sdk.capture.environment import environment, installed_packages, requirements_file
from mlplat.sdk.capture.git import read_git
from mlplat.sdk.capture.node import claim_node, host_name
from mlplat.sdk.capture.options import Capture, RunLink
from mlplat.sdk.capture.system import Recipient, sampler
from mlplat.sdk.context import current_step
from mlplat.sdk.files import RunFiles

CODE_DIFF = "mlplat/code.diff"
ENVIRONMENT = "mlplat/environment.json"
REQUIREMENTS = "mlplat/requirements.txt"
#: Seconds that ``finish`` waits at most for what is still under way.
FINISH_S = 10.0
Action = Callable[[], object]
_log = logging.getLogger(__name__)


class Recorder:
    """Records one run, as far as this process is concerned.

    The ``owner`` of the run records its code and environment; every process what it prints; and one process of each
    node the node's metrics.
    """

    def __init__(self, capture: Capture | None = None, *, owner: bool = True) -> None:
        self._settings = (capture or Capture()).settings()
        self._owner = owner
        # The attempt's log has all that the process prints, and the platform shows it as the run's console.
        step = current_step()
        in_own_step = owner and step is not None and not step.is_local
        asked = capture is not None and capture.console is not None
        self._with_console = self._settings.capture_console and (asked or not in_own_step)
        self._entry = entry_point()
        self._folder = Path.cwd()
        self._facts: threading.Thread | None = None
        self._console: RunConsole | None = None
        self._recipient: Recipient | None = None
        self._node: socket.socket | None = None
        self._finished = False

    def first_tags(self) -> dict[str, str]:
        """The tags that are known before the run exists."""
        return self._entry.tags() if self._settings.capture_code and self._owner else {}

    def start(self, link: RunLink) -> None:
        """Starts recording the run."""
        atexit.register(self.finish)
        if multiprocessing.parent_process() is not None:  # such a process ends without atexit
            Finalize(None, self.finish, exitpriority=20)
        if self._with_console:
            _attempt("console", lambda: self._start_console(link.files))
        actions = self._actions(link)
        if actions:
            self._facts = threading.Thread(target=_record, args=(actions,), name="mlplat-facts", daemon=True)
            self._facts.start()

    def failed(self, error: BaseException) -> None:
        """Adds the error that ends the run to the console: Python prints it later, or never."""
        if self._console is not None and not self._finished:
            self._console.add("".join(traceback.format_exception(error)))

    def finish(self) -> None:
        """Ends the recording. Waits ``FINISH_S`` at most for what is under way; again does nothing."""
        if self._finished:
            return
        self._finished = True
        atexit.unregister(self.finish)
        deadline = time.monotonic() + FINISH_S
        if self._facts is not None:
            self._facts.join(FINISH_S)
        if self._recipient is not None:
            sampler().close(self._recipient)
        if self._node is not None:
            self._node.close()
        if self._console is not None:
            console = self._console
            _attempt("console", lambda: console.close(max(0.0, deadline - time.monotonic())))

    def _start_console(self, files: RunFiles) -> None:
        console = RunConsole(files, descriptors=self._settings.capture_console_fd)
        console.start()
        self._console = console

    def _start_metrics(self, link: RunLink) -> None:
        self._node = claim_node(link.run_id)
        if self._node is None and not self._owner:
            return
        node = self._settings.capture_node or (None if self._owner else host_name())
        recipient = Recipient(f"system/{node}/" if node else "system/", link.started_ms(), link.add_points)
        self._recipient = recipient
        if not self._finished:
            sampler().open(recipient, self._settings.capture_system_interval_s)

    def _actions(self, link: RunLink) -> list[tuple[str, Action]]:
        actions: list[tuple[str, Action]] = []
        if self._settings.capture_system_metrics:
            actions.append(("system metrics", lambda: self._start_metrics(link)))
        if self._settings.capture_code and self._owner:
            actions.append(("code", lambda: self._record_code(link)))
        if self._settings.capture_environment and self._owner:
            actions.append(("environment", lambda: self._record_environment(link.files)))
        return actions

    def _record_code(self, link: RunLink) -> None:
        state = read_git(self._entry.folder)
        if state is None:
            return
        link.set_tags({key: value for key, value in state.tags().items() if key not in link.fixed_tags})
        if state.dirty:
            link.files.put(CODE_DIFF, state.diff_file())

    def _record_environment(self, files: RunFiles) -> None:
        packages = installed_packages()
        facts = environment(self._entry, self._folder, packages, self._settings.container_image)
        files.put(ENVIRONMENT, json.dumps(facts, indent=2, ensure_ascii=False).encode())
        files.put(REQUIREMENTS, requirements_file(packages).encode())


def _record(actions: list[tuple[str, Action]]) -> None:
    for what, action in actions:
        _attempt(what, action)


def _attempt(what: str, action: Action) -> None:
    """Recording is a help, not a duty: what goes wrong stays in here."""
    try:
        action()
    except Exception:
        _log.debug("%s not recorded", what, exc_info=True)


class _OwnThreads(logging.Filter):
    """Leaves out httpx's line per request when the request is one of the threads' here, every two seconds."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.threadName or "").startswith("mlplat-")


logging.getLogger("httpx").addFilter(_OwnThreads())
