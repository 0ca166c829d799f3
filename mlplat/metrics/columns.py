"""Arrow columns from Python values, without the detour of ``pyarrow.array``.

That function looks for pandas at its first call and imports it: a second of work under the interpreter's
lock, in a process that may never need it, and impossible while the interpreter shuts down. These are
also several times faster.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate

import pyarrow as pa


def int64_column(values: Sequence[int]) -> pa.Array:
    """An int64 column without nulls.

    Raises:
        TypeError, OverflowError: a value is not an int of 64 bits.
    """
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(array("q", values))])


def float64_column(values: Sequence[float]) -> pa.Array:
    """A float64 column without nulls.

    Raises:
        TypeError: a value is not a number.
    """
    return pa.Array.from_buffers(pa.float64(), len(values), [None, pa.py_buffer(array("d", values))])


def text_column(values: Sequence[str]) -> pa.Array:
    """A string column without nulls.

    Raises:
        UnicodeEncodeError: a value has no UTF-8 form.
    """
    encoded = [value.encode() for value in values]
    offsets = array("i", accumulate(map(len, encoded), initial=0))
    return pa.Array.from_buffers(
        pa.string(), len(encoded), [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    )


def constant_name(name: str, count: int) -> pa.Array:
    """A dictionary column of the same text in every row."""
    indices = pa.Array.from_buffers(pa.int32(), count, [None, pa.py_buffer(bytes(4 * count))])
    return pa.DictionaryArray.from_arrays(indices, text_column([name]))


def encoded_names(values: Sequence[str]) -> pa.Array:
    """A dictionary column of texts, in which each occurs once in the dictionary."""
    names: dict[str, int] = {}
    codes = array("i", [names.setdefault(value, len(names)) for value in values])
    indices = pa.Array.from_buffers(pa.int32(), len(codes), [None, pa.py_buffer(codes)])
    return pa.DictionaryArray.from_arrays(indices, text_column(list(names)))
