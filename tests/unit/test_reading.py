"""Tables out of files."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.feather as pf
import pyarrow.parquet as pq
import pytest

from mlplat.errors import InvalidInput, NotFound
from mlplat.sdk.reading import read_table

TABLE = pa.table({"x": [1, 2], "y": ["a", "b"]})


@pytest.fixture
def files(tmp_path: Path) -> Path:
    pq.write_table(TABLE, tmp_path / "t.parquet")
    pc.write_csv(TABLE, tmp_path / "t.csv")
    pf.write_feather(TABLE, str(tmp_path / "t.feather"))
    (tmp_path / "t.jsonl").write_text('{"x": 1, "y": "a"}\n{"x": 2, "y": "b"}\n')
    (tmp_path / "parts").mkdir()
    for number in range(2):
        pq.write_table(TABLE.slice(number, 1), tmp_path / "parts" / f"{number}.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["t.parquet", "t.csv", "t.feather", "t.jsonl", "parts"])
def test_tables_are_read_by_their_suffix(files: Path, name: str) -> None:
    assert read_table(str(files / name)).equals(TABLE)
    assert read_table(f"file://{files / name}", ["y"]).equals(TABLE.select(["y"]))


def test_what_is_no_table_is_refused(files: Path) -> None:
    (files / "broken.parquet").write_bytes(b"not Parquet")
    (files / "t.txt").write_text("x")
    for name, error in (("no.csv", NotFound), ("t.txt", InvalidInput), ("broken.parquet", InvalidInput)):
        with pytest.raises(error, match=name):
            read_table(str(files / name))
    with pytest.raises(InvalidInput, match="one kind"):
        read_table(str(files))
    with pytest.raises(InvalidInput, match="z"):
        read_table(str(files / "t.csv"), ["z"])
    with pytest.raises(InvalidInput):
        read_table("nothing://x/y.csv")
