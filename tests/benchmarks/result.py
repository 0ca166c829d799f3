"""What a benchmark reports, and how it is shown and stored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Result:
    """One figure. ``floor`` is what the bare engine needs, in the same unit and run; ``bound`` a promise, if any."""

    name: str
    value: float
    unit: str
    floor: float | None = None
    bound: str | None = None

    @property
    def ratio(self) -> float | None:
        """Value to floor."""
        return None if not self.floor else self.value / self.floor

    @property
    def holds(self) -> bool | None:
        """Whether the value keeps its bound (``<= x`` or ``>= x``); None without one."""
        if self.bound is None:
            return None
        comparator, _space, limit = self.bound.partition(" ")
        return self.value <= float(limit) if comparator == "<=" else self.value >= float(limit)


def save(area: str, results: Sequence[Result], folder: Path) -> None:
    """Writes ``build/bench/<area>.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(result) | {"ratio": result.ratio, "holds": result.holds} for result in results]
    (folder / f"{area}.json").write_text(json.dumps(rows, indent=2) + "\n")


def show(area: str, results: Sequence[Result]) -> None:
    """Prints a table."""
    table = Table(title=area, title_justify="left", box=None, pad_edge=False)
    for column in ("name", "value", "unit", "floor", "ratio", "bound", "holds"):
        table.add_column(column, justify="right" if column in {"value", "floor", "ratio"} else "left")
    for result in results:
        table.add_row(
            result.name,
            f"{result.value:,.3g}" if result.value < 100 else f"{result.value:,.0f}",
            result.unit,
            "" if result.floor is None else f"{result.floor:,.3g}",
            "" if result.ratio is None else f"{result.ratio:.2f}",
            result.bound or "",
            {None: "", True: "yes", False: "NO"}[result.holds],
        )
    Console(width=140).print(table)


def percentile(values: Sequence[float], fraction: float) -> float:
    """The value below which ``fraction`` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]
