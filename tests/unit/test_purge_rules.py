"""What a purge may take: ages, folders and who needs them."""

from __future__ import annotations

from datetime import timedelta

import pytest

from mlplat.errors import InvalidInput
from mlplat.tally import human_bytes
from mlplat.tracking.purge import DeletedRun, Holders, Kept, parse_age, run_folder, split


@pytest.mark.parametrize(
    ("text", "age"),
    [
        ("0s", timedelta(0)),
        ("90s", timedelta(seconds=90)),
        ("45m", timedelta(minutes=45)),
        ("12h", timedelta(hours=12)),
        ("30d", timedelta(days=30)),
        ("2w", timedelta(weeks=2)),
        ("1d12h", timedelta(hours=36)),
    ],
)
def test_ages(text: str, age: timedelta) -> None:
    assert parse_age(text) == age


@pytest.mark.parametrize(
    "text", ["", "30", "d", "-1d", "1.5h", "30 d", "1y", "30d ", "٣d", "999999999w", "9" * 30 + "s", "1d\n"]
)
def test_what_is_no_age(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_age(text)


def _run(run_id: str, uri: str) -> DeletedRun:
    return DeletedRun(run_id, 1, uri)


def test_runs_stay_whose_artifacts_a_version_uses() -> None:
    holders = Holders([("model version m 3", "mlflow-artifacts:/1/a/artifacts/model/")])
    runs = [
        _run("a", "mlflow-artifacts:/1/a/artifacts"),
        _run("ab", "mlflow-artifacts:/1/a/artifacts/mod"),  # a prefix of the text, not of the path
        _run("b", "mlflow-artifacts:/1/b/artifacts"),
    ]
    taken, kept = split(runs, holders)
    assert [run.run_id for run in taken] == ["ab", "b"]
    assert kept == [Kept("run", "a", "model version m 3 uses its artifacts")]


def test_a_version_holds_its_own_folder_and_those_above() -> None:
    holders = Holders([("v", "mlflow-artifacts:/1/a/artifacts/model")])
    assert holders.of("mlflow-artifacts:/1/a/artifacts/model") == "v"
    assert holders.of("mlflow-artifacts:/1") == "v"
    assert holders.of("mlflow-artifacts:/1/a/artifacts/model/data") is None
    assert holders.of("mlflow-artifacts:/2") is None


@pytest.mark.parametrize(
    ("path", "folder"),
    [("1/a/artifacts", "1/a"), ("x/y/a/artifacts", "x/y/a"), ("1/other/artifacts", "1/other/artifacts"), ("1", "1")],
)
def test_the_folder_of_a_run(path: str, folder: str) -> None:
    assert run_folder(path, "a") == folder


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 1024**3 // 2, "2.5 GiB")]
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert human_bytes(count) == text
