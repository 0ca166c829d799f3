"""The model registry from the shell."""

from __future__ import annotations

import getpass
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console

from mlplat.cli.model_search import search
from mlplat.cli.tables import plain_table
from mlplat.errors import Corrupted, InvalidInput
from mlplat.registry.model import parse_stage
from mlplat.sdk.client import client_for, default_url

models = typer.Typer(no_args_is_help=True, help="Registered models: aliases, stages, and their history.")
console = Console(highlight=False, soft_wrap=True)
models.command("search")(search)
Name = Annotated[str, typer.Argument(help="The registered model.")]
_Alias = Annotated[str, typer.Argument(help="An alias, such as champion.")]
Reason = Annotated[str, typer.Option(help="Stays in the history.")]


@models.command("show")
def show(
    name: Name,
    at: Annotated[
        str | None,
        typer.Option(help="As it was then, such as 2026-01-31T12:00; without a zone in this machine's time."),
    ] = None,
) -> None:
    """Show the aliases and stages of a model, now or at an earlier time."""
    found = client_for(default_url()).get(f"{model_url(name)}/at", time=None if at is None else _moment(at).isoformat())
    table = plain_table("version", "stage", "aliases")
    for version, stage in sorted(found["stages"].items(), key=lambda entry: -int(entry[0])):
        aliases = [alias for alias, pointed in found["aliases"].items() if pointed == int(version)]
        table.add_row(version, stage, ", ".join(aliases))
    console.print(table)


@models.command("versions")
def versions(
    name: Name,
    spec: Annotated[str, typer.Argument(help="A range, such as ^1.2, ~1.2.3 or 1.x.")] = "*",
    limit: Annotated[int, typer.Option(min=1, max=1_000)] = 50,
) -> None:
    """Show versions with their semantic versions, the highest first, and why each has the one it has."""
    table = plain_table("semantic", "version", "stage", "aliases", "created", "because")
    for item in client_for(default_url()).get(f"{model_url(name)}/versions", range=spec, limit=limit):
        because = f"{item['bump']}: {item['bump_reason']}" if item["bump"] else item["bump_reason"]
        table.add_row(
            item["semantic_version"], str(item["version"]), item["stage"], ", ".join(item["aliases"]),
            item["created_at"][:19].replace("T", " "), because,
        )  # fmt: skip
    console.print(table)


@models.command("verify")
def verify(
    name: Name,
    version: Annotated[str, typer.Argument(help="A number, a semantic version, a stage, or @ and an alias.")],
) -> None:
    """Read all files of a version, and compare them with what was registered."""
    found = client_for(default_url()).get(f"{model_url(name)}/versions/{quote(version, safe='')}/verify")
    what = f"{name} version {found['version']}"
    if not found["frozen"]:
        console.print(f"{what}: nothing is known of its files: they are elsewhere, or there were none", markup=False)
        return
    if found["intact"]:
        console.print(f"{what}: its files are what was registered", markup=False)
        return
    for problem in found["problems"]:
        console.print(f"{problem['path']} {problem['problem']}", markup=False)
    raise Corrupted(f"{what} is not what was registered")


@models.command("alias")
def set_alias(
    name: Name,
    alias: _Alias,
    version: Annotated[int | None, typer.Argument(help="The version that it is to point at.", min=1)] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete it.")] = False,
    expect: Annotated[
        int | None, typer.Option(min=0, help="Only if it points at this version now; 0: only if it is not set.")
    ] = None,
    reason: Reason = "",
) -> None:
    """Point an alias at a version, or delete it."""
    if (version is None) != delete:
        raise InvalidInput("give a version, or --delete")
    move = {"alias": alias, "version": version, "expected_version": expect}
    client_for(default_url()).post(f"{model_url(name)}/aliases", {"moves": [move], **origin(reason)})
    console.print(f"{name}: {alias} {'is deleted' if delete else f'→ version {version}'}", markup=False)


@models.command("rollback")
def roll_back(name: Name, alias: _Alias, reason: Reason = "") -> None:
    """Point an alias at what it pointed at before its last change."""
    url = f"{model_url(name)}/aliases/{quote(alias, safe='')}/rollback"
    done = client_for(default_url()).post(url, origin(reason))
    console.print(f"{name}: {alias} → version {done['version']} (was {done['was']})", markup=False)


@models.command("stage")
def set_stage(
    name: Name,
    version: Annotated[int, typer.Argument(min=1)],
    stage: Annotated[str, typer.Argument(help="None, Staging, Production or Archived.")],
    archive_others: Annotated[bool, typer.Option("--archive-others", help="Archive versions that are there.")] = False,
    reason: Reason = "",
) -> None:
    """Move a version to a stage."""
    body = {"stage": parse_stage(stage).value, "archive_others": archive_others, **origin(reason)}
    done = client_for(default_url()).post(f"{model_url(name)}/versions/{version}/stage", body)
    console.print(f"{name}: version {version} → {done['stage']}", markup=False)


@models.command("history")
def history(
    name: Name,
    alias: Annotated[str | None, typer.Option(help="Only of this alias.")] = None,
    version: Annotated[int | None, typer.Option(help="Only the stages of this version.", min=1)] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000)] = 50,
) -> None:
    """Show who changed what, when and why, newest first; of a deleted model, too."""
    if alias is not None and version is not None:
        raise InvalidInput("give --alias or --version, not both")
    query: dict[str, Any] = {"limit": limit}
    if alias is not None:
        query |= {"subject": "alias", "key": alias}
    if version is not None:
        query |= {"subject": "stage", "key": version}
    table = plain_table("when", "what", "before", "after", "by", "reason")
    for item in client_for(default_url()).get(f"{model_url(name)}/history", **query):
        what = {"alias": f"alias {item['key']}", "stage": f"version {item['key']}"}.get(item["subject"], item["key"])
        before, after = (item[side] or "-" for side in ("before", "after"))
        table.add_row(item["at"][:19].replace("T", " "), what, before, after, item["by"], item["reason"])
    console.print(table)


def _moment(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except ValueError as error:
        raise InvalidInput(f"--at {text}: expected a time such as 2026-01-31T12:00") from error


def model_url(name: str) -> str:
    """Where the API has a model."""
    return f"/api/v1/models/{quote(name, safe='')}"


def origin(reason: str) -> dict[str, str]:
    """Who asks for a change, and why, as the API takes it."""
    return {"by": getpass.getuser(), "reason": reason}
