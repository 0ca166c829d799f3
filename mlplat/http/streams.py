"""Large answers, sent piece by piece."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pyarrow as pa

#: Pieces are sent together up to this size: each costs a hop through Ray.
PIECE_BYTES = 256 * 1024


async def in_pieces(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in fewer, larger pieces."""
    waiting, size = [], 0
    async for part in parts:
        waiting.append(part)
        size += len(part)
        if size >= PIECE_BYTES:
            yield b"".join(waiting)
            waiting, size = [], 0
    if waiting:
        yield b"".join(waiting)


def wire_doubles(values: pa.Array | pa.ChunkedArray) -> list[float | str]:
    """Doubles as the API writes them: what JSON has no number for is "NaN", "Infinity" or "-Infinity"."""
    numbers = np.asarray(values)
    shown: list[float | str] = numbers.tolist()
    for place in np.flatnonzero(~np.isfinite(numbers)).tolist():
        number = numbers[place]
        shown[place] = "NaN" if np.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    return shown
