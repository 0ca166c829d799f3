"""Policies of registered models, and moves that need approvals, from the shell."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from mlplat.cli.models import Name, Reason, model_url, origin
from mlplat.cli.tables import plain_table
from mlplat.errors import InvalidInput
from mlplat.registry.model import parse_stage
from mlplat.registry.policy import policy_from_json, policy_to_json
from mlplat.sdk.client import client_for, default_url

commands = typer.Typer()
console = Console(highlight=False, soft_wrap=True)
MAX_POLICY_BYTES = 1024 * 1024
_Number = Annotated[int, typer.Argument(min=1, help="The request's number.")]
_Limit = Annotated[int, typer.Option(min=1, max=1_000)]


@commands.command("policy")
def policy(
    name: Name,
    file: Annotated[
        Path | None, typer.Option("--set", help="A YAML or JSON file with the new policy.", exists=True, dir_okay=False)
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Leave everything free.")] = False,
    reason: Reason = "",
) -> None:
    """Show or replace the policy of a model: who may move its versions where."""
    if file is not None and clear:
        raise InvalidInput("give --set or --clear, not both")
    client, url = client_for(default_url()), f"{model_url(name)}/policy"
    if file is not None or clear:
        document = _read(file) if file is not None else {}
        found = client.put(url, {"policy": document, **origin(reason)})
    else:
        found = client.get(url)
    text = yaml.safe_dump(found, sort_keys=False, allow_unicode=True) if found else "# everything is free\n"
    console.print(text, markup=False, end="")


@commands.command("request")
def request(
    name: Name,
    version: Annotated[int, typer.Argument(min=1)],
    stage: Annotated[str | None, typer.Option(help="The stage that it should go to.")] = None,
    alias: Annotated[str | None, typer.Option(help="The alias that should point at it.")] = None,
    archive_others: Annotated[bool, typer.Option("--archive-others", help="Archive versions that are there.")] = False,
    reason: Reason = "",
) -> None:
    """Ask for the approvals that a move needs; the last one makes the move."""
    target = {"alias": alias} if stage is None else {"stage": parse_stage(stage).value, "alias": alias}
    body = {"version": version, **target, "archive_others": archive_others, **origin(reason)}
    made = client_for(default_url()).post_once(f"{model_url(name)}/requests", body)
    console.print(f"request {made['id']}: {_what(made)}, needs {made['needed']} of {made['role']}", markup=False)


@commands.command("requests")
def requests(
    name: Annotated[str | None, typer.Argument(help="Only those of this model.")] = None,
    state: Annotated[
        str, typer.Option(help="open, approved, rejected, withdrawn, expired, cancelled or all.")
    ] = "open",
    mine: Annotated[bool, typer.Option("--mine", help="Only those that wait for my word, of all models.")] = False,
    limit: _Limit = 50,
) -> None:
    """Show requests, newest first, and what was decided."""
    if name is not None and mine:
        raise InvalidInput("give a model or --mine, not both")
    query = {"limit": limit, "state": None if state == "all" else state.upper()}
    if name is not None:
        found = client_for(default_url()).get(f"{model_url(name)}/requests", **query)
    else:
        decider = getpass.getuser() if mine else None
        found = client_for(default_url()).get("/api/v1/approvals", **query, decider=decider)
    table = plain_table("request", "model", "move", "by", "reason", "state", "approvals", "expires")
    for item in found:
        given = ", ".join(f"{word['by']}{'' if word['approve'] else ' (no)'}" for word in item["decisions"])
        needed = f"{len(item['decisions'])} of {item['needed']} {item['role']}" if item["needed"] else ""
        table.add_row(
            str(item["id"]), item["model"], _what(item), item["by"], item["reason"], item["state"].lower(),
            f"{needed} {given}".strip(), item["expires_at"][:16].replace("T", " "),
        )  # fmt: skip
    console.print(table)


@commands.command("approve")
def approve(name: Name, number: _Number, reason: Reason = "") -> None:
    """Approve somebody else's request."""
    _decide(name, number, "approve", reason)


@commands.command("reject")
def reject(name: Name, number: _Number, reason: Annotated[str, typer.Option(help="Why; it stays.")]) -> None:
    """Reject somebody else's request."""
    _decide(name, number, "reject", reason)


@commands.command("withdraw")
def withdraw(name: Name, number: _Number, reason: Reason = "") -> None:
    """Take your own request back."""
    _decide(name, number, "withdraw", reason)


@commands.command("refusals")
def refusals(name: Name, limit: _Limit = 50) -> None:
    """Show changes that were asked for and refused, newest first."""
    table = plain_table("when", "what", "by", "why")
    for item in client_for(default_url()).get(f"{model_url(name)}/refusals", limit=limit):
        what = ", ".join(_command(command) for command in item["commands"])
        table.add_row(item["at"][:19].replace("T", " "), what, item["by"], item["message"])
    console.print(table)


def _decide(name: str, number: int, word: str, reason: str) -> None:
    done = client_for(default_url()).post_once(f"{model_url(name)}/requests/{number}/{word}", origin(reason))
    missing = f", {done['needed'] - len(done['decisions'])} more to come" if done["needed"] else ""
    console.print(f"request {number}: {_what(done)} is {done['state'].lower()}{missing}", markup=False)


def _what(move: dict[str, Any]) -> str:
    subject = f"version {move['version']}" if move["subject"] == "stage" else f"@{move['target']}"
    before, after = (move["before"] or "-", move["target"] if move["subject"] == "stage" else move["version"])
    return f"{subject}: {before} → {after}"


def _command(command: dict[str, Any]) -> str:
    shown = [f"{key}={value}" for key, value in command.items() if key not in {"kind", "name"} and value is not None]
    return " ".join([command["kind"], *shown])[:100]


def _read(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_POLICY_BYTES:
        raise InvalidInput(f"{file}: is larger than {MAX_POLICY_BYTES} bytes")
    try:
        document = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{file}: {error}") from error
    if not isinstance(document, dict):
        raise InvalidInput(f"{file}: expected a policy, with stages, aliases, roles and managed_by")
    try:
        return policy_to_json(policy_from_json(document))
    except InvalidInput as error:
        raise InvalidInput(f"{file}: {error.message}") from error
