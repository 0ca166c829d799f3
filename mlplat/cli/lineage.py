"""Lineage from the shell."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer
from rich.console import Console
from rich.tree import Tree

from mlplat.cli.models import Name
from mlplat.cli.tables import plain_table
from mlplat.sdk.client import client_for, default_url

lineage = typer.Typer(no_args_is_help=True, help="What models come from, and what came of data.")
console = Console(highlight=False, soft_wrap=True)
_Version = Annotated[str, typer.Argument(help="A number, a semantic version, a range, a stage, or @ and an alias.")]
_Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="The file to write; by default the terminal.", dir_okay=False)
]


class Direction(StrEnum):
    """Where to look."""

    UPSTREAM = "upstream"
    DOWNSTREAM = "downstream"


@lineage.command("show")
def show(name: Name, version: _Version) -> None:
    """Show what a model version comes from: runs, code, data and parents."""
    found = client_for(default_url()).get(_url(name, version))
    known = found["version"]
    console.print(f"{name} version {known['version']} ({known['semantic']})", markup=False)
    for run in found["runs"]:
        code = run["code"]
        changed = " and changes that were not committed" if code["dirty"] else ""
        facts = {
            "run": f"{run['run_id']} {run['name']} ({run['status'].lower()}{', purged' if run['purged_at'] else ''})",
            "step": run["step"] and f"{run['step']} of pipeline run {run['pipeline_run']}",
            "code": " ".join(filter(None, [code["entry_point"], code["commit"]])) + changed,
            "python": run["environment"].get("python"),
        }
        for label, text in facts.items():
            if text:
                console.print(f"  {label:7} {text}", markup=False)
    if found["data"]:
        table = plain_table("dataset", "digest", "rows", "context", "source", "feature views")
        for use in found["data"]:
            source = use["source"] if isinstance(use["source"], str) else json.dumps(use["source"])
            rows = "" if use["rows"] is None else str(use["rows"])
            views = ", ".join(use["feature_views"])
            table.add_row(use["name"], use["digest"], rows, use["context"] or "", source[:80], views)
        console.print(table)
    for parent in found["parents"]:
        console.print(f"  comes from model {parent}", markup=False)


@lineage.command("graph")
def graph(
    node: Annotated[
        str,
        typer.Argument(
            help="model-version:NAME/3, run:ID, dataset:NAME@DIGEST, feature-view:NAME, logged-model:ID "
            "or step:RUN/STEP."
        ),
    ],
    direction: Annotated[Direction, typer.Option(help="What it comes from, or what came of it.")] = Direction.UPSTREAM,
    depth: Annotated[int, typer.Option(min=1, max=1_000)] = 1_000,
) -> None:
    """Show the tree of what a thing comes from, or of what came of it."""
    found = client_for(default_url()).get("/api/v1/lineage/graph", node=node, direction=direction.value, depth=depth)
    near, far = ("to", "from") if direction is Direction.UPSTREAM else ("from", "to")
    following: dict[str, list[str]] = {}
    for edge in found["edges"]:
        following.setdefault(edge[near], []).append(edge[far])
    start = found["nodes"][0]["node"]
    tree = Tree(start)
    shown, left = {start}, [(other, tree) for other in reversed(following.get(start, []))]
    while left:
        text, above = left.pop()
        if text in shown:
            above.add(f"{text} (see above)" if text in following else text)
            continue
        shown.add(text)
        branch = above.add(text)
        left += [(other, branch) for other in reversed(following.get(text, []))]
    console.print(tree, markup=False)
    if found["truncated"]:
        console.print("… and more")


@lineage.command("dataset")
def dataset(
    digest: Annotated[str, typer.Argument(help="The dataset's digest.")],
    name: Annotated[str | None, typer.Option(help="Only datasets of this name.")] = None,
) -> None:
    """Show the model versions that came of a dataset."""
    found = client_for(default_url()).get("/api/v1/lineage/datasets", digest=digest, name=name)
    for version in found["model_versions"]:
        console.print(version, markup=False)
    if not found["model_versions"]:
        console.print("No model version came of it.")


@lineage.command("openlineage")
def openlineage(name: Name, version: _Version, output: _Output = None) -> None:
    """Write the lineage of a model version as OpenLineage events, one in each line."""
    events = client_for(default_url()).get(f"{_url(name, version)}/openlineage")
    _write("".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events).encode(), output)


@lineage.command("audit")
def audit(
    name: Name,
    version: _Version,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write: .html, or .json.", dir_okay=False)],
) -> None:
    """Write all that is known of a model version into one file, for people and for programs."""
    form = "json" if output.suffix.lower() == ".json" else "html"
    _write(client_for(default_url()).get_bytes(f"{_url(name, version)}/audit", format=form), output)


def _write(body: bytes, output: Path | None) -> None:
    if output is None:
        console.out(body.decode(), end="", highlight=False)
        return
    output.write_bytes(body)
    console.print(f"{output}: {len(body):,} bytes", markup=False)


def _url(name: str, version: str) -> str:
    return f"/api/v1/lineage/model-versions/{quote(name, safe='')}/{quote(version, safe='')}"
