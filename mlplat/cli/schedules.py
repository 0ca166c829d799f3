"""Schedules and triggers from the shell."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from mlplat.cli.tables import plain_table
from mlplat.errors import InvalidInput, NotFound
from mlplat.pipelines.automation.schedules import CatchUp
from mlplat.pipelines.automation.webhooks import Auth
from mlplat.pipelines.expressions import find_expressions
from mlplat.pipelines.spec import PipelineSpec
from mlplat.run_view import STYLES
from mlplat.sdk.automation import SCHEDULES, TRIGGERS, fire_trigger, schedule, trigger
from mlplat.sdk.client import client_for, default_url
from mlplat.sdk.pipeline_runs import load_pipeline

schedules = typer.Typer(no_args_is_help=True, help="Pipelines that run by the clock.")
triggers = typer.Typer(no_args_is_help=True, help="Pipelines that run when something happens.")
console = Console(highlight=False, soft_wrap=True)
_TYPES: Mapping[str, type] = {"int": int, "float": float, "bool": bool, "str": str}
_Name = Annotated[str, typer.Argument(help="Its name.")]
_File = Annotated[Path, typer.Argument(help="A YAML definition, or a Python file with one @pipeline.")]
_Params = Annotated[
    list[str] | None,
    typer.Option("-p", "--param", help="key=value, maybe with ${{ trigger.… }} in the value; may be repeated."),
]
_Paused = Annotated[
    bool | None, typer.Option("--paused/--not-paused", help="By default as it is, and a new one is not.")
]
_Limit = Annotated[int, typer.Option(min=1, max=1_000)]


@schedules.command("list")
def list_schedules(limit: _Limit = 100) -> None:
    """List schedules."""
    table = plain_table("schedule", "pipeline", "cron", "time zone", "next", "last run")
    for row in client_for(default_url()).get(SCHEDULES, limit=limit):
        following = "paused" if row["paused"] else _short(row["next_at"]) or "over"
        table.add_row(row["name"], row["pipeline"], row["cron"], row["time_zone"], following, row["last_run_id"] or "")
    console.print(table)


@schedules.command("set")
def set_schedule(
    name: _Name,
    file: _File,
    cron: Annotated[str, typer.Option(help="minute hour day-of-month month day-of-week, or @daily and the like.")],
    time_zone: Annotated[str, typer.Option("--time-zone", "--tz", help="Such as Europe/Berlin.")] = "UTC",
    param: _Params = None,
    catch_up: Annotated[CatchUp, typer.Option(help="What becomes of missed fire times.")] = CatchUp.LATEST,
    catch_up_limit: Annotated[int, typer.Option(help="Runs that are caught up on at once.")] = 100,
    grace: Annotated[float, typer.Option(help="Seconds after which a fire time counts as missed.")] = 60.0,
    start: Annotated[datetime | None, typer.Option(help="No fire time before this, in this machine's time.")] = None,
    end: Annotated[datetime | None, typer.Option(help="No fire time after this, in this machine's time.")] = None,
    paused: _Paused = None,
) -> None:
    """Create a schedule, or replace it."""
    spec = load_pipeline(file, client_for(default_url()))
    made = schedule(
        name, spec, cron, time_zone=time_zone, params=template_params(spec, param or []), catch_up=catch_up.value,
        catch_up_limit=catch_up_limit, misfire_grace_s=grace, starts_at=start, ends_at=end, paused=paused,
    )  # fmt: skip
    following = "it is paused" if made["paused"] else f"next at {_short(made['next_at'])} UTC"
    console.print(f"schedule {name}: {made['pipeline']}, {following}", markup=False)


@schedules.command("pause")
def pause_schedule(name: _Name) -> None:
    """Let nothing fire from now on."""
    _post(f"{SCHEDULES}/{name}/pause", f"schedule {name} is paused")


@schedules.command("resume")
def resume_schedule(name: _Name) -> None:
    """Go on from now; what it did not do meanwhile is not caught up on."""
    made = client_for(default_url()).post(f"{SCHEDULES}/{name}/resume", {})
    console.print(f"schedule {name}: next at {_short(made['next_at'])} UTC", markup=False)


@schedules.command("delete")
def delete_schedule(name: _Name) -> None:
    """Delete a schedule; its runs stay."""
    client_for(default_url()).delete(f"{SCHEDULES}/{name}")
    console.print(f"schedule {name} is deleted", markup=False)


@schedules.command("next")
def next_times(name: _Name, count: Annotated[int, typer.Option("-n", min=1, max=1_000)] = 5) -> None:
    """Print the next fire times, in the schedule's time zone."""
    for moment in client_for(default_url()).get(f"{SCHEDULES}/{name}/next", count=count)["times"]:
        console.print(moment, markup=False)


@schedules.command("runs")
def schedule_runs(name: _Name, limit: _Limit = 20) -> None:
    """List what became of its fire times, newest first."""
    _print_firings(f"{SCHEDULES}/{name}/runs", limit)


@triggers.command("list")
def list_triggers(limit: _Limit = 100) -> None:
    """List triggers."""
    table = plain_table("trigger", "on", "pipeline", "last event", "last run")
    for row in client_for(default_url()).get(TRIGGERS, limit=limit):
        on = {key: value for key, value in row["on"].items() if key != "kind"}
        what = f"{row['on']['kind']} {' '.join(f'{key}={_plain(value)}' for key, value in on.items())}"
        last = "paused" if row["paused"] else _short(row["last_at"])
        table.add_row(row["name"], what, row["pipeline"], last, row["last_run_id"] or "")
    console.print(table)


@triggers.command("set")
def set_trigger(
    name: _Name,
    file: _File,
    registry: Annotated[
        list[str] | None, typer.Option(help="Event: version_created, alias_set …; may be repeated.")
    ] = None,
    model: Annotated[str, typer.Option(help="With --registry: a name or pattern.")] = "*",
    alias: Annotated[str, typer.Option(help="With --registry: a name or pattern.")] = "*",
    pipeline: Annotated[list[str] | None, typer.Option(help="End of runs of this one; may be repeated.")] = None,
    state: Annotated[list[str] | None, typer.Option(help="With --pipeline: SUCCEEDED, unless given.")] = None,
    webhook: Annotated[Auth | None, typer.Option(help="What requests prove themselves with.")] = None,
    secret_file: Annotated[Path | None, typer.Option(help="With --webhook; by default one is made up.")] = None,
    when: Annotated[str | None, typer.Option(help="A condition: ${{ trigger.event.… }}")] = None,
    param: _Params = None,
    max_per_hour: Annotated[int, typer.Option(help="Further events of an hour are skipped.")] = 1_000,
    paused: _Paused = None,
) -> None:
    """Create a trigger, or replace it: on --registry, --pipeline or --webhook."""
    if sum(bool(given) for given in (registry, pipeline, webhook)) != 1:
        raise InvalidInput("say one of --registry EVENT, --pipeline NAME and --webhook bearer (or signature)")
    secret = None
    if registry:
        on: dict[str, Any] = {"kind": "registry", "events": registry, "model": model, "alias": alias}
    elif pipeline:
        on = {"kind": "pipeline", "pipelines": pipeline, "states": state or ["SUCCEEDED"]}
    else:
        secret = None if secret_file is None else _read_secret(secret_file)
        if secret is None and not _has_secret(name, webhook):
            secret = secrets.token_urlsafe(32)
        on = {"kind": "webhook", "auth": webhook, "secret": secret}
    spec = load_pipeline(file, client_for(default_url()))
    made = trigger(
        name, spec, on | {"when": when}, params=template_params(spec, param or []), max_per_hour=max_per_hour,
        paused=paused,
    )  # fmt: skip
    console.print(f"trigger {name}: {made['pipeline']} on {made['on']['kind']}", markup=False)
    if webhook:
        console.print(f"POST {default_url()}{TRIGGERS}/{name}/fire", markup=False)
    if secret is not None and secret_file is None:
        console.print(f"secret (not shown again): {secret}", markup=False)


@triggers.command("pause")
def pause_trigger(name: _Name) -> None:
    """Let nothing fire from now on."""
    _post(f"{TRIGGERS}/{name}/pause", f"trigger {name} is paused")


@triggers.command("resume")
def resume_trigger(name: _Name) -> None:
    """Go on with what happens from now on."""
    _post(f"{TRIGGERS}/{name}/resume", f"trigger {name} goes on")


@triggers.command("delete")
def delete_trigger(name: _Name) -> None:
    """Delete a trigger; its runs stay."""
    client_for(default_url()).delete(f"{TRIGGERS}/{name}")
    console.print(f"trigger {name} is deleted", markup=False)


@triggers.command("fire")
def fire(
    name: _Name,
    secret_file: Annotated[Path, typer.Option(help="The file with the webhook's secret.")],
    event: Annotated[str, typer.Option(help="A JSON object, which expressions read as trigger.event.")] = "{}",
    delivery: Annotated[str | None, typer.Option(help="The same again fires nothing more.")] = None,
) -> None:
    """Fire a webhook trigger."""
    try:
        body = json.loads(event)
    except ValueError as error:
        raise InvalidInput(f"--event is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidInput("--event is not a JSON object")
    fired = fire_trigger(name, body, _read_secret(secret_file), delivery=delivery)
    console.print(f"{fired['event_id']}: {fired['state']} {fired['run_id'] or fired['reason']}".rstrip(), markup=False)


@triggers.command("runs")
def trigger_runs(name: _Name, limit: _Limit = 20) -> None:
    """List what became of its events, newest first."""
    _print_firings(f"{TRIGGERS}/{name}/runs", limit)


def template_params(spec: PipelineSpec, texts: Sequence[str]) -> dict[str, Any]:
    """``key=value`` texts as values of the pipeline's parameter types; those with expressions stay texts.

    Raises:
        InvalidInput: no ``=``, or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise InvalidInput(f"-p {text}: expected key=value")
        parameter = spec.parameters.get(name)
        if parameter is None or any(find_expressions(value)):
            values[name] = value
            continue
        try:
            values[name] = msgspec.convert(value, _TYPES[parameter.type], strict=False)
        except msgspec.ValidationError as error:
            raise InvalidInput(f"parameters.{name}: expected {parameter.type}, got {value!r}") from error
    return values


def _read_secret(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{file}: cannot be read: {error}") from error


def _has_secret(name: str, auth: Auth | None) -> bool:
    with suppress(NotFound):
        found = client_for(default_url()).get(f"{TRIGGERS}/{name}")["on"]
        return bool(found.get("auth") == auth)
    return False


def _post(path: str, said: str) -> None:
    client_for(default_url()).post(path, {})
    console.print(said, markup=False)


def _print_firings(path: str, limit: int) -> None:
    table = plain_table("event", "time", "decision", "run", "state", "")
    for row in client_for(default_url()).get(path, limit=limit):
        state = row["run_state"] or ""
        table.add_row(
            row["event_id"], _short(row["event_at"]), row["state"], row["run_id"] or "",
            f"[{STYLES.get(state, 'default')}]{state}[/]" if state else "", row["reason"].replace("[", r"\["),
        )  # fmt: skip
    console.print(table)


def _short(moment: str | None) -> str:
    return "" if moment is None else moment[:19].replace("T", " ")


def _plain(value: object) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)
