"""What is stored, for how long and by whom, from the shell."""

from __future__ import annotations

import getpass
import time
from typing import Annotated, Any
from urllib.parse import quote

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console

from mlplat.cli.tables import plain_table
from mlplat.errors import InvalidInput, Unavailable
from mlplat.sdk.client import API, Client, client_for, default_url
from mlplat.tally import human_bytes

STORAGE = "/api/v1/storage"
POLL_S = 2.0
storage = typer.Typer(no_args_is_help=True, help="How much is stored, what goes when, and what may not go.")
console = Console(highlight=False, soft_wrap=True)
_Kind = Annotated[str, typer.Argument(help="experiment or run.")]
_Id = Annotated[str, typer.Argument(metavar="ID", help="The experiment's or run's id.")]


@storage.command("usage")
def usage_command(limit: Annotated[int, typer.Option(min=1, help="Rows.")] = 20) -> None:
    """Show storage by experiment, team and registered model, as of the last collection."""
    found = client_for(default_url()).get(f"{STORAGE}/usage")
    if found["measured_at"] is None:
        console.print("not measured yet: mlplat storage collect")
        return
    table = plain_table("experiment", "team", "files", "bytes")
    for row in found["experiments"][:limit]:
        table.add_row(
            row["name"] or row["experiment_id"], row["team"] or "", str(row["files"]), human_bytes(row["bytes"])
        )
    table.add_row("(pipelines and the rest)", "", "", human_bytes(found["other_bytes"]))
    console.print(table)
    for team, size in found["teams"].items():
        console.print(f"team {team}: {human_bytes(size)}", markup=False)
    if found["models"]:
        table = plain_table("model", "versions", "bytes")
        for row in found["models"][:limit]:
            table.add_row(row["name"], str(row["versions"]), human_bytes(row["bytes"]))
        console.print(table)
    console.print(f"stored, shared and compressed: {human_bytes(found['stored_bytes'])} in {found['blobs']} blobs")


@storage.command("collect")
def collect_command(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove checkpoints and logs past their time, and blobs that nothing refers to any more.

    Blobs go in two steps, a grace period apart: what is condemned now goes with a later collection.
    """
    client = client_for(default_url())
    found = client.post(f"{STORAGE}/collections", {"dry_run": dry_run})
    while found["finished_at"] is None:
        time.sleep(POLL_S)
        found = _again(client, found["collection_id"])
    report = found["report"]
    if report is None:
        raise Unavailable("the collection was cut short; run it again")
    table = plain_table("what", "would be removed" if dry_run else "removed", "bytes")
    table.add_row("blobs", str(report["freed"]), human_bytes(report["freed_bytes"]))
    table.add_row("uploads given up", str(report["scratch"]), human_bytes(report["scratch_bytes"]))
    table.add_row("checkpoints of runs", str(report["expired_checkpoints"]), "")
    table.add_row("logs of runs", str(report["expired_logs"]), "")
    console.print(table)
    moved = f"points of {report['archived_runs']} runs"
    console.print(f"{moved} would be archived" if dry_run else f"{moved} ({report['archived_points']}) were archived")
    if report["not_archived"]:
        console.print(f"no more points were archived: {report['not_archived']}", style="red", markup=False)
    console.print(f"{report['condemned']} blobs ({human_bytes(report['condemned_bytes'])}) go after the grace period")
    for name in report["damaged"]:
        console.print(f"{name} is damaged: no blob is removed until it is deleted", style="red", markup=False)


@storage.command("hold")
def hold_command(kind: _Kind, id_: _Id, reason: Annotated[str, typer.Option(help="Why.")]) -> None:
    """Put an experiment or run under a legal hold: it is not purged, and its artifacts stay as they are."""
    body = {"reason": reason, "user": getpass.getuser()}
    client_for(default_url()).put(f"{STORAGE}/holds/{kind}/{quote(id_, safe='')}", body)
    console.print(f"{kind} {id_} is under a legal hold", markup=False)


@storage.command("lift")
def lift_command(kind: _Kind, id_: _Id) -> None:
    """End a legal hold."""
    client_for(default_url()).delete(f"{STORAGE}/holds/{kind}/{quote(id_, safe='')}")
    console.print(f"{kind} {id_} is no longer under a legal hold", markup=False)


@storage.command("holds")
def holds_command() -> None:
    """List legal holds."""
    table = plain_table("what", "id", "reason", "by", "since")
    table.columns[1].no_wrap, table.columns[1].overflow = True, "fold"
    for row in client_for(default_url()).get(f"{STORAGE}/holds"):
        table.add_row(row["kind"], row["id"], row["reason"], row["user"], row["created_at"][:19])
    console.print(table)


@storage.command("quota")
def quota_command(
    experiment: Annotated[str, typer.Argument(help="The experiment's name.")],
    limit: Annotated[str, typer.Argument(help="50GB, 2TiB …, or none.")],
) -> None:
    """Limit the artifacts of an experiment. Uploads that do not fit are refused."""
    client = client_for(default_url())
    found = client.get(f"{API}/experiments/get-by-name", experiment_name=experiment)["experiment"]
    size = None if limit == "none" else parse_size(limit)
    used = client.put(f"{STORAGE}/quotas/{found['experiment_id']}", {"limit_bytes": size})["used_bytes"]
    told = "has no limit" if size is None else f"may have {human_bytes(size)}"
    console.print(f"experiment {experiment} {told}; it has {human_bytes(used)}", markup=False)


def parse_size(text: str) -> int:
    """Bytes in a size such as 500MB, 2.5GiB or 1000.

    Raises:
        InvalidInput: it is none.
    """
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise InvalidInput(f"not a size: {text[:80]!r}. Write 500MB, 2.5GiB or 1000.") from error


def _again(client: Client, collection_id: int) -> dict[str, Any]:
    """The collection as it is now. Any: JSON."""
    found: list[dict[str, Any]] = client.get(f"{STORAGE}/collections", limit=1_000)
    return next(each for each in found if each["collection_id"] == collection_id)
