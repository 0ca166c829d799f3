"""Backups of whole installations, restored into servers by URL: what must be empty, and what a failure leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from cluster.restoring import restore
from cluster.unfinished import MARKER, begin, read_marker, require_finished, write_marker
from mlplat.backup.catalog import find_backups, open_place, verify
from mlplat.backup.connection import connected
from mlplat.backup.model import MANIFEST, Backup
from mlplat.backup.rows import has_rows, lock_removals
from mlplat.backup.taking import take_backup
from mlplat.backup.tree import Tree
from mlplat.errors import BringUpError, Corrupted, InvalidInput, Overloaded, Unavailable
from mlplat.metrics.model import Point
from mlplat.metrics.queries import Statement
from mlplat.metrics.store import MetricStore
from mlplat.settings import PlatformConfig, Settings
from tests.clickhouse import ClickHouse
from tests.contract.chdb import chdb_url, stored, unique
from tests.contract.every_table import contents, fill
from tests.databases import Databases

ARTIFACT = "1/run/artifacts/model.pkl"


@pytest.fixture
def config(database_url: str, tmp_path: Path) -> PlatformConfig:
    """An installation with rows in all tables, points and an artifact."""
    fill(database_url)
    folder = tmp_path / "artifacts"
    (folder / ARTIFACT).parent.mkdir(parents=True)
    (folder / ARTIFACT).write_bytes(b"weights")
    config = PlatformConfig(str(tmp_path / "state"), database_url, chdb_url(), f"file://{folder}", "http://127.0.0.1:1")
    with connected(database_url, "tests") as connection:
        run_id, experiment_id = connection.execute("SELECT run_id, experiment_id FROM run LIMIT 1").fetchone() or (
            "",
            0,
        )
    MetricStore(chdb_url()).insert(stored(experiment_id, run_id, [Point("loss", 0.5, 1, step) for step in range(9)]))
    return config


@pytest.fixture
def place(tmp_path: Path) -> Tree:
    return open_place(f"file://{tmp_path}/backups")


@pytest.fixture
def settings(databases: Databases, clickhouse: ClickHouse, tmp_path: Path) -> Iterator[Settings]:
    """Servers by URL, in which there is nothing."""
    state = tmp_path / "new-state"
    state.mkdir()
    with databases.empty() as url:
        yield Settings(
            state_dir=state,
            postgres_url=url,
            clickhouse_url=f"{clickhouse.url}/{unique('whole').replace('-', '_')}",
            artifacts_url=f"file://{tmp_path}/new-artifacts",
        )


def take(config: PlatformConfig, place: Tree) -> Backup:
    return take_backup(config, "0.1.0", MetricStore(config.clickhouse_url).query, place)


def put_back(settings: Settings, place: Tree, **options: object) -> Backup:
    return restore(settings, place.url, None, skip_damaged=False, **options)[0]  # type: ignore[arg-type]  # as they are


def points(settings: Settings) -> int:
    store = MetricStore(settings.config.clickhouse_url)
    return int(store.query(Statement("SELECT count() AS n FROM metric_points"))["n"][0].as_py())


def fail_at(what: str) -> Callable[[str, int, int | None], None]:
    def tally(told: str, _done: int, _total: int | None) -> None:
        if told == what:
            raise KeyboardInterrupt

    return tally


def test_an_installation_moves_to_servers(config: PlatformConfig, place: Tree, settings: Settings) -> None:
    made = take(config, place)
    assert (made.points, made.artifacts) == (9, 1)
    assert verify(place, made) == []
    before = contents(config.postgres_url)
    assert put_back(settings, place) == made
    after = contents(settings.config.postgres_url)
    assert {name: len(rows) for name, rows in after.items()} == {name: len(rows) for name, rows in before.items()}
    assert after["run"] == before["run"]
    assert points(settings) == 9
    assert (Path(settings.config.artifacts_url.removeprefix("file://")) / ARTIFACT).read_bytes() == b"weights"
    require_finished(settings.state_dir)
    with pytest.raises(BringUpError, match="MLPLAT_POSTGRES_URL has rows in"):
        put_back(settings, place)


@pytest.mark.parametrize("what", ["artifacts", "points", "rows"])
def test_a_restore_that_broke_off_is_finished_by_running_it_again(
    config: PlatformConfig, place: Tree, settings: Settings, what: str
) -> None:
    take(config, place)
    with pytest.raises(KeyboardInterrupt):
        put_back(settings, place, tally=fail_at(what))
    with pytest.raises(
        BringUpError, match="a restore has begun and has not been finished; run it again: mlplat restore"
    ):
        require_finished(settings.state_dir)
    with connected(settings.config.postgres_url, "tests") as connection:
        assert has_rows(connection) is None
    put_back(settings, place)
    require_finished(settings.state_dir)
    assert points(settings) == 9
    assert contents(settings.config.postgres_url)["run"] == contents(config.postgres_url)["run"]


def test_a_restore_that_has_only_its_marker_left_does_nothing_twice(
    config: PlatformConfig, place: Tree, settings: Settings
) -> None:
    take(config, place)
    marker: list[str] = []

    def keep_marker(_what: str, _done: int, _total: int | None) -> None:
        if (settings.state_dir / MARKER).exists():
            marker[:] = [(settings.state_dir / MARKER).read_text()]

    put_back(settings, place, tally=keep_marker)
    (settings.state_dir / MARKER).write_text(marker[0])
    put_back(settings, place, tally=lambda what, *_: pytest.fail(what) if what in {"rows", "points"} else None)
    assert read_marker(settings.state_dir) is None


def test_another_backup_may_be_taken_for_one_that_failed(
    config: PlatformConfig, place: Tree, settings: Settings
) -> None:
    good = take(config, place)
    (Path(config.artifacts_url.removeprefix("file://")) / ARTIFACT).write_bytes(b"retrained")
    bad = take(config, place)
    [damaged] = [key for key, size in place.sizes("artifacts").items() if size == len(b"retrained")]
    with place.writing(damaged) as sink:
        sink.write(b"RETRAINED")
    with pytest.raises(Corrupted, match=damaged):
        put_back(settings, place)
    made, left_out = restore(settings, place.url, good.name, skip_damaged=False)
    assert (made, left_out) == (good, [])
    assert bad.name != good.name
    assert points(settings) == 9


def test_damaged_artifacts_may_be_left_out(config: PlatformConfig, place: Tree, settings: Settings) -> None:
    take(config, place)
    [only] = place.sizes("artifacts")
    place.delete(only)
    made, left_out = restore(settings, place.url, None, skip_damaged=True)
    assert (made.artifacts, left_out) == (1, [f"{only} is missing"])


def test_unfinished_work_is_not_continued_elsewhere(config: PlatformConfig, place: Tree, settings: Settings) -> None:
    made = take(config, place)
    write_marker(settings.state_dir, begin(replace(config, artifacts_url="file:///elsewhere"), place.url, made.name))
    with pytest.raises(BringUpError, match="has not been finished, and the settings say"):
        put_back(settings, place)
    (settings.state_dir / MARKER).write_text("{}")
    with pytest.raises(BringUpError, match="is damaged"):
        put_back(settings, place)


def test_each_store_must_be_empty(config: PlatformConfig, place: Tree, settings: Settings) -> None:
    take(config, place)
    folder = Path(settings.config.artifacts_url.removeprefix("file://"))
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "c").write_bytes(b"x")
    with pytest.raises(BringUpError, match="there are artifacts at file://"):
        put_back(settings, place)
    (folder / "a" / "b" / "c").unlink()
    store = MetricStore(settings.config.clickhouse_url)
    store.create_tables()
    store.insert(stored(1, "run", [Point("loss", 1.0, 1, 1)]))
    with pytest.raises(BringUpError, match="MLPLAT_CLICKHOUSE_URL has metric points"):
        put_back(settings, place)
    assert read_marker(settings.state_dir) is None


def test_a_changed_dump_is_refused_before_anything_is_written(
    config: PlatformConfig, place: Tree, settings: Settings
) -> None:
    made = take(config, place)
    for name in ("postgres/run.copy.zst", made.points_files[0]):
        body = b"".join(place.read(f"{made.name}/{name}"))
        for changed in (body + b"x", body[:-1] + b"x"):
            with place.writing(f"{made.name}/{name}") as sink:
                sink.write(changed)
            with pytest.raises(InvalidInput, match=f"{name} is corrupt"):
                put_back(settings, place)
        place.delete(f"{made.name}/{name}")
        with pytest.raises(InvalidInput, match=f"{name} is missing"):
            put_back(settings, place)
        with place.writing(f"{made.name}/{name}") as sink:
            sink.write(body)
    assert read_marker(settings.state_dir) is None
    put_back(settings, place)


def test_purges_wait_for_a_backup_and_backups_for_a_purge(config: PlatformConfig, place: Tree) -> None:
    with connected(config.postgres_url, "tests") as connection:
        lock_removals(connection)
        with pytest.raises(Overloaded, match="a purge or another backup is under way"):
            take(config, place)
    assert find_backups(place) == {}


def test_a_backup_whose_metric_store_fails_is_none(config: PlatformConfig, place: Tree) -> None:
    def away(_statement: Statement) -> object:
        raise Unavailable("the metric store is away")

    with pytest.raises(Unavailable):
        take_backup(config, "0.1.0", away, place)
    [name] = find_backups(place)
    assert find_backups(place) == {name: None}
    made = take(config, place)
    assert find_backups(place) == {name: None, made.name: made}
    assert made.finished_at - made.taken_at < timedelta(minutes=10)
    assert (place.folder or Path()) / made.name / MANIFEST in (place.folder or Path()).rglob("*")
