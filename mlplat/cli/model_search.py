"""Search of model versions from the shell."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from mlplat.cli.tables import plain_table
from mlplat.sdk.client import client_for, default_url

console = Console(highlight=False, soft_wrap=True, markup=False)
#: The most that the API answers in one page.
PAGE = 1_000


def search(
    filter_text: Annotated[
        str, typer.Argument(metavar="FILTER", help="Such as \"alias = 'champion' AND metrics.accuracy > 0.9\".")
    ] = "",
    order_by: Annotated[
        list[str] | None, typer.Option(help="Such as 'semantic_version DESC'; may be repeated. The newest first.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000)] = 50,
) -> None:
    """Show the versions of all models that satisfy a filter."""
    table = plain_table("model", "version", "semantic", "stage", "aliases", "run", "updated")
    client, token, left = client_for(default_url()), None, limit
    while left:
        found = client.get(
            "/api/v1/model-versions", filter=filter_text, order_by=order_by or [], limit=min(left, PAGE),
            page_token=token,
        )  # fmt: skip
        for item in found["versions"]:
            table.add_row(
                item["name"], str(item["version"]), item["semantic_version"], item["stage"],
                ", ".join(item["aliases"]), item["run_id"] or "-", item["updated_at"][:19].replace("T", " "),
            )  # fmt: skip
        left, token = left - len(found["versions"]), found["next_page_token"]
        if token is None:
            break
    console.print(table)
    if token is not None:
        console.print(f"There are more than {limit}; see --limit.")
