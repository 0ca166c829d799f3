"""``python -m tests.benchmarks [AREA]``"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.benchmarks import artifacts, curves, live, pipelines, platform_, registry, sdk, search, tracking
from tests.benchmarks.result import Result, save, show
from tests.platform import ROOT, Platform

Area = Callable[[Platform], Iterator[Result]]
#: Areas that start and stop the platform themselves, and areas that need a running one.
COLD: dict[str, Area] = {"platform": platform_.run}
WARM: dict[str, Area] = {
    "tracking": tracking.run,
    "sdk": sdk.run,
    "registry": registry.run,
    "pipelines": pipelines.run,
    "artifacts": artifacts.run,
    "search": search.run,
    "curves": curves.run,
    "live": live.run,
}


def main(wanted: list[str]) -> int:
    """Runs the areas and returns how many promises do not hold."""
    unknown = set(wanted) - set(COLD) - set(WARM)
    if unknown:
        print(f"no such area: {', '.join(sorted(unknown))}; there is {', '.join([*COLD, *WARM])}", file=sys.stderr)
        return 2
    broken = 0
    with tempfile.TemporaryDirectory(prefix="mlb-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        platform = Platform(Path(folder))
        try:
            for name, area in (COLD | WARM).items():
                if wanted and name not in wanted:
                    continue
                if name in WARM:
                    platform.mlplat("up")
                results = list(area(platform))
                save(name, results, ROOT / "build" / "bench")
                show(name, results)
                broken += sum(result.holds is False for result in results)
        finally:
            platform.mlplat("down")
    return min(broken, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
