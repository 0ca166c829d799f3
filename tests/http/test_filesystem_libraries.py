"""``mlplat://`` in the hands of pandas, PyArrow and PyTorch, which find it by its protocol."""

from __future__ import annotations

import io
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pafs

from mlplat.sdk.filesystem import ArtifactFileSystem
from tests.http.sdk import user
from tests.http.served import Served

FRAME = pd.DataFrame({"id": range(10_000), "text": [f"ü{number % 97}" for number in range(10_000)]})


@pytest.fixture(autouse=True)
def platform_of_the_process(server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test of these says where the platform is."""
    monkeypatch.setenv("MLPLAT_URL", server_url)


@pytest.fixture
def native(run_root: str) -> tuple[pafs.FileSystem, str]:
    """PyArrow's own filesystem, by URI."""
    found, path = pafs.FileSystem.from_uri(f"fsspec+mlplat://{run_root}/arrow")
    assert path == f"{run_root}/arrow"
    return found, path


def test_pandas_writes_and_reads(run_root: str) -> None:
    folder = f"mlplat://{run_root}/pandas"
    FRAME.to_parquet(f"{folder}/frame.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(f"{folder}/frame.parquet"), FRAME)
    assert list(pd.read_parquet(f"{folder}/frame.parquet", columns=["id"]).columns) == ["id"]
    for name in ("frame.csv", "frame.csv.gz"):
        FRAME.to_csv(f"{folder}/{name}", index=False)
        pd.testing.assert_frame_equal(pd.read_csv(f"{folder}/{name}"), FRAME)
    FRAME.to_pickle(f"{folder}/frame.pkl")
    pd.testing.assert_frame_equal(pd.read_pickle(f"{folder}/frame.pkl"), FRAME)
    FRAME.to_parquet(f"{folder}/parts", partition_cols=["text"])
    assert len(pd.read_parquet(f"{folder}/parts", filters=[("text", "==", "ü3")])) == len(FRAME[FRAME.text == "ü3"])


def test_pandas_is_told_of_a_file_that_is_not_there(run_root: str, server_url: str) -> None:
    with pytest.raises(FileNotFoundError):
        pd.read_csv(f"mlplat://{run_root}/none.csv", storage_options={"url": server_url})


def test_pandas_that_fails_halfway_writes_nothing(artifacts: ArtifactFileSystem, run_root: str) -> None:
    class Unprintable:
        def __str__(self) -> str:
            raise ZeroDivisionError

    frame = pd.DataFrame({"x": [*range(200_000), Unprintable()]}, dtype=object)
    with pytest.raises(ZeroDivisionError):
        frame.to_csv(f"mlplat://{run_root}/half.csv")
    assert artifacts.find(run_root) == []


def test_a_dataset_is_written_and_read(native: tuple[pafs.FileSystem, str]) -> None:
    found, path = native
    table = pa.table({"id": list(FRAME["id"]), "text": list(FRAME["text"])})
    partitioning = ds.partitioning(pa.schema([("text", pa.string())]), flavor="hive")
    ds.write_dataset(table, path, format="parquet", filesystem=found, partitioning=partitioning, max_partitions=100)
    read = ds.dataset(path, filesystem=found, partitioning=partitioning)
    assert read.to_table(columns=["id", "text"]).sort_by("id").equals(table)
    assert read.count_rows(filter=ds.field("text") == "ü7") == len(FRAME[FRAME.text == "ü7"])
    pq.write_table(table, f"{path}/one.parquet", filesystem=found)
    assert pq.read_table(f"fsspec+mlplat://{path}/one.parquet").equals(table)


def test_pyarrows_methods(native: tuple[pafs.FileSystem, str], tmp_path: Path) -> None:
    found, path = native
    found.create_dir(f"{path}/made/deep", recursive=True)
    assert found.get_file_info(f"{path}/made").type == pafs.FileType.Directory
    with found.open_output_stream(f"{path}/made/a") as out:
        out.write(b"0123456789")
    with found.open_input_file(f"{path}/made/a") as file:
        assert (file.size(), file.read_at(3, 4)) == (10, b"456")
    infos = found.get_file_info([f"{path}/made/a", f"{path}/none"])
    assert [(info.type, info.size) for info in infos] == [(pafs.FileType.File, 10), (pafs.FileType.NotFound, None)]
    found.copy_file(f"{path}/made/a", f"{path}/made/b")
    found.move(f"{path}/made/b", f"{path}/made/c")
    pafs.copy_files(f"{path}/made", str(tmp_path / "got"), source_filesystem=found)
    assert sorted(file.name for file in (tmp_path / "got").iterdir() if file.is_file()) == ["a", "c"]
    (tmp_path / "got" / "sub").mkdir()
    (tmp_path / "got" / "sub" / "d").write_bytes(b"d")
    pafs.copy_files(str(tmp_path / "got"), f"{path}/back", destination_filesystem=found)
    selected = found.get_file_info(pafs.FileSelector(f"{path}/back", recursive=True))
    assert {info.path.removeprefix(f"{path}/back/") for info in selected if info.is_file} == {"a", "c", "sub/d"}
    found.delete_file(f"{path}/back/a")
    found.delete_dir_contents(f"{path}/back")
    found.delete_dir(f"{path}/made")
    assert found.get_file_info(f"{path}/made").type == pafs.FileType.NotFound
    with pytest.raises(NotImplementedError):
        found.open_append_stream(f"{path}/x")


def test_numpy_writes_archives(artifacts: ArtifactFileSystem, run_root: str) -> None:
    with artifacts.open(f"{run_root}/arrays.npz", "wb") as file:
        np.savez(file, x=np.arange(10), y=np.eye(300))
    with artifacts.open(f"{run_root}/arrays.npz") as file, np.load(file) as arrays:
        assert arrays["x"].tolist() == list(range(10))
        assert arrays["y"].sum() == 300


def test_pytorch_saves_and_loads(run_root: str) -> None:
    torch = pytest.importorskip("torch")
    state = {"weights": torch.arange(3_000_000, dtype=torch.float32), "epoch": 3}
    with fsspec.open(f"mlplat://{run_root}/model.pt", "wb") as file:
        torch.save(state, file)
    with fsspec.open(f"mlplat://{run_root}/model.pt") as file:
        loaded = torch.load(file)
    assert loaded["epoch"] == 3
    assert torch.equal(loaded["weights"], state["weights"])


async def test_a_platform_that_falters_is_tried_again(served: Served, tmp_path: Path) -> None:
    def code() -> None:
        files = ArtifactFileSystem()
        run_id = files._client.post("/api/2.0/mlflow/runs/create", {"experiment_id": "0"})["run"]["info"]["run_id"]
        body, path = bytes(3_000_000), f"{run_id}/f"
        served.moods = ["refuses", "ok", "breaks", "refuses"]  # the run is looked up, and then the file is sent
        with files.open(path, "wb") as file:
            file.write(body)
        served.moods = ["refuses", "ok", "breaks"]
        with files.open(path) as file:
            assert file.read() == body
        served.moods = ["refuses", "breaks"]
        into = io.BytesIO()
        files.get_file(path, into)
        assert into.getvalue() == body
        served.moods = ["breaks"]
        files.get_file(path, tmp_path / "f")
        assert (tmp_path / "f").read_bytes() == body

    await user(code)
