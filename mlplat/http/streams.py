"""Large answers, sent piece by piece."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator

import numpy as np
import pyarrow as pa

from mlplat.http.mlflow.endpoint import wire_double

#: Pieces are sent together up to this size: each costs a hop through Ray.
PIECE_BYTES = 256 * 1024


async def in_pieces(parts: AsyncIterator[bytes], piece_bytes: int = PIECE_BYTES) -> AsyncIterator[bytes]:
    """The same bytes in fewer, larger pieces."""
    waiting, size = [], 0
    async for part in parts:
        waiting.append(part)
        size += len(part)
        if size >= piece_bytes:
            yield b"".join(waiting)
            waiting, size = [], 0
    if waiting:
        yield b"".join(waiting)


def wire_doubles(values: pa.Array | pa.ChunkedArray) -> list[float | str]:
    """Doubles as the API writes them: what JSON has no number for is "NaN", "Infinity" or "-Infinity"."""
    # Not with Arrow's own functions: some of them never return for a column without chunks.
    numbers = values.to_numpy(zero_copy_only=False)
    if np.isfinite(numbers).all():
        plain: list[float | str] = numbers.tolist()
        return plain
    return [number if math.isfinite(number) else wire_double(number) for number in numbers.tolist()]
