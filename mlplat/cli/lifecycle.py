"""Purging, moving, exporting and importing from the shell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mlplat.cli.tables import plain_table
from mlplat.errors import InvalidInput
from mlplat.sdk.client import client_for, default_url
from mlplat.sdk.exporting import export_experiment
from mlplat.sdk.import_target import Imported
from mlplat.sdk.importing import import_archive
from mlplat.sdk.lifecycle import move_runs, purge
from mlplat.sdk.mlflow_import import import_mlflow
from mlplat.sdk.mlflow_registry import ImportedRegistry, import_registry
from mlplat.tally import human_bytes, tally

commands = typer.Typer()
console = Console(highlight=False, soft_wrap=True)
SHOWN_IDS = 20
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")]


@commands.command("purge")
def purge_command(
    older_than: Annotated[
        str | None, typer.Option(help="Only what was deleted so long ago: 12h, 30d, 2w. Needed unless --run is given.")
    ] = None,
    experiment: Annotated[list[str] | None, typer.Option(help="Only of this experiment; may be repeated.")] = None,
    run: Annotated[list[str] | None, typer.Option(help="Only this run; may be repeated.")] = None,
    dry_run: _DryRun = False,
) -> None:
    """Remove deleted runs and experiments for good: rows, metric points and artifacts."""
    if older_than is None and not run:
        raise InvalidInput("say --older-than 30d (0s for everything that is deleted), or --run ID")
    report = purge(client_for(default_url()), older_than or "0s", experiment, run, dry_run=dry_run)
    table = plain_table("store", "would be removed" if dry_run else "removed", "bytes")
    table.add_row("Postgres", f"{report['runs']} runs, {report['experiments']} experiments",
                  f"~{human_bytes(report['postgres_bytes'])}")  # fmt: skip
    table.add_row("metrics", "their points", f"~{human_bytes(report['metric_bytes'])}")
    table.add_row("artifacts", f"{report['artifact_files']} files", human_bytes(report["artifact_bytes"]))
    console.print(table)
    for kept in report["kept"]:
        console.print(f"kept {kept['kind']} {kept['id']}: {kept['reason']}", style="yellow", markup=False)
    for run_id in report["missing"]:
        console.print(f"no run {run_id}", style="yellow", markup=False)


@commands.command("move")
def move_command(
    run: Annotated[list[str], typer.Argument(help="Ids of runs.")],
    to: Annotated[str, typer.Option(help="The experiment's name.")],
    children: Annotated[bool, typer.Option("--children", help="Take all descendants along.")] = False,
) -> None:
    """Move runs to another experiment. Their artifacts stay where they are."""
    moved = move_runs(run, to, with_children=children)
    console.print(f"{len(moved)} runs are in experiment {to}", markup=False)


@commands.command("export")
def export_command(
    experiment: Annotated[str, typer.Argument(help="The experiment's name.")],
    file: Annotated[Path, typer.Argument(help="A new folder, or a new .tar file.")],
) -> None:
    """Export an experiment with all that is in it as an open archive: JSON, Parquet and files."""
    with tally(console) as progress:
        exported = export_experiment(client_for(default_url()), experiment, file, progress)
    console.print(
        f"{file}: {exported.runs} runs, {exported.points} points, {exported.datasets} datasets, "
        f"{exported.models} logged models, {exported.artifacts} artifacts",
        markup=False,
    )
    for owner, uri in exported.without_artifacts:
        console.print(f"{owner}: its artifacts live at {uri} and were left out", style="yellow", markup=False)


@commands.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(help="What mlplat export wrote.")],
    name: Annotated[str | None, typer.Option(help="The experiment's name here.")] = None,
) -> None:
    """Import an exported experiment. It is seen when it is complete; run again to go on after a failure."""
    with tally(console) as progress:
        imported = import_archive(client_for(default_url()), file, name, progress)
    _print_imported(imported)


@commands.command("import-mlflow")
def import_mlflow_command(
    url: Annotated[str, typer.Argument(help="The MLflow server, as in MLFLOW_TRACKING_URI.")],
    experiment: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    registry: Annotated[
        bool | None,
        typer.Option(
            "--registry/--no-registry",
            help="Registered models, once their experiments are here; by default unless --experiment is given.",
        ),
    ] = None,
) -> None:
    """Import experiments and registered models from an MLflow server; run again to go on after a failure."""
    client = client_for(default_url())
    with tally(console) as progress:
        results = list(import_mlflow(client, url, experiment, progress))
        models = import_registry(client, url, progress) if registry or (registry is None and not experiment) else None
    for imported in results:
        _print_imported(imported)
    if models is not None:
        _print_registry(models)


def _print_imported(imported: Imported) -> None:
    if imported.already_there:
        console.print(f"experiment {imported.experiment} was imported before; nothing changed", markup=False)
        return
    console.print(
        f"experiment {imported.experiment} (id {imported.experiment_id}): {imported.runs} runs, "
        f"{imported.points} points, {imported.datasets} datasets, {imported.models} logged models, "
        f"{imported.artifacts} artifacts",
        markup=False,
    )
    _print_some([f"run {old} is {new} here: its id was taken" for old, new in imported.renamed.items()])
    _print_some([f"logged model {old} is {new} here: its id was taken" for old, new in imported.renamed_models.items()])
    _print_left_out(imported.left_out)


def _print_registry(imported: ImportedRegistry) -> None:
    console.print(f"registry: {imported.models} models and {imported.versions} versions more than before")
    _print_some([f"model {old} is {new} here: its name was taken" for old, new in imported.renamed.items()])
    _print_left_out(imported.left_out)


def _print_left_out(left_out: Sequence[str]) -> None:
    """All of it: nobody else says what is missing now."""
    if left_out:
        console.print(f"left out: {len(left_out)}", style="yellow")
    for line in left_out:
        console.print(f"  {line}", style="yellow", markup=False)


def _print_some(lines: Sequence[str]) -> None:
    for line in lines[:SHOWN_IDS]:
        console.print(line, style="yellow", markup=False)
    if len(lines) > SHOWN_IDS:
        console.print(f"and {len(lines) - SHOWN_IDS} more", style="yellow")
