"""Rich values as bytes, with the real libraries."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image

from mlplat.errors import InvalidInput
from mlplat.sdk import media

mpl.use("agg")
ROWS = [{"a": 1, "b": "x"}, {"a": 2, "c": 0.5}]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (ROWS, {"a": [1, 2], "b": ["x", None], "c": [None, 0.5]}),
        ({"a": [1, 2], "b": np.array([1.5, 2.5])}, {"a": [1, 2], "b": [1.5, 2.5]}),
        (pd.DataFrame({"a": [1, 2], "b": ["x", "ü"]}), {"a": [1, 2], "b": ["x", "ü"]}),
        (pa.table({"a": [1]}), {"a": [1]}),
        (pa.record_batch({"a": [1]}), {"a": [1]}),
        ([], {}),
    ],
)
def test_tables_survive_parquet(data: Any, expected: dict[str, list[Any]]) -> None:
    body = media.parquet_bytes(media.as_table(data))
    assert pq.read_table(io.BytesIO(body)).to_pydict() == expected


@pytest.mark.parametrize("data", [7, "text", [1, 2], [{"a": 1}, {"a": "x"}], {"a": [1], "b": [1, 2]}, None, {"a": 5}])
def test_what_is_no_table_is_refused(data: Any) -> None:
    with pytest.raises(InvalidInput, match="not a table"):
        media.as_table(data)


def test_a_column_that_parquet_cannot_hold_is_refused() -> None:
    union = pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])])
    with pytest.raises(InvalidInput, match="Parquet"):
        media.parquet_bytes(pa.table({"u": union}))


def test_table_paths() -> None:
    assert media.table_path("predictions", None) == "tables/predictions/table.parquet"
    assert media.table_path("val/predictions", 12) == "tables/val/predictions/000000000012.parquet"
    for name in ("", " ", "../x", "/x", "a//b", "a/", "."):
        with pytest.raises(InvalidInput):
            media.table_path(name, None)
    with pytest.raises(InvalidInput, match="negative"):
        media.table_path("x", -1)


def test_the_list_of_tables_fits_into_its_tag() -> None:
    assert json.loads(media.logged_tables({"a": "tables/a"})) == [{"path": "tables/a", "type": "table"}]
    many = media.logged_tables({str(n): f"tables/{n}" for n in range(1_000)})
    assert len(many) <= 8_000
    assert json.loads(many)[0]["path"] == "tables/0"


def test_documents() -> None:
    value = {"n": np.int64(3), "a": np.array([1.5]), "s": {2, 1}, "t": datetime(2025, 1, 2, tzinfo=UTC), "p": Path("x")}
    assert json.loads(media.document_bytes(value, "x.json")) == {
        "n": 3, "a": [1.5], "s": [1, 2], "t": "2025-01-02T00:00:00+00:00", "p": "x",
    }  # fmt: skip
    assert yaml.safe_load(media.document_bytes({"b": [1], "ä": "ü"}, "x.yml")) == {"b": [1], "ä": "ü"}


@pytest.mark.parametrize(("value", "path"), [({"f": print}, "x.json"), ({"f": print}, "x.yaml"), ({1: {}}, "noending")])
def test_bad_documents_are_refused(value: Any, path: str) -> None:
    with pytest.raises(InvalidInput):
        media.document_bytes(value, path)


def test_a_document_that_holds_itself_is_refused() -> None:
    value: dict[str, Any] = {}
    value["self"] = value
    with pytest.raises(InvalidInput):
        media.document_bytes(value, "x.json")


def test_matplotlib_figures() -> None:
    figure = Figure()
    figure.subplots().plot([1, 2, 3])
    assert media.figure_bytes(figure, "plot.png").startswith(b"\x89PNG")
    assert b"<svg" in media.figure_bytes(figure, "a/plot.SVG")
    assert media.figure_bytes(figure, "plot.pdf").startswith(b"%PDF")
    with pytest.raises(InvalidInput, match=r"plot\.nonsense"):
        media.figure_bytes(figure, "plot.nonsense")
    with pytest.raises(InvalidInput, match="ending"):
        media.figure_bytes(figure, "plot")
    with pytest.raises(InvalidInput, match="not a figure"):
        media.figure_bytes([1], "plot.png")


@pytest.mark.parametrize(
    ("array", "mode"),
    [
        (np.arange(12, dtype=np.uint8).reshape(3, 4), "L"),
        (np.arange(12, dtype=np.uint8).reshape(3, 4, 1), "L"),
        (np.arange(36, dtype=np.uint8).reshape(3, 4, 3), "RGB"),
        (np.arange(48, dtype=np.uint8).reshape(3, 4, 4), "RGBA"),
        (np.arange(48, dtype=np.uint8).reshape(4, 3, 4).transpose(1, 0, 2), "RGBA"),
    ],
)
def test_arrays_become_images(array: Any, mode: str) -> None:
    image = Image.open(io.BytesIO(media.image_bytes(array, "x.png")))
    assert (image.mode, image.size) == (mode, (4, 3))
    assert np.array_equal(np.asarray(image).reshape(array.shape), array)


def test_floats_and_bools_are_scaled() -> None:
    image = Image.open(io.BytesIO(media.image_bytes(np.array([[0.0, 0.5, 1.0]]), "x.png")))
    assert list(np.asarray(image)[0]) == [0, 128, 255]
    image = Image.open(io.BytesIO(media.image_bytes(np.array([[True, False]]), "x.png")))
    assert list(np.asarray(image)[0]) == [255, 0]


def test_images_of_pil() -> None:
    image = Image.new("RGB", (4, 3), "red")
    assert Image.open(io.BytesIO(media.image_bytes(image, "x.jpg"))).format == "JPEG"
    with pytest.raises(InvalidInput, match=r"x\.nonsense"):
        media.image_bytes(image, "x.nonsense")


@pytest.mark.parametrize(
    "image",
    [
        np.array([[2.0]]),
        np.array([[float("nan")]]),
        np.zeros((2, 2, 2), np.uint8),
        np.zeros(3, np.uint8),
        np.zeros((0, 3), np.uint8),
        np.zeros((2, 2), np.int64),
        "x.png",
        None,
    ],
)
def test_what_is_no_image_is_refused(image: Any) -> None:
    with pytest.raises(InvalidInput):
        media.image_bytes(image, "x.png")


def test_arrays_are_png_only() -> None:
    with pytest.raises(InvalidInput, match=r"written as \.png"):
        media.image_bytes(np.zeros((2, 2), np.uint8), "x.jpg")
