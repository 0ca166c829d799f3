"""Run search against a reference: random runs, filters and orders, and plain Python that says what is right."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from mlplat.metrics.model import Point
from mlplat.metrics.store import MetricStore
from mlplat.tracking import run_search
from mlplat.tracking.experiments import ExperimentStore
from mlplat.tracking.model import RunStatus, ViewType, to_ms
from mlplat.tracking.run_search import search_runs
from mlplat.tracking.runs import RunStore
from tests.contract.chdb import stored, unique, unique_number
from tests.contract.test_run_search import Reader
from tests.databases import Databases

START = datetime(2025, 1, 1, tzinfo=UTC)
RUNS = 60
STATUSES = list(RunStatus)
NUMBERS = [0.0, 0.5, 0.5, 1.0, -2.0, math.nan, math.inf, -math.inf]
PARAMS = ["1", "0.5", "1e-3", "2", "x", "", "nan", "inf", "1_0", " 1", "0x1", "y" * 300, "12"]
NUMERIC_PARAMS = {"1": 1.0, "0.5": 0.5, "1e-3": 0.001, "2": 2.0, "inf": math.inf, "12": 12.0}
TAGS = ["red", "blue", "Red", "z" * 400, ""]


@dataclass(frozen=True)
class Known:
    """What the reference knows of one run."""

    run_id: str
    experiment: int
    deleted: bool
    started: int
    ended: int | None
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    #: Every value in the order of steps.
    metrics: dict[str, list[float]]


@dataclass(frozen=True)
class World:
    """The stores, and what is in them."""

    store: RunStore
    reader: Reader
    experiments: list[int]
    runs: list[Known]


@pytest.fixture(scope="module")
async def world(databases: Databases, metric_store: MetricStore) -> AsyncIterator[World]:
    """Random runs in two experiments, some of them deleted."""
    dice = random.Random(11)
    async with databases.open(pool_size=12) as engine:
        experiments, store = ExperimentStore(engine, "mlflow-artifacts:"), RunStore(engine)
        async with engine.begin() as connection:
            sequence = f"ALTER SEQUENCE experiment_experiment_id_seq RESTART WITH {unique_number()}"
            await connection.exec_driver_sql(sequence)
        numbers = [await experiments.create(name, None, {}) for name in ("one", "two")]
        runs = [await _make(dice, store, metric_store, numbers[number % 4 == 0], number) for number in range(RUNS)]
        yield World(store, Reader(metric_store), numbers, runs)


async def _make(dice: random.Random, store: RunStore, metrics: MetricStore, experiment: int, number: int) -> Known:
    run_id = unique("r")
    started = START + timedelta(seconds=number // 3)  # ties
    params = {key: dice.choice(PARAMS) for key in "pq" if dice.random() < 0.8}
    tags = {key: dice.choice(TAGS) for key in "tu" if dice.random() < 0.7}
    values = {key: [dice.choice(NUMBERS) for _ in range(dice.randint(1, 3))] for key in "abc" if dice.random() < 0.7}
    status, ended = dice.choice(STATUSES), started + timedelta(seconds=dice.randint(0, 3))
    await store.create(run_id, experiment, "name", "", started, tags)
    await store.log(run_id, params, {})
    has_ended = dice.random() < 0.6
    await store.update(run_id, status, ended if has_ended else None, None)
    for key, points in values.items():
        for step, value in enumerate(points):  # one insert each: the aggregates have to be merged
            metrics.insert(stored(experiment, run_id, [Point(key, value, 1, step)]))
    if deleted := dice.random() < 0.15:
        await store.set_deleted(run_id, True)
    ended_ms = to_ms(ended) if has_ended else None
    return Known(run_id, experiment, deleted, to_ms(started), ended_ms, status, params, tags, values)


def _aggregate(values: list[float] | None, name: str) -> float | None:
    if values is None:
        return None
    if name == "last":
        return values[-1]
    numbers = [value for value in values if not math.isnan(value)]
    return (min if name == "min" else max)(numbers) if numbers else math.nan


#: A truth of SQL's: None is unknown.
Truth = bool | None


def _comparison(dice: random.Random) -> tuple[str, Any]:
    """A comparison as text, and the function that says whether it holds for a run."""
    kind = dice.choice(["metric", "metric", "param", "number", "tag", "status", "end", "null"])
    numeric = dice.choice(["=", "!=", ">", ">=", "<", "<="])
    if kind == "metric":
        key, name, value = dice.choice("abcd"), dice.choice(["last", "min", "max"]), dice.choice([0.5, 1.0, 0.0, -1.0])
        left = f"metrics.{key}" if name == "last" else f"{name}(metrics.{key})"
        if dice.random() < 0.2:
            inside = dice.choice(["IN", "NOT IN"])
            return f"{left} {inside} ({value}, 1)", lambda run: _present(
                _aggregate(run.metrics.get(key), name), lambda found: (found in (value, 1.0)) == (inside == "IN")
            )
        return f"{left} {numeric} {value}", lambda run: _present(
            _aggregate(run.metrics.get(key), name), lambda found: _compare(found, numeric, value)
        )
    if kind == "number":
        key, value = dice.choice("pq"), dice.choice([1.0, 0.5, 2.0])
        return f"params.{key} {numeric} {value}", lambda run: _present(
            NUMERIC_PARAMS.get(run.params.get(key, "")), lambda found: _compare(found, numeric, value)
        )
    if kind in {"param", "tag"}:
        key, text = dice.choice("pqtu"), dice.choice(PARAMS + TAGS)
        entity, table = ("params", "params") if kind == "param" else ("tags", "tags")
        equal = dice.choice(["=", "!=", "IN", "NOT IN"])
        right = f"('{text}', '2')" if "IN" in equal else f"'{text}'"
        values = {text, "2"} if "IN" in equal else {text}
        return f"{entity}.{key} {equal} {right}", lambda run: _present(
            getattr(run, table).get(key), lambda found: (found in values) == (equal in {"=", "IN"})
        )
    if kind == "status":
        status = dice.choice(STATUSES)
        return f"status IN ('{status}', 'FAILED')", lambda run: run.status in {status, "FAILED"}
    if kind == "null":
        key = dice.choice("pq")
        return f"params.{key} IS NULL", lambda run: key not in run.params
    value = to_ms(START) + dice.randint(0, 20_000)
    return f"end_time {numeric} {value}", lambda run: None if run.ended is None else _compare(run.ended, numeric, value)


def _present(value: Any, test: Any) -> bool:
    return value is not None and bool(test(value))


def _compare(left: float, comparator: str, right: float) -> bool:
    return {"=": left == right, "!=": left != right, ">": left > right, ">=": left >= right, "<": left < right,
            "<=": left <= right}[comparator]  # fmt: skip


def _tree(dice: random.Random, depth: int) -> tuple[str, Any]:
    kind = dice.choice(["leaf", "and", "and", "or", "not"]) if depth else "leaf"
    if kind == "leaf":
        return _comparison(dice)
    text, test = _tree(dice, depth - 1)
    if kind == "not":
        return f"NOT ({text})", lambda run: None if test(run) is None else not test(run)
    other_text, other = _tree(dice, depth - 1)
    if kind == "and":
        return f"({text}) AND ({other_text})", lambda run: _and(test(run), other(run))
    return f"({text}) OR {other_text}", lambda run: _negate(_and(_negate(test(run)), _negate(other(run))))


def _negate(truth: Truth) -> Truth:
    return None if truth is None else not truth


def _and(left: Truth, right: Truth) -> Truth:
    if left is False or right is False:
        return False
    return None if left is None or right is None else True


def _sort_key(order: str) -> Any:
    """The key of one ``order_by``, for Python's sort."""
    name, _space, direction = order.rpartition(" ")
    sign = 1 if direction == "ASC" else -1

    def number(value: float | None) -> tuple[int, float]:
        if value is None:
            return 2, 0.0
        return (1, 0.0) if math.isnan(value) else (0, sign * value)

    if "metrics." in name:
        aggregate = name.partition("(")[0] if "(" in name else "last"
        return lambda run: number(_aggregate(run.metrics.get(name.rstrip(")")[-1]), aggregate))
    if name == "duration":
        return lambda run: number(None if run.ended is None else (run.ended - run.started) / 1000)
    return lambda run: _text(run.params.get("p") if name == "params.p" else run.status, sign)


def _text(value: str | None, sign: int) -> tuple[int, list[int]]:
    # The database sorts by bytes; the 300 marks the end, so that a prefix sorts first, or last when descending.
    return (1, []) if value is None else (0, [sign * (byte + 1) for byte in value.encode()] + [0])


ORDERS = ["metrics.a", "max(metrics.b)", "min(metrics.c)", "metrics.d", "params.p", "status", "duration"]


@pytest.mark.parametrize("slices", ["usual", "tiny", "tiny, never few"])
@pytest.mark.parametrize("seed", range(25))
async def test_search_agrees_with_the_reference_on_every_page(
    world: World, monkeypatch: pytest.MonkeyPatch, seed: int, slices: str
) -> None:
    if slices != "usual":
        monkeypatch.setattr(run_search, "FIRST_SLICE", 0)
        monkeypatch.setattr(run_search, "SLICE_GROWTH", 2)
    if slices == "tiny, never few":
        monkeypatch.setattr(run_search, "FEW", 0)
        monkeypatch.setattr(run_search, "MAX_PROBED", 0)
        monkeypatch.setattr(run_search, "MAX_TESTED", 12)
    dice = random.Random(seed)
    filter_text, test = _tree(dice, dice.randint(0, 3))
    orders = [f"{name} {dice.choice(['ASC', 'DESC'])}" for name in dice.sample(ORDERS, dice.randint(0, 2))]
    view = dice.choice([ViewType.ACTIVE_ONLY, ViewType.ACTIVE_ONLY, ViewType.ALL, ViewType.DELETED_ONLY])
    inside = dice.choice([world.experiments[:1], world.experiments])
    expected = [
        run
        for run in world.runs
        if test(run) and run.experiment in inside
        and (view is ViewType.ALL or run.deleted == (view is ViewType.DELETED_ONLY))
    ]  # fmt: skip
    expected.sort(key=lambda run: (*(_sort_key(order)(run) for order in orders), -run.started, run.run_id))
    seen: list[str] = []
    token: str | None = None
    size = dice.choice([1, 3, 7, 100]) if slices == "usual" else 3
    for _page in range(RUNS + 1):
        page = await search_runs(world.store, world.reader, inside, filter_text, orders, view, size, token)
        seen += [found.run.run_id for found in page.runs]
        if (token := page.next_token) is None:
            break
    names = {run.run_id: number for number, run in enumerate(world.runs)}
    assert [names[run_id] for run_id in seen] == [names[run.run_id] for run in expected], (filter_text, orders, view)
