"""Datasets: digests that mean something, and what MLflow's own client makes of the request."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from google.protobuf.json_format import ParseDict
from mlflow.entities import DatasetInput
from mlflow.protos.service_pb2 import LogInputs
from mlflow.types import Schema

from mlplat.errors import InvalidInput, NotFound
from mlplat.sdk import digests
from mlplat.sdk.datasets import Dataset, describe, log_inputs_request
from mlplat.sdk.outbox import Outbox
from mlplat.sdk.records import Call, from_frame
from mlplat.sdk.run import Run
from mlplat.sdk.spool import SpoolFile, spooled_files

FRAME = pd.DataFrame(
    {
        "n": [1, 2, 3],
        "x": [0.5, float("nan"), 1.5],
        "s": ["a", None, "ü"],
        "c": pd.Categorical(["u", "v", "u"]),
        "t": pd.to_datetime(["2025-01-01", "2025-01-02", "NaT"]),
        "b": [True, False, True],
    }
)
PROGRAM = """
import numpy as np, pandas as pd, pyarrow as pa
from mlplat.sdk.datasets import describe
frame = pd.DataFrame({"n": [1, 2, 3], "s": ["a", None, "ü"], "o": [[1], None, [2, 3]]})
for data in (frame, np.arange(6.0).reshape(2, 3), {"x": np.array(["a", {"k": 1}], object)}):
    print(describe(data).digest)
"""


def test_digests_are_the_same_in_every_process() -> None:
    first, second = (
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        ).stdout.split()
        for seed in ("1", "2")
    )
    assert first == second
    assert len(set(first)) == 3


def test_the_form_of_a_table_makes_no_difference() -> None:
    table = pa.Table.from_pandas(FRAME)
    digest = describe(FRAME).digest
    assert describe(table).digest == digest
    assert describe(pa.concat_tables([table.slice(0, 1), table.slice(1)])).digest == digest
    assert describe(pa.concat_tables([table, table]).slice(3)).digest == digest
    assert describe(table.set_column(3, "c", table["c"].cast(pa.string()))).digest == digest
    assert describe(table.set_column(2, "s", table["s"].cast(pa.string_view()))).digest == digest
    assert describe(FRAME.copy()).digest == digest
    assert len(digest) <= 36


@pytest.mark.parametrize(
    "change",
    [
        lambda frame: frame.rename(columns={"n": "m"}),
        lambda frame: frame.assign(n=[1, 2, 4]),
        lambda frame: frame.assign(n=frame["n"].astype("int32")),
        lambda frame: frame.iloc[[1, 0, 2]],
        lambda frame: frame.iloc[:2],
        lambda frame: frame.assign(s=["a", "", "ü"]),
        lambda frame: frame[["x", "n", "s", "c", "t", "b"]],
        lambda frame: frame.assign(x=[0.5, 0.0, 1.5]),
    ],
)
def test_every_change_shows(change: Any) -> None:
    assert describe(change(FRAME)).digest != describe(FRAME).digest


def test_what_lies_under_a_null_makes_no_difference() -> None:
    mask = pa.array([True, False]).buffers()[1]
    hidden = pa.Array.from_buffers(pa.int64(), 2, [mask, pa.array([1, 999]).buffers()[1]])
    assert describe(pa.table({"a": hidden})).digest == describe(pa.table({"a": [1, None]})).digest


def test_arrays_in_any_layout() -> None:
    array = np.arange(12.0).reshape(3, 4)
    digest = describe(array).digest
    assert describe(np.asfortranarray(array)).digest == digest
    assert describe(array.astype(">f8")).digest == digest
    assert describe(np.arange(24.0).reshape(3, 8)[:, :4] * 0 + array).digest == digest
    for other in (array.T, array + 1, array.astype("f4"), array.reshape(-1), array[:0]):
        assert describe(other).digest != digest
    assert describe(np.array(7)).profile == '{"num_rows": 1, "num_elements": 1}'


def test_a_large_table_is_looked_at_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "SAMPLE_ROWS", 320)
    values = np.arange(100_000)
    digest = describe(pa.table({"a": values})).digest
    first, last, between = values.copy(), values.copy(), values.copy()
    first[0] = last[-1] = between[25] = -1
    assert describe(pa.table({"a": first})).digest != digest
    assert describe(pa.table({"a": last})).digest != digest
    assert describe(pa.table({"a": between})).digest == digest


@pytest.mark.parametrize(
    ("total", "limit"), [(0, 10), (1, 10), (10, 10), (11, 10), (1_000, 160), (17, 16), (10**9, 10**5)]
)
def test_blocks_lie_within_and_reach_both_ends(total: int, limit: int) -> None:
    found = list(digests.blocks(total, limit))
    assert sum(count for _start, count in found) <= max(limit, digests.BLOCKS)
    assert all(start >= 0 and start + count <= total for start, count in found)
    if total:
        assert found[0][0] == 0
        assert sum(found[-1]) == total


def test_parquet_files_and_folders(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    pq.write_table(pa.table({"a": [1, 2], "s": ["x", "y"]}), file)
    dataset = describe(file)
    assert (dataset.name, dataset.source_type) == ("train", "local")
    assert '"num_rows": 2' in dataset.profile
    assert dataset.schema is not None
    assert '"long"' in dataset.schema
    moved = tmp_path / "elsewhere" / "other.parquet"
    moved.parent.mkdir()
    moved.write_bytes(file.read_bytes())
    assert describe(str(moved)).digest == dataset.digest
    (moved.parent / "more.parquet").write_bytes(file.read_bytes())
    folder = describe(moved.parent, name="all")
    assert '"num_rows": 4' in folder.profile
    copy = tmp_path / "copy"
    moved.parent.rename(copy)
    assert describe(copy).digest == folder.digest
    (copy / "more.parquet").rename(copy / "less.parquet")
    assert describe(copy).digest != folder.digest


def test_any_file_will_do_but_it_must_be_there(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text("a\n1\n")
    assert describe(file).schema is None
    assert '"size_bytes": 4' in describe(file).profile
    with pytest.raises(NotFound, match="no such file"):
        describe(tmp_path / "none.csv")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InvalidInput, match="not Parquet"):
        describe(tmp_path / "broken.parquet")
    with pytest.raises(InvalidInput, match="nonsense"):
        describe("nonsense://x/y")


@pytest.mark.parametrize("data", [7, None, object(), ["a"]])
def test_what_is_no_data_is_refused(data: Any) -> None:
    with pytest.raises(InvalidInput):
        describe(data)


def test_names_and_contexts_are_bounded() -> None:
    for name in ("", "x" * 501):
        with pytest.raises(InvalidInput, match="name"):
            describe(FRAME, name=name)
    with pytest.raises(InvalidInput, match="context"):
        log_inputs_request("r", describe(FRAME), "x" * 501)
    for view in ("", "x" * 201):
        with pytest.raises(InvalidInput, match="feature view"):
            log_inputs_request("r", describe(FRAME), "training", ["driver_stats", view])


@pytest.mark.parametrize(
    ("source", "kind", "part"),
    [
        ("s3://bucket/x.parquet", "s3", '"uri": "s3://bucket/x.parquet"'),
        ("https://me:pw@host/x?sig=1", "http", '"url": "https://host/x"'),
        ("/srv/x", "local", '"uri": "/srv/x"'),
        (None, "code", "mlflow.source.name"),
    ],
)
def test_sources_are_mlflows(source: str | None, kind: str, part: str) -> None:
    dataset = describe(FRAME, source=source)
    assert dataset.source_type == kind
    assert part in dataset.source


@pytest.mark.parametrize("data", [FRAME[["n", "x", "s", "b"]], {"features": np.zeros((3, 2)), "targets": np.zeros(3)}])
def test_mlflow_understands_the_request(data: Any) -> None:
    dataset: Dataset = describe(data, name="digits")
    message = ParseDict(log_inputs_request("run-1", dataset, "training"), LogInputs())
    parsed = DatasetInput.from_proto(message.datasets[0])
    assert message.run_id == "run-1"
    assert (parsed.dataset.name, parsed.dataset.digest) == ("digits", dataset.digest)
    assert [(tag.key, tag.value) for tag in parsed.tags] == [("mlflow.data.context", "training")]
    assert parsed.dataset.profile == dataset.profile
    assert '"num_rows": 3' in dataset.profile


def test_mlflow_reads_the_column_schema() -> None:
    schema = describe(FRAME[["n", "x", "s", "t"]]).schema
    assert schema is not None
    columns = Schema.from_json(schema.removeprefix('{"mlflow_colspec": ').removesuffix("}"))
    assert [str(kind) for kind in columns.input_types()] == [
        "DataType.long", "DataType.double", "DataType.string", "DataType.datetime",
    ]  # fmt: skip


def test_a_run_sends_the_request_and_answers_the_digest(tmp_path: Path) -> None:
    outbox = Outbox("http://platform.test", tmp_path, 2**30, offline=True)
    run = Run(outbox, "run-1", "name", owner=False, info=None)
    digest = run.log_dataset(FRAME, "digits", context="evaluation", source="s3://bucket/digits.parquet")
    assert outbox.flush(60, 60)
    outbox.close()
    file = SpoolFile.adopt(*spooled_files(tmp_path))
    assert file is not None
    ((frame, _end),) = file.read(2**20)
    file.close(delete=True)
    call = from_frame(frame)
    assert isinstance(call, Call)
    dataset = describe(FRAME, "digits", "s3://bucket/digits.parquet")
    assert call.path == "/api/2.0/mlflow/runs/log-inputs"
    assert call.body == log_inputs_request("run-1", dataset, "evaluation")
    assert digest == dataset.digest


def test_a_dataset_that_a_run_reads_is_logged_by_its_file(tmp_path: Path) -> None:
    outbox = Outbox("http://platform.test", tmp_path / "spool", 2**30, offline=True)
    run = Run(outbox, "run-1", "name", owner=False, info=None)
    file = tmp_path / "digits.parquet"
    FRAME[["n", "x"]].to_parquet(file)
    assert run.read_dataset(file, columns=["x"]).equals(FRAME[["x"]])
    assert outbox.flush(60, 60)
    outbox.close()
    spooled = SpoolFile.adopt(*spooled_files(tmp_path / "spool"))
    assert spooled is not None
    ((frame, _end),) = spooled.read(2**20)
    spooled.close(delete=True)
    call = from_frame(frame)
    assert isinstance(call, Call)
    assert call.body == log_inputs_request("run-1", describe(file), "training")
