"""``python -m mlplat.cli``"""

from __future__ import annotations

from mlplat.cli import main

main()
