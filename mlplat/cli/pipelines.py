"""Pipelines from the shell: writing and checking them, submitting them, and steering their runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from mlplat.cli import watch
from mlplat.cli.params import parse_params
from mlplat.cli.tables import plain_table
from mlplat.errors import InvalidPipeline
from mlplat.pipelines.drawing import to_svg
from mlplat.pipelines.graph import StepState, graph_of, to_mermaid, to_text
from mlplat.pipelines.loader import json_schema
from mlplat.pipelines.model import State
from mlplat.pipelines.spec import MAX_DEPTH
from mlplat.run_view import STYLES
from mlplat.sdk.client import client_for, default_url
from mlplat.sdk.pipeline_runs import PipelineRunHandle, check_pipeline, load_pipeline, pipeline_run, submit

commands = typer.Typer()
definitions = typer.Typer(help="Write and check pipeline definitions.", no_args_is_help=True)
console = Console(highlight=False, soft_wrap=True)
_SUFFIXES = {".yaml", ".yml", ".py"}

_File = Annotated[
    Path, typer.Argument(help="A YAML definition, or a Python file with one @pipeline; file.py:NAME if it has more.")
]
_Run = Annotated[str, typer.Argument(metavar="RUN", help="The pipeline run.")]
_Params = Annotated[list[str] | None, typer.Option("-p", "--param", help="key=value; may be repeated.")]
_Comment = Annotated[str, typer.Option("--comment", "-m", help="Why; it stays with the run.")]
_Wait = Annotated[bool, typer.Option(help="Follow the run to its end.")]
_Key = Annotated[str | None, typer.Option(help="Idempotency key: the same key again gives the same run.")]
_Priority = Annotated[
    int | None, typer.Option(min=-100, max=100, help="Instead of the definition's; higher runs first.")
]


class Format(StrEnum):
    """Of a graph."""

    MERMAID = "mermaid"
    SVG = "svg"
    TEXT = "text"


@definitions.command("schema")
def schema_command() -> None:
    """Print the JSON Schema of definitions, for editors: it completes and checks YAML while it is written."""
    print(json.dumps(json_schema(), indent=2))  # noqa: T201


@definitions.command("validate")
def validate_command(file: _File) -> None:
    """Check a definition without a platform: one problem a line, and exit code 1."""
    try:
        spec = check_pipeline(file)
    except InvalidPipeline as error:
        print(error.message)  # noqa: T201
        raise typer.Exit(1) from error
    console.print(f"{file}: {spec.name} is sound: {len(spec.all_steps)} steps, digest {spec.digest[:12]}", markup=False)


@definitions.command("graph")
def graph_command(
    source: Annotated[str, typer.Argument(metavar="FILE|RUN", help="A definition, or a run with its states.")],
    format_: Annotated[
        Format | None, typer.Option("--format", "-f", help="By default as the output's name says, else text.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write to this file.")] = None,
) -> None:
    """Show the graph of a definition or a run, as Mermaid, SVG or text."""
    if Path(source.partition(":")[0]).suffix in _SUFFIXES:
        graph = graph_of(check_pipeline(source))
    else:
        run = pipeline_run(source)
        graph = graph_of(run.definition(), states_of(run.status(), lambda child: pipeline_run(child).status()))
    chosen = format_ or _format_of(output)
    text = {Format.MERMAID: to_mermaid, Format.SVG: to_svg, Format.TEXT: to_text}[chosen](graph)
    if output is None:
        print(text)  # noqa: T201
    else:
        output.write_text(f"{text}\n", encoding="utf-8")


def _format_of(output: Path | None) -> Format:
    by_suffix = {".svg": Format.SVG, ".mmd": Format.MERMAID, ".mermaid": Format.MERMAID}
    return Format.TEXT if output is None else by_suffix.get(output.suffix, Format.TEXT)


def states_of(
    status: Mapping[str, Any], status_of: Callable[[str], Mapping[str, Any]], depth: int = 0
) -> dict[str, StepState]:
    """The states of a run's steps, those of its sub-pipelines included.

    Args:
        status: as ``/api/v1/pipeline-runs/{id}`` answers it; ``status_of`` gives that of a sub-pipeline's run.
    """
    children = {entry["step"]: entry["child_id"] for entry in status["attempts"] if entry["item"] is None}
    found = {}
    for name, step in status["steps"].items():
        items = step["items"]
        count = None if items is None else (sum(item["state"] == State.SUCCEEDED for item in items), len(items))
        child = children.get(name)
        inner = states_of(status_of(child), status_of, depth + 1) if child is not None and depth < MAX_DEPTH else {}
        found[name] = StepState(step["state"], count, inner)
    return found


@commands.command("submit")
def submit_command(
    file: _File, param: _Params = None, wait: _Wait = False, priority: _Priority = None, key: _Key = None
) -> None:
    """Submit a pipeline. With --wait, the exit code says how it ended: 0 succeeded, 1 failed."""
    spec = load_pipeline(file, client_for(default_url()))
    handle = submit(spec, parse_params(spec, param or []), priority=priority, idempotency_key=key)
    _started(handle, f"submitted {spec.name}", wait)


@commands.command("resume")
def resume_command(
    run_id: _Run,
    from_step: Annotated[
        str | None, typer.Option("--from", help="This step and what depends on it run again in any case.")
    ] = None,
    with_: Annotated[
        Path | None, typer.Option("--with", help="An edited definition; by default the run's own.")
    ] = None,
    param: _Params = None,
    wait: _Wait = False,
    priority: _Priority = None,
    key: _Key = None,
) -> None:
    """Start a run from an earlier one's results: only what failed or changed runs again."""
    earlier = pipeline_run(run_id)
    spec = earlier.definition() if with_ is None else load_pipeline(with_, client_for(default_url()))
    kept = {name: value for name, value in earlier.status()["params"].items() if name in spec.parameters}
    params = parse_params(spec, param or [], kept)
    handle = earlier.resume(spec, params, from_step=from_step, priority=priority, idempotency_key=key)
    _started(handle, f"resumed {run_id} as {spec.name}", wait)


def _started(handle: PipelineRunHandle, what: str, wait: bool) -> None:
    console.print(f"{what}: {handle.run_id}   {handle.url}")
    if wait:
        watch.watch_to_end(handle, console)


@commands.command("runs")
def runs_command(
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    state: Annotated[State | None, typer.Option(case_sensitive=False, help="Only runs in this state.")] = None,
    pipeline: Annotated[str | None, typer.Option(help="Only runs of this pipeline.")] = None,
    by: Annotated[str | None, typer.Option(help="Only runs that this person submitted.")] = None,
) -> None:
    """List pipeline runs, newest first."""
    table = plain_table("run", "pipeline", "state", "created", "by", "error")
    found = client_for(default_url()).get(
        "/api/v1/pipeline-runs", limit=limit, state=state, pipeline=pipeline, submitted_by=by
    )
    for run in found:
        error = (run["error"] or "").partition("\n")[0]
        table.add_row(
            run["run_id"], run["pipeline"], Text(run["state"], style=STYLES.get(run["state"], "")),
            run["created_at"][:19], Text(run["submitted_by"]), Text(error),
        )  # fmt: skip
    console.print(table)


@commands.command("cancel")
def cancel_command(run_id: _Run, comment: _Comment = "") -> None:
    """Stop a run: its attempts are asked to end, then forced; its finally steps still run."""
    pipeline_run(run_id).cancel(comment)
    console.print(f"{run_id}: asked to end")


@commands.command("approve")
def approve_command(
    run_id: _Run, step: Annotated[str, typer.Argument(help="The step that waits.")], comment: _Comment = ""
) -> None:
    """Let a run go on that waits for a decision."""
    pipeline_run(run_id).approve(step, comment)
    console.print(f"{run_id}: {step} approved")


@commands.command("reject")
def reject_command(
    run_id: _Run, step: Annotated[str, typer.Argument(help="The step that waits.")], comment: _Comment = ""
) -> None:
    """Let the step fail that waits for a decision."""
    pipeline_run(run_id).reject(step, comment)
    console.print(f"{run_id}: {step} rejected")
