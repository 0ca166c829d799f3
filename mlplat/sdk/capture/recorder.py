"""The one object through which a run records by itself: ``start``, ``finish``.

Nothing here holds a run up or fails it: starting takes the caller a few milliseconds, the rest goes on in
threads, and what does not work is logged at debug level.
"""

from __future__ import annotations

import atexit
import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from mlplat.errors import Unavailable
from mlplat.sdk.capture.console import RunConsole
from mlplat.sdk.capture.entry import entry_point
from mlplat.sdk.capture.environment import environment, installed_packages, requirements_file
from mlplat.sdk.capture.git import GitState, read_git
from mlplat.sdk.capture.options import Capture, RunLink, background_client
from mlplat.sdk.capture.system import Recipient, sampler
from mlplat.sdk.files import RunFiles

CODE_DIFF = "mlplat/code.diff"
ENVIRONMENT = "mlplat/environment.json"
REQUIREMENTS = "mlplat/requirements.txt"
#: Seconds that ``finish`` waits at most for what is still under way.
FINISH_S = 10.0
#: Seconds between two tries while the platform is away.
TRY_AGAIN_S = 5.0
Action = Callable[[], object]
_log = logging.getLogger(__name__)


class Recorder:
    """Records one run."""

    def __init__(self, capture: Capture | None = None) -> None:
        self._settings = (capture or Capture()).settings()
        self._entry = entry_point()
        self._folder = Path.cwd()
        self._facts: threading.Thread | None = None
        self._console: RunConsole | None = None
        self._recipient: Recipient | None = None
        self._stopping = threading.Event()
        self._finished = False

    def first_tags(self) -> dict[str, str]:
        """The tags that are known before the run exists."""
        return self._entry.tags() if self._settings.capture_code else {}

    def start(self, link: RunLink) -> None:
        """Starts recording the run."""
        files = RunFiles(lambda: background_client(link.url), link.artifact_uri)
        atexit.register(self.finish)
        if self._settings.capture_console:
            _attempt("console", lambda: self._start_console(files))
        if self._settings.capture_system_metrics:
            _attempt("system metrics", lambda: self._start_metrics(link))
        actions = self._actions(link, files)
        if actions:
            self._facts = threading.Thread(target=self._record, args=(actions,), name="mlplat-facts", daemon=True)
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
        self._stopping.set()
        atexit.unregister(self.finish)
        deadline = time.monotonic() + FINISH_S
        if self._recipient is not None:
            sampler().close(self._recipient)
        if self._facts is not None:
            self._facts.join(FINISH_S)
        if self._console is not None:
            console = self._console
            _attempt("console", lambda: console.close(max(0.0, deadline - time.monotonic())))

    def _start_console(self, files: RunFiles) -> None:
        console = RunConsole(files, descriptors=self._settings.capture_console_fd)
        console.start()
        self._console = console

    def _start_metrics(self, link: RunLink) -> None:
        node = self._settings.capture_node
        recipient = Recipient(f"system/{node}/" if node else "system/", link.started_ms, link.add_points)
        sampler().open(recipient, self._settings.capture_system_interval_s)
        self._recipient = recipient

    def _actions(self, link: RunLink, files: RunFiles) -> list[tuple[str, Action]]:
        actions: list[tuple[str, Action]] = []
        if self._settings.capture_code:
            state = cache(lambda: read_git(self._entry.folder))  # once, however often it is sent
            actions.append(("code", lambda: _record_code(state(), link, files)))
        if self._settings.capture_environment:
            actions.append(("environment", lambda: self._record_environment(files)))
        return actions

    def _record(self, actions: list[tuple[str, Action]]) -> None:
        for what, action in actions:
            while not _attempt(what, action):
                if self._stopping.wait(TRY_AGAIN_S):
                    return

    def _record_environment(self, files: RunFiles) -> None:
        packages = installed_packages()
        facts = environment(self._entry, self._folder, packages, self._settings.container_image)
        files.put(ENVIRONMENT, json.dumps(facts, indent=2, ensure_ascii=False).encode())
        files.put(REQUIREMENTS, requirements_file(packages).encode())


def _record_code(state: GitState | None, link: RunLink, files: RunFiles) -> None:
    if state is None:
        return
    _set_tags(link, state.tags())
    if state.dirty:
        files.put(CODE_DIFF, state.diff_file())


def _set_tags(link: RunLink, tags: Mapping[str, str]) -> None:
    body = [{"key": key, "value": value} for key, value in tags.items() if key not in link.fixed_tags]
    if body:
        background_client(link.url).post("/api/2.0/mlflow/runs/log-batch", {"run_id": link.run_id, "tags": body})


def _attempt(what: str, action: Action) -> bool:
    """False when the platform was away. Recording is a help, not a duty: whatever else goes wrong stays in here."""
    try:
        action()
    except Unavailable as error:
        _log.debug("%s waits: %s", what, error)
        return False
    except Exception:
        _log.debug("%s not recorded", what, exc_info=True)
    return True


class _OwnThreads(logging.Filter):
    """Leaves out httpx's line per request when the request is one of the threads' here, every two seconds."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.threadName or "").startswith("mlplat-")


logging.getLogger("httpx").addFilter(_OwnThreads())
