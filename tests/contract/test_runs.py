"""Runs, params and tags in Postgres."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.errors import InvalidInput, NotFound
from mlplat.tracking.experiments import ExperimentStore
from mlplat.tracking.model import ATTEMPT_TAG, RUN_NAME_TAG, Run, RunStatus
from mlplat.tracking.runs import RunRef, RunStore

NOW = datetime(2025, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)


@pytest.fixture
async def experiment(engine: AsyncEngine) -> int:
    return await ExperimentStore(engine, "mlflow-artifacts:").create("experiment", None, {})


@pytest.fixture
def store(engine: AsyncEngine) -> RunStore:
    return RunStore(engine)


async def _new(store: RunStore, experiment: int, run_id: str = "r1", name: str | None = "first", **tags: str) -> Run:
    return await store.create(run_id, experiment, name, "ann", NOW, tags)


async def test_a_new_run_is_running_and_read_as_it_was_answered(store: RunStore, experiment: int) -> None:
    created = await _new(store, experiment, color="red")
    assert created == Run(
        "r1", experiment, "first", RunStatus.RUNNING, "ann", f"mlflow-artifacts:/{experiment}/r1/artifacts",
        False, NOW, None, {}, {"color": "red", RUN_NAME_TAG: "first"},
    )  # fmt: skip
    assert await store.get("r1") == created


async def test_creating_again_under_the_same_id_gives_the_run_that_is_there(store: RunStore, experiment: int) -> None:
    await _new(store, experiment, color="red")
    await store.log("r1", {"p": "1"}, {})
    again = await store.create(
        "r1", experiment, "second", "bob", NOW + timedelta(days=1), {"color": "blue", "new": "x"}
    )
    assert again == await store.get("r1")
    assert (again.name, again.user_id, again.started_at, again.params) == ("first", "ann", NOW, {"p": "1"})
    assert again.tags == {"color": "red", RUN_NAME_TAG: "first"}


async def test_concurrent_creators_under_one_id_get_the_same_run(store: RunStore, experiment: int) -> None:
    runs = await asyncio.gather(*(_new(store, experiment, name=f"n{index}") for index in range(6)))
    stored = await store.get("r1")
    assert {run.run_id for run in runs} == {"r1"}
    assert {run.name for run in runs} == {stored.name}
    assert stored.tags == {RUN_NAME_TAG: stored.name}


async def test_a_run_without_a_name_gets_one_in_both_places(store: RunStore, experiment: int) -> None:
    for run_id, name in (("r1", None), ("r2", "")):
        run = await _new(store, experiment, run_id, name)
        assert run.name
        assert run.tags[RUN_NAME_TAG] == run.name
        assert await store.get(run_id) == run


async def test_a_name_tag_names_the_run(store: RunStore, experiment: int) -> None:
    run = await store.create("r1", experiment, None, "", NOW, {RUN_NAME_TAG: "by tag"})
    assert run.name == (await store.get("r1")).name == "by tag"
    same = await store.create("r2", experiment, "both", "", NOW, {RUN_NAME_TAG: "both"})
    assert same.name == "both"


async def test_a_name_that_differs_from_the_name_tag_is_refused(store: RunStore, experiment: int) -> None:
    with pytest.raises(InvalidInput, match="different values"):
        await store.create("r1", experiment, "one", "", NOW, {RUN_NAME_TAG: "two"})
    with pytest.raises(NotFound):
        await store.get("r1")


async def test_a_run_needs_an_active_experiment(store: RunStore, engine: AsyncEngine, experiment: int) -> None:
    with pytest.raises(NotFound, match="No Experiment with id=99 exists"):
        await _new(store, 99)
    await ExperimentStore(engine, "x").set_deleted(experiment, True)
    with pytest.raises(InvalidInput, match="must be in the 'active' state"):
        await _new(store, experiment)


async def test_a_malformed_tag_creates_no_run(store: RunStore, experiment: int) -> None:
    with pytest.raises(InvalidInput):
        await store.create("r1", experiment, "a", "", NOW, {"/abs": "x"})
    with pytest.raises(NotFound):
        await store.get("r1")


async def test_unknown_runs_are_not_found(store: RunStore) -> None:
    for call in (
        store.get("nope"),
        store.update("nope", RunStatus.FAILED, None, None),
        store.set_deleted("nope", True),
        store.log("nope", {"a": "1"}, {}),
        store.delete_tag("nope", "a"),
    ):
        with pytest.raises(NotFound, match="Run with id=nope not found"):
            await call


async def test_update_changes_what_is_given_and_nothing_else(store: RunStore, experiment: int) -> None:
    await _new(store, experiment)
    ended = NOW + timedelta(hours=1)
    assert (await store.update("r1", None, None, None)) == await store.get("r1")
    run = await store.update("r1", RunStatus.FINISHED, None, None)
    assert (run.status, run.ended_at, run.name) == (RunStatus.FINISHED, None, "first")
    run = await store.update("r1", None, ended, None)
    assert (run.status, run.ended_at, run.name) == (RunStatus.FINISHED, ended, "first")
    run = await store.update("r1", RunStatus.RUNNING, None, "")
    assert (run.status, run.ended_at, run.name) == (RunStatus.RUNNING, None, "first")
    assert await store.get("r1") == run


async def test_renaming_moves_the_tag_and_setting_the_tag_renames(store: RunStore, experiment: int) -> None:
    await _new(store, experiment)
    renamed = await store.update("r1", None, None, "second")
    assert (renamed.name, renamed.tags[RUN_NAME_TAG]) == ("second", "second")
    await store.log("r1", {}, {RUN_NAME_TAG: "third", "other": "x"})
    run = await store.get("r1")
    assert (run.name, run.tags[RUN_NAME_TAG], run.tags["other"]) == ("third", "third", "x")


async def test_a_param_is_written_once(store: RunStore, experiment: int) -> None:
    await _new(store, experiment)
    assert await store.log("r1", {"lr": "0.1", "empty": ""}, {}) == RunRef("r1", experiment)
    await store.log("r1", {"lr": "0.1", "empty": ""}, {})
    with pytest.raises(InvalidInput, match=r"Changing param values is not allowed.*'lr'.*'0.1'.*'0.2'"):
        await store.log("r1", {"lr": "0.2"}, {})
    assert (await store.get("r1")).params == {"lr": "0.1", "empty": ""}


async def test_a_changed_param_writes_nothing_of_its_call(store: RunStore, experiment: int) -> None:
    await _new(store, experiment)
    await store.log("r1", {"lr": "0.1"}, {})
    with pytest.raises(InvalidInput):
        await store.log("r1", {"new": "1", "lr": "0.2"}, {"tag": "x", RUN_NAME_TAG: "renamed"})
    run = await store.get("r1")
    assert (run.params, run.name, run.tags) == ({"lr": "0.1"}, "first", {RUN_NAME_TAG: "first"})


async def test_of_concurrent_writers_of_one_param_one_wins(store: RunStore, experiment: int) -> None:
    await _new(store, experiment)
    answers = await asyncio.gather(
        *(store.log("r1", {"lr": str(index)}, {"winner": str(index)}) for index in range(6)), return_exceptions=True
    )
    won = [index for index, answer in enumerate(answers) if isinstance(answer, RunRef)]
    assert len(won) == 1
    assert sum(isinstance(answer, InvalidInput) for answer in answers) == 5
    run = await store.get("r1")
    assert (run.params["lr"], run.tags["winner"]) == (str(won[0]), str(won[0]))


async def test_params_of_one_run_say_nothing_about_another(store: RunStore, experiment: int) -> None:
    await _new(store, experiment, "r1")
    await _new(store, experiment, "r2")
    await store.log("r1", {"lr": "1"}, {"t": "1"})
    await store.log("r2", {"lr": "2"}, {"t": "2"})
    assert ((await store.get("r1")).params, (await store.get("r2")).params) == ({"lr": "1"}, {"lr": "2"})


async def test_the_last_value_of_a_tag_counts_and_long_ones_are_cut(store: RunStore, experiment: int) -> None:
    await _new(store, experiment)
    await store.log("r1", {}, {"a": "1", "long": "ä" * 9_000})
    await store.log("r1", {}, {"a": "2"})
    run = await store.get("r1")
    assert (run.tags["a"], run.tags["long"]) == ("2", "ä" * 8_000)


async def test_a_tag_is_removed_once(store: RunStore, experiment: int) -> None:
    await _new(store, experiment, a="1")
    await store.delete_tag("r1", "a")
    assert "a" not in (await store.get("r1")).tags
    with pytest.raises(NotFound, match="No tag with name: a in run with id r1"):
        await store.delete_tag("r1", "a")


async def test_a_deleted_run_is_readable_and_refuses_writes(store: RunStore, experiment: int) -> None:
    await _new(store, experiment, a="1")
    await store.log("r1", {"p": "1"}, {})
    before = await store.get("r1")
    await store.set_deleted("r1", True)
    await store.set_deleted("r1", True)
    for call in (
        store.log("r1", {"p": "1"}, {}),
        store.log("r1", {}, {"a": "2"}),
        store.delete_tag("r1", "a"),
        store.update("r1", RunStatus.FAILED, NOW, "x"),
    ):
        with pytest.raises(InvalidInput, match="The run r1 must be in the 'active' state"):
            await call
    deleted = await store.get("r1")
    assert deleted.deleted
    await store.set_deleted("r1", False)
    assert await store.get("r1") == before


async def test_the_runs_of_a_dead_attempt_are_killed_and_no_others(store: RunStore, experiment: int) -> None:
    label = "run/train/-1/1"
    for run_id, tag in (("a", label), ("b", label), ("done", label), ("c", "run/train/-1/11"), ("d", "run/train/-1/2")):
        await store.create(run_id, experiment, None, "", NOW, {ATTEMPT_TAG: tag})
    await _new(store, experiment, "untagged")
    await store.update("done", RunStatus.FINISHED, NOW, None)
    assert await store.kill_of_attempt(label) == 2
    found = {run_id: await store.get(run_id) for run_id in ("a", "b", "c", "d", "done", "untagged")}
    assert [run_id for run_id, run in found.items() if run.status is RunStatus.KILLED] == ["a", "b"]
    assert found["a"].ended_at is not None
    assert (found["done"].status, found["done"].ended_at) == (RunStatus.FINISHED, NOW)
    assert await store.kill_of_attempt(label) == 0


@pytest.mark.parametrize(
    "value", ["'; DROP TABLE run; --", "%s {x} :y $1", "emoji 🧪 \u2028", "back\\slash", "a\nb\tc"]
)
async def test_hostile_text_is_kept_as_it_is(store: RunStore, experiment: int, value: str) -> None:
    await store.create(f"id {value}", experiment, value, value, NOW, {"tag": value})
    await store.log(f"id {value}", {"param": value}, {})
    run = await store.get(f"id {value}")
    assert (run.name, run.user_id, run.tags["tag"], run.params["param"]) == (value,) * 4
