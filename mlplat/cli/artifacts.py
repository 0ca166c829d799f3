"""Files of runs from the shell."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from mlplat.artifacts.model import proxied_path, safe_path
from mlplat.errors import InvalidInput
from mlplat.sdk.archive_rows import run_files
from mlplat.sdk.client import API, Client, client_for, default_url
from mlplat.sdk.known_files import KnownFiles
from mlplat.sdk.transfer import OnProgress, download, upload
from mlplat.settings import Settings
from mlplat.tally import human_bytes

STORAGE = "/api/v1/storage"
#: Silence of a scrub after which it is given up.
SCRUB_TIMEOUT_S = 600.0
artifacts = typer.Typer(no_args_is_help=True, help="Files of runs: up, down, and checked.")
console = Console(highlight=False, soft_wrap=True)
_Run = Annotated[str, typer.Argument(help="The run's id.")]


@artifacts.command("upload")
def upload_command(
    run: _Run,
    source: Annotated[Path, typer.Argument(exists=True, help="A file or a folder.")],
    to: Annotated[str, typer.Option(help="Folder among the run's artifacts.")] = "",
) -> None:
    """Upload a file or folder to a run. What the platform has already is not sent; run again to go on."""
    client = client_for(default_url())
    root = _root(client, run)
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    base = source if source.is_dir() else source.parent
    known = KnownFiles(Settings().cache_folder)
    with Bar(sum(file.stat().st_size for file in files)) as bar:
        for file in files:
            target = safe_path("/".join(filter(None, (root, to, file.relative_to(base).as_posix()))))
            upload(client, target, file, known, bar.of(file.name))
    console.print(f"{len(files)} files are with run {run}", markup=False)


@artifacts.command("download")
def download_command(
    run: _Run,
    path: Annotated[str, typer.Argument(help="A file or folder among the run's artifacts; by default all.")] = "",
    to: Annotated[Path, typer.Option(help="The folder to write to.")] = Path(),
) -> None:
    """Download artifacts of a run, checked. Run again to go on after a failure."""
    client = client_for(default_url())
    root = _root(client, run)
    wanted = safe_path(path)
    names = [name for name in run_files(client, run) if not wanted or name == wanted or name.startswith(f"{wanted}/")]
    if not names:
        raise InvalidInput(f"run {run} has no artifact {path!r}")
    described = [client.get(f"/api/v1/artifacts/files/{quote(f'{root}/{name}')}") for name in names]
    with Bar(sum(each["size"] for each in described)) as bar:
        for name in names:
            download(client, f"{root}/{name}", to / name, bar.of(name))
    console.print(f"{len(names)} files are in {to}", markup=False)


@artifacts.command("verify")
def verify_command(
    run: Annotated[str | None, typer.Argument(help="Only this run's artifacts; by default all that is stored.")] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove damaged blobs: who stores the same bytes again heals the files.")
    ] = False,
) -> None:
    """Read what is stored and name what is damaged; the exit code is 1 when something is."""
    client = client_for(default_url())
    if run is not None and repair:
        raise InvalidInput("--repair is for the whole store")
    path = None if run is None else _root(client, run)
    problems, last = 0, dict[str, Any]()
    method, route = ("POST", "repair") if repair else ("GET", "verify")
    with client.stream(f"{STORAGE}/{route}", SCRUB_TIMEOUT_S, method=method, path=path) as parts:
        for last in _json_lines(parts):
            for problem in last["problems"]:
                problems += 1
                console.print(f"{problem['name']}: {problem['problem']}", style="red", markup=False)
    if not last.get("done"):
        raise InvalidInput("the platform went away in the middle; run it again")
    console.print(f"{last['checked']} objects, {human_bytes(last['bytes'])} read, {problems} damaged")
    raise typer.Exit(1 if problems else 0)


def _root(client: Client, run_id: str) -> str:
    return proxied_path(client.get(f"{API}/runs/get", run_id=run_id)["run"]["info"]["artifact_uri"])


def _json_lines(parts: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    waiting = b""
    for part in parts:
        *lines, waiting = (waiting + part).split(b"\n")
        yield from (json.loads(line) for line in lines)


class Bar:
    """A bar of bytes over several files."""

    def __init__(self, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._progress.stop()

    def of(self, name: str) -> OnProgress:
        """What moves the bar while this file is transferred."""
        before = self._progress.tasks[0].completed

        def told(done: int, _total: int) -> None:
            self._progress.update(self._task, completed=before + done, description=name)

        return told
