"""Outgoing webhooks from the shell."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
from rich.console import Console

from mlplat.cli.tables import plain_table
from mlplat.errors import InvalidInput
from mlplat.sdk.client import client_for, default_url
from mlplat.webhooks.model import DeliveryState, Status, new_secret

WEBHOOKS = "/api/v1/webhooks"
webhooks = typer.Typer(no_args_is_help=True, help="Where events of the registry are sent to.")
console = Console(highlight=False, soft_wrap=True)
_Webhook = Annotated[str, typer.Argument(help="Its name or id.")]
_Event = Annotated[list[str] | None, typer.Option("--event", "-e", help="alias_set, stage_set …; may be repeated.")]
_SecretFile = Annotated[Path | None, typer.Option(help="The file with the key of the signatures.")]


@webhooks.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Its name.")],
    url: Annotated[str, typer.Argument(help="Where to send events.")],
    event: _Event = None,
    model: Annotated[str, typer.Option(help="A name or pattern.")] = "*",
    description: Annotated[str, typer.Option()] = "",
    secret_file: _SecretFile = None,
) -> None:
    """Send events from now on; without --event all of them. Without --secret-file a secret is made up."""
    secret = new_secret() if secret_file is None else _read_secret(secret_file)
    body = {"name": name, "url": url, "secret": secret, "events": event or [], "model": model,
            "description": description}  # fmt: skip
    made = client_for(default_url()).post(WEBHOOKS, body)
    console.print(f"webhook {name}: {_what(made)} → {made['url']}", markup=False)
    if secret_file is None:
        console.print(f"secret (not shown again): {secret}", markup=False)


@webhooks.command("list")
def list_webhooks(limit: Annotated[int, typer.Option(min=1, max=1_000)] = 100) -> None:
    """List webhooks."""
    table = plain_table("webhook", "status", "events", "url")
    for row in client_for(default_url()).get(WEBHOOKS, limit=limit):
        table.add_row(row["name"], row["status"], _escaped(_what(row)), _escaped(row["url"]))
    console.print(table)


@webhooks.command("show")
def show(webhook: _Webhook) -> None:
    """Show all about a webhook but its secret."""
    found = client_for(default_url()).get(_url(webhook))
    for name, value in found.items():
        text = ", ".join(value) or "all" if isinstance(value, list) else value
        if text:
            console.print(f"{name}: {text}", markup=False)


@webhooks.command("update")
def update(
    webhook: _Webhook,
    name: Annotated[str | None, typer.Option(help="A new name.")] = None,
    url: Annotated[str | None, typer.Option(help="Where to send events, also those that wait.")] = None,
    event: _Event = None,
    all_events: Annotated[bool, typer.Option("--all-events", help="All kinds of events.")] = False,
    model: Annotated[str | None, typer.Option(help="A name or pattern.")] = None,
    description: Annotated[str | None, typer.Option()] = None,
    enable: Annotated[
        bool | None, typer.Option("--enable/--disable", help="Go on with what happens from now on, or pause.")
    ] = None,
    secret_file: _SecretFile = None,
    rotate_secret: Annotated[bool, typer.Option("--new-secret", help="Make up a new secret.")] = False,
) -> None:
    """Change a webhook; what is not given stays."""
    if (event and all_events) or (secret_file is not None and rotate_secret):
        raise InvalidInput("give --event or --all-events, and --secret-file or --new-secret, not both")
    body: dict[str, Any] = {"name": name, "url": url, "model": model, "description": description}
    if event or all_events:
        body["events"] = event or []
    if enable is not None:
        body["status"] = Status.ACTIVE if enable else Status.DISABLED
    if secret_file is not None or rotate_secret:
        body["secret"] = new_secret() if secret_file is None else _read_secret(secret_file)
    given = {key: value for key, value in body.items() if value is not None}
    if not given:
        raise InvalidInput("nothing to change; see mlplat webhooks update --help")
    made = client_for(default_url()).patch(_url(webhook), given)
    console.print(f"webhook {made['name']}: {made['status']}, {_what(made)} → {made['url']}", markup=False)
    if rotate_secret:
        console.print(f"secret (not shown again): {body['secret']}", markup=False)


@webhooks.command("delete")
def delete(webhook: _Webhook) -> None:
    """Delete a webhook with its deliveries."""
    client_for(default_url()).delete(_url(webhook))
    console.print(f"webhook {webhook} is deleted", markup=False)


@webhooks.command("test")
def test(webhook: _Webhook) -> None:
    """Send a signed event of the kind "test" now; the exit code says whether it was taken."""
    said = client_for(default_url()).post(f"{_url(webhook)}/test", {})
    console.print(f"webhook {webhook}: {said['error'] or 'answered ' + str(said['status'])}", markup=False)
    raise typer.Exit(0 if said["success"] else 1)


@webhooks.command("deliveries")
def deliveries(
    webhook: _Webhook,
    state: Annotated[DeliveryState | None, typer.Option(help="Only those.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000)] = 20,
) -> None:
    """List what became of its events, newest first."""
    query = {"limit": limit, "state": None if state is None else state.value}
    table = plain_table("delivery", "event", "model", "state", "attempts", "next attempt", "")
    for row in client_for(default_url()).get(f"{_url(webhook)}/deliveries", **query):
        following = (row["next_attempt_at"] or "")[:19].replace("T", " ")
        table.add_row(
            row["delivery_id"], row["kind"], _escaped(row["model"]), row["state"], str(row["attempts"]), following,
            _escaped(row["last_error"]),
        )  # fmt: skip
    console.print(table)


@webhooks.command("redeliver")
def redeliver(
    webhook: _Webhook,
    delivery: Annotated[str | None, typer.Argument(help="The id of a delivery.")] = None,
    dead: Annotated[bool, typer.Option("--dead", help="All that were given up, up to 1,000, oldest first.")] = False,
) -> None:
    """Send an event again, under the same delivery id."""
    if (delivery is None) != dead:
        raise InvalidInput("give the id of a delivery, or --dead")
    client, ids = client_for(default_url()), [delivery or ""]
    if dead:
        found = client.get(f"{_url(webhook)}/deliveries", state=DeliveryState.DEAD.value, limit=1_000)
        ids = [row["delivery_id"] for row in reversed(found)]
    for one in ids:
        client.post(f"{_url(webhook)}/deliveries/{quote(one, safe='')}/redeliver", {})
    console.print(f"webhook {webhook}: {len(ids)} to be delivered again", markup=False)


def _url(webhook: str) -> str:
    return f"{WEBHOOKS}/{quote(webhook, safe='')}"


def _what(row: dict[str, Any]) -> str:
    models = "" if row["model"] == "*" else f" of {row['model']}"
    return (", ".join(row["events"]) or "all events") + models


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


def _read_secret(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{file}: cannot be read: {error}") from error
