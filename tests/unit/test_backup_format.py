"""The format of a backup, and which one is chosen."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest

from mlplat.backup.catalog import place_url
from mlplat.backup.model import (
    FORMAT,
    INDEX,
    VERSION,
    Artifact,
    Backup,
    BlobName,
    DumpedSequence,
    DumpedTable,
    DumpFile,
    backup_name,
    blob_name,
    choose,
    is_backup_name,
    parse_artifact,
    parse_at,
    parse_backup,
)
from mlplat.errors import InvalidInput

SHA = "0123456789abcdef" * 4
FILE = DumpFile(SHA, 3)
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


def backup(taken_at: datetime = NOON, **changes: Any) -> Backup:
    made = Backup(
        format=FORMAT, version=VERSION, name=backup_name(taken_at), schema="0016", platform="0.1.0", taken_at=taken_at,
        finished_at=taken_at, transactions=800, tables=[DumpedTable("run", ["run_id", "name"], 2)],
        sequences=[DumpedSequence("dataset", "dataset_id", 7, True)], points=5, artifacts=3, artifact_bytes=30,
        copied_bytes=10, files={"postgres/run.copy.zst": FILE, "metrics/00000.parquet": FILE, INDEX: FILE},
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def test_a_backup_is_read_as_it_was_written() -> None:
    made = backup()
    assert parse_backup(msgspec.json.encode(made), made.name) == made
    assert (made.rows, made.rows_of("run"), made.rows_of("nothing"), made.dump_bytes) == (2, 2, 0, 9)
    assert made.points_files == ["metrics/00000.parquet"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format": "zip"}, "format 'zip' 1 is not known here"),
        ({"version": 2}, "mlplat-backup' 2 is not known here"),
        ({"name": "20250101T000000.000000Z"}, "is of backup '20250101"),
        ({"tables": [DumpedTable("run; DROP TABLE run", [], 0)]}, "is no name of a table"),
        ({"tables": [DumpedTable("run", ['a"b'], 0)]}, "is no name of a table"),
        ({"sequences": [DumpedSequence("run", "a b", 1, True)]}, "is no name of a table"),
        ({"tables": [DumpedTable("run", ["run_id"], 0), DumpedTable("other", [], 0)]}, "does not list postgres/other"),
        ({"files": {"postgres/run.copy.zst": FILE}}, f"does not list {INDEX}"),
        ({"files": {"../run": FILE, "postgres/run.copy.zst": FILE, INDEX: FILE}}, r"may not have the name '\.\./run'"),
        ({"files": {"postgres/run.copy.zst": DumpFile("x", 1), INDEX: FILE}}, "is malformed"),
    ],
)
def test_what_is_no_backup_is_refused(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(InvalidInput, match=expected):
        parse_backup(msgspec.json.encode(backup(**changes)), backup().name)


@pytest.mark.parametrize("body", [b"", b"{}", b"\xff", b'{"format": "mlplat-backup"', b"[" * 2_000])
def test_a_damaged_backup_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidInput, match=r"backup\.json is damaged"):
        parse_backup(body, backup().name)


def test_names_are_in_the_order_of_time() -> None:
    moments = [NOON + timedelta(microseconds=number * 999_983) for number in range(5)]
    names = [backup_name(moment.astimezone(timezone(timedelta(hours=5)))) for moment in moments]
    assert names == sorted(set(names))
    assert names[0] == "20260131T120000.000000Z"
    assert all(map(is_backup_name, names))
    assert not any(map(is_backup_name, ["artifacts", "", "20260131", f"{names[0]}x", f"{names[0]}/x"]))


BACKUPS = {
    each.name: each for each in (backup(NOON), backup(NOON + timedelta(hours=1)), backup(NOON - timedelta(days=1)))
}
BROKEN = backup_name(NOON + timedelta(hours=2))


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (None, NOON + timedelta(hours=1)),
        (NOON, NOON),
        (NOON + timedelta(minutes=59), NOON),
        (NOON + timedelta(days=9), NOON + timedelta(hours=1)),
        (NOON - timedelta(seconds=1), NOON - timedelta(days=1)),
        (backup_name(NOON), NOON),
    ],
)
def test_the_last_complete_backup_until_then_is_chosen(at: datetime | str | None, expected: datetime) -> None:
    assert choose({**BACKUPS, BROKEN: None}, at).taken_at == expected


@pytest.mark.parametrize(
    ("backups", "at", "expected"),
    [
        ({}, None, "there is no complete backup$"),
        ({BROKEN: None}, None, f"there is no complete backup, only {BROKEN}"),
        ({BROKEN: None}, BROKEN, "is incomplete"),
        (BACKUPS, NOON - timedelta(days=2), "so old; the first is 20260130"),
        (BACKUPS, BROKEN, "there is no backup 20260131T14"),
    ],
)
def test_there_may_be_nothing_to_choose(
    backups: dict[str, Backup | None], at: datetime | str | None, expected: str
) -> None:
    with pytest.raises(InvalidInput, match=expected):
        choose(backups, at)


def test_at_is_a_name_or_a_time() -> None:
    assert parse_at("20260131T120000.000000Z") == "20260131T120000.000000Z"
    assert parse_at("2026-01-31T12:00+00:00") == NOON
    assert parse_at("2026-01-31T12:00") == datetime(2026, 1, 31, 12).astimezone(UTC)
    for text in ("", "yesterday", "2026-13-01", "0001-01-01T00:00+23:00"):
        with pytest.raises(InvalidInput, match="--at"):
            parse_at(text)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (f".blobs/01/{SHA}", BlobName(SHA, False)),
        (f".blobs/01/{SHA}.zst", BlobName(SHA, True)),
        (f".blobs/01/{SHA}.4", BlobName(SHA, False)),
        (f".blobs/01/{SHA}.zst.12", BlobName(SHA, True)),
        (f".blobs/01/{SHA}.12.zst", BlobName(SHA, True)),
        (f".blobs/{SHA}", BlobName(SHA, False)),
        (f".blobs/01/{SHA}.gz", None),
        (f".blobs/01/{SHA}0", None),
        (f".blobs/01/{SHA[:-1]}", None),
        (f".blobs/01/{SHA}.zst.zst", None),
        (f".blobs/01/{SHA}\n", None),
        (f"1/run/{SHA}", None),
    ],
)
def test_blobs_say_by_their_names_what_they_are(key: str, expected: BlobName | None) -> None:
    assert blob_name(key) == expected


def test_lines_of_the_index() -> None:
    for artifact in (Artifact("a/é\n", 3, SHA), Artifact(f".blobs/01/{SHA}", 3, None)):
        line = msgspec.json.encode(artifact)
        assert b"\n" not in line
        assert parse_artifact(line) == artifact
    assert Artifact("a", 3, SHA).place == f"artifacts/files/01/{SHA}"
    assert Artifact(f".blobs/01/{SHA}", 3, None).place == f"artifacts/blobs/01/{SHA}"


@pytest.mark.parametrize(
    "line",
    [
        b"", b"{}", b'["a"]', b'["a",1,"xyz"]', b'["a",1,null]', b'["../a",1,"%s"]' % SHA.encode(),
        b'["a",-1,"%s"]' % SHA.encode(), b'["",1,"%s"]' % SHA.encode(), b'["/etc/passwd",1,"%s"]' % SHA.encode(),
        b'[".blobs/../%s",1,null]' % SHA.encode(),
    ],
)  # fmt: skip
def test_damaged_lines_of_the_index_are_refused(line: bytes) -> None:
    with pytest.raises(InvalidInput, match="damaged line"):
        parse_artifact(line)


def test_places_are_folders_or_buckets(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert place_url("some/folder") == f"file://{tmp_path}/some/folder"
    assert place_url("/a b%20c#d") == "file:///a b%20c#d"
    assert place_url("s3://bucket/x") == "s3://bucket/x"
    for text in ("http://x/y", "gs://x", "file://relative"):
        with pytest.raises(InvalidInput, match="a folder or at s3"):
            place_url(text)
