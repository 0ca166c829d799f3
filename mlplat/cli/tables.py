"""Tables as all commands print them."""

from __future__ import annotations

from rich.table import Table


def plain_table(*columns: str) -> Table:
    """A table without lines, to which rows are added."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column)
    return table
