"""Search of versions and models against a reference: random registries, filters and orders, and plain Python."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import pytest
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.tables import (
    dataset,
    model_alias,
    model_version,
    model_version_tag,
    registered_model,
    registered_model_tag,
    run_input,
)
from mlplat.metrics.model import Point
from mlplat.metrics.store import MetricStore
from mlplat.registry import search
from mlplat.registry.model import PROMPT_TAG
from mlplat.registry.search import search_models, search_versions
from mlplat.registry.store import RegistryStore
from mlplat.tracking.experiments import ExperimentStore
from mlplat.tracking.model import to_ms
from mlplat.tracking.runs import RunStore
from tests.contract.chdb import stored, unique, unique_number
from tests.contract.test_run_search import Reader
from tests.databases import Databases

START = datetime(2025, 1, 1, tzinfo=UTC)
MODELS, VERSIONS, RUNS = 8, 60, 25
STAGES = ["None", "Staging", "Production", "Archived"]
NUMBERS = [0.0, 0.5, 0.5, 1.0, -2.0, math.nan, math.inf]
TEXTS = ["1", "0.5", "2", "x", "", "y" * 300]
NUMERIC = {"1": 1.0, "0.5": 0.5, "2": 2.0}
DIGESTS = ["d1", "d2", "d3"]
ALIASES = ["champion", "challenger", "old"]
#: A truth of SQL's: None is unknown.
Truth = bool | None
Test = Callable[["Known"], Truth]


@dataclass(frozen=True)
class Run:
    """What the reference knows of one run."""

    run_id: str
    params: dict[str, str]
    #: Every value in the order of steps.
    metrics: dict[str, list[float]]
    digests: set[str]


@dataclass(frozen=True)
class Known:
    """What the reference knows of a version; of a model when it has no number."""

    name: str
    updated: int
    tags: dict[str, str]
    aliases: set[str]
    version: int = 0
    user: str = ""
    stage: str = "None"
    semantic: tuple[int, int, int] = (0, 0, 0)
    run: Run | None = None
    is_prompt: bool = False


@dataclass(frozen=True)
class World:
    """The stores, and what is in them."""

    store: RegistryStore
    reader: Reader
    versions: list[Known] = field(default_factory=list)
    models: list[Known] = field(default_factory=list)


@pytest.fixture(scope="module")
async def world(databases: Databases, metric_store: MetricStore) -> AsyncIterator[World]:
    """Random versions of a few models, one of them a prompt; most come from runs, some from the same."""
    dice = random.Random(5)
    async with databases.open(pool_size=12) as engine:
        world = World(RegistryStore(engine), Reader(metric_store))
        runs = [await _make_run(dice, engine, metric_store) for _ in range(RUNS)]
        for number in range(MODELS):
            await _make_model(dice, engine, world, f"model-{number}", number)
        for number in range(VERSIONS):
            await _make_version(dice, engine, world, number, dice.choice(runs) if dice.random() < 0.5 else None)
        yield world


async def _make_run(dice: random.Random, engine: AsyncEngine, metrics: MetricStore) -> Run:
    experiments, store = ExperimentStore(engine, "mlflow-artifacts:"), RunStore(engine)
    async with engine.begin() as connection:
        sequence = f"ALTER SEQUENCE experiment_experiment_id_seq RESTART WITH {unique_number()}"
        await connection.exec_driver_sql(sequence)
    experiment = await experiments.create(unique("e"), None, {})
    params = {key: dice.choice(TEXTS) for key in "pq" if dice.random() < 0.7}
    values = {key: [dice.choice(NUMBERS) for _ in range(dice.randint(1, 3))] for key in "ab" if dice.random() < 0.7}
    found = Run(unique("r"), params, values, set(dice.sample(DIGESTS, dice.randint(0, 2))))
    await store.create(found.run_id, experiment, "name", "", START, {})
    await store.log(found.run_id, params, {})
    for key, points in values.items():
        for step, value in enumerate(points):
            metrics.insert(stored(experiment, found.run_id, [Point(key, value, 1, step)]))
    async with engine.begin() as connection:
        for digest in found.digests:
            new = insert(dataset).values(
                experiment_id=experiment, name="data", digest=digest, source_type="", source=""
            )
            dataset_id = (await connection.execute(new.returning(dataset.c.dataset_id))).scalar_one()
            used = {"run_id": found.run_id, "dataset_id": dataset_id, "tags": {"mlflow.data.context": f"of-{digest}"}}
            await connection.execute(insert(run_input).values(**used))
    return found


async def _make_model(dice: random.Random, engine: AsyncEngine, world: World, name: str, number: int) -> None:
    updated = START + timedelta(seconds=number // 2)
    tags = {key: dice.choice(TEXTS) for key in "tu" if dice.random() < 0.7}
    if is_prompt := number == 0:
        tags[PROMPT_TAG] = "true"
    async with engine.begin() as connection:
        new = insert(registered_model).values(name=name, last_version=99, created_at=START, updated_at=updated)
        await connection.execute(new)
        for key, value in tags.items():
            await connection.execute(insert(registered_model_tag).values(name=name, key=key, value=value))
    world.models.append(Known(name, to_ms(updated), tags, set(), is_prompt=is_prompt))


async def _make_version(dice: random.Random, engine: AsyncEngine, world: World, number: int, run: Run | None) -> None:
    model = dice.choice(world.models)
    updated = START + timedelta(seconds=number // 3)  # ties
    tags = {key: dice.choice(TEXTS) for key in "tu" if dice.random() < 0.7}
    free = [alias for alias in ALIASES if alias not in model.aliases and dice.random() < 0.3]
    used = {one.semantic for one in world.versions if one.name == model.name}
    unused = [one for one in product(range(3), range(3), range(3)) if one not in used]
    known = Known(
        model.name, to_ms(updated), tags, set(free), number + 1, dice.choice(["ann", "bob"]), dice.choice(STAGES),
        dice.choice(unused), run, model.is_prompt,
    )  # fmt: skip
    model.aliases.update(free)
    key = {"name": known.name, "version": known.version}
    async with engine.begin() as connection:
        await connection.execute(
            insert(model_version).values(
                **key, source="s", artifact_uri="s", run_id=run.run_id if run else None, user_id=known.user,
                stage=known.stage, semantic=list(known.semantic), bump="", bump_reason="", created_at=START,
                updated_at=updated,
            )
        )  # fmt: skip
        for tag, value in tags.items():
            await connection.execute(insert(model_version_tag).values(**key, key=tag, value=value))
        for alias in free:
            await connection.execute(insert(model_alias).values(**key, alias=alias))
    world.versions.append(known)


def _aggregate(run: Run | None, key: str, name: str) -> float | None:
    values = run.metrics.get(key) if run else None
    if values is None:
        return None
    if name == "last":
        return values[-1]
    numbers = [value for value in values if not math.isnan(value)]
    return (min if name == "min" else max)(numbers) if numbers else math.nan


def _comparison_of_models(dice: random.Random) -> tuple[str, Test]:
    kind = dice.choice(["tag", "tag", "null", "alias", "name", "time"])
    if kind == "tag":
        return _texts(dice, f"tags.{(key := dice.choice('tu'))}", TEXTS, lambda one: _some(one.tags.get(key)))
    if kind == "null":
        key, absent = dice.choice("tu"), dice.random() < 0.5
        text = f"tags.{key} IS {'' if absent else 'NOT '}NULL"
        return text, lambda one: (key not in one.tags) == absent
    if kind == "alias":
        if dice.random() < 0.3:
            return "alias IS NULL", lambda one: not one.aliases
        return _texts(dice, "alias", ALIASES, lambda one: one.aliases)
    if kind == "name":
        return _texts(dice, "name", [f"model-{number}" for number in range(MODELS)], lambda one: {one.name})
    comparator, value = dice.choice(["=", "!=", ">", ">=", "<", "<="]), to_ms(START) + dice.randint(0, 20) * 1_000
    return f"last_updated_timestamp {comparator} {value}", lambda one: _compare(one.updated, comparator, value)


def _comparison_of_versions(dice: random.Random) -> tuple[str, Test]:
    kind = dice.choice(["of models", "of models", "metric", "metric", "param", "number", "dataset", "version", "stage",
                        "user", "run", "no run"])  # fmt: skip
    numeric = dice.choice(["=", "!=", ">", ">=", "<", "<="])
    if kind == "metric":
        key, name, value = dice.choice("abc"), dice.choice(["last", "min", "max"]), dice.choice([0.5, 1.0, 0.0])
        left = f"metrics.{key}" if name == "last" else f"{name}(metrics.{key})"
        return f"{left} {numeric} {value}", lambda one: _present(
            _aggregate(one.run, key, name), lambda found: _compare(found, numeric, value)
        )
    if kind == "number":
        key, value = dice.choice("pq"), dice.choice([1.0, 0.5, 2.0])
        return f"params.{key} {numeric} {value}", lambda one: _present(
            NUMERIC.get(one.run.params.get(key, "")) if one.run else None, lambda found: _compare(found, numeric, value)
        )
    if kind == "param":
        key = dice.choice("pq")
        return _texts(dice, f"params.{key}", TEXTS, lambda one: _some(one.run and one.run.params.get(key)))
    if kind == "dataset":
        if dice.random() < 0.3:
            return "dataset.digest IS NULL", lambda one: not (one.run and one.run.digests)
        contexts = dice.random() < 0.5
        name, prefix = ("context", "of-") if contexts else ("digest", "")
        texts = [prefix + digest for digest in DIGESTS]
        return _texts(
            dice,
            f"dataset.{name}",
            texts,
            lambda one: {prefix + digest for digest in one.run.digests} if one.run else set(),
        )
    if kind == "version":
        return _semantic(dice)
    if kind == "stage":
        stage = dice.choice(STAGES)
        if dice.random() < 0.5:
            return f"stage != '{stage.lower()}'", lambda one: one.stage != stage
        return f"stage IN ('{stage.upper()}', 'Production')", lambda one: one.stage in {stage, "Production"}
    if kind == "user":
        return _texts(dice, "author", ["ann", "bob"], lambda one: {one.user})
    if kind == "run":
        return "run_id != 'x'", lambda one: None if one.run is None else True
    if kind == "no run":
        return "run_id IS NULL", lambda one: one.run is None
    return _comparison_of_models(dice)


def _semantic(dice: random.Random) -> tuple[str, Test]:
    major, minor = dice.randint(0, 2), dice.randint(0, 2)
    kind = dice.choice(["exact", "caret", "x", "list"])
    if kind == "exact":
        comparator = dice.choice([">", ">=", "<", "<="])
        wanted = (major, minor, dice.randint(0, 2))
        text = f"semantic_version {comparator} '{'.'.join(map(str, wanted))}'"
        return text, lambda one: {">": one.semantic > wanted, ">=": one.semantic >= wanted,
                                  "<": one.semantic < wanted, "<=": one.semantic <= wanted}[comparator]  # fmt: skip
    if kind == "caret":
        return (
            f"semantic_version = '^{major + 1}.{minor}'",
            lambda one: one.semantic[0] == major + 1 and one.semantic[1] >= minor,
        )
    if kind == "x":
        return f"semantic_version != '{major}.{minor}.x'", lambda one: one.semantic[:2] != (major, minor)
    return (
        f"semantic_version NOT IN ('{major}.x', '~2.{minor}')",
        lambda one: one.semantic[0] != major and one.semantic[:2] != (2, minor),
    )


def _texts(dice: random.Random, name: str, texts: list[str], values: Callable[[Any], set[str]]) -> tuple[str, Test]:
    """Of values of which there is any number, one has to pass."""
    text, equal = dice.choice(texts), dice.choice(["=", "=", "!=", "IN", "NOT IN", "LIKE"])
    if equal == "LIKE":
        return f"{name} LIKE '{text[:1]}%'", lambda one: any(found.startswith(text[:1]) for found in values(one))
    wanted = {text, texts[0]} if "IN" in equal else {text}
    right = f"('{text}', '{texts[0]}')" if "IN" in equal else f"'{text}'"
    is_in = equal in {"=", "IN"}
    return f"{name} {equal} {right}", lambda one: any((found in wanted) == is_in for found in values(one))


def _some(value: str | None) -> set[str]:
    return set() if value is None else {value}


def _present(value: Any, test: Callable[[Any], bool]) -> bool:
    return value is not None and test(value)


def _compare(left: float, comparator: str, right: float) -> bool:
    return {"=": left == right, "!=": left != right, ">": left > right, ">=": left >= right, "<": left < right,
            "<=": left <= right}[comparator]  # fmt: skip


def _tree(dice: random.Random, depth: int, leaf: Callable[[random.Random], tuple[str, Test]]) -> tuple[str, Test]:
    kind = dice.choice(["leaf", "and", "and", "or", "not", "not"]) if depth else "leaf"
    if kind == "leaf":
        return leaf(dice)
    text, test = _tree(dice, depth - 1, leaf)
    if kind == "not":
        return f"NOT ({text})", lambda one: _negate(test(one))
    other_text, other = _tree(dice, depth - 1, leaf)
    if kind == "and":
        return f"({text}) AND ({other_text})", lambda one: _and(test(one), other(one))
    return f"({text}) OR {other_text}", lambda one: _negate(_and(_negate(test(one)), _negate(other(one))))


def _negate(truth: Truth) -> Truth:
    return None if truth is None else not truth


def _and(left: Truth, right: Truth) -> Truth:
    if left is False or right is False:
        return False
    return None if left is None or right is None else True


#: Orders, and the key of one for Python's sort.
ORDERS: dict[str, Callable[[Known, int], Any]] = {
    "name": lambda one, sign: _sorted(one.name, sign),
    "last_updated_timestamp": lambda one, sign: sign * one.updated,
    "tags.t": lambda one, sign: _sorted(one.tags.get("t"), sign),
}
VERSION_ORDERS: dict[str, Callable[[Known, int], Any]] = ORDERS | {
    "version_number": lambda one, sign: sign * one.version,
    "semantic_version": lambda one, sign: [sign * number for number in one.semantic],
    "stage": lambda one, sign: _sorted(one.stage, sign),
    "run_id": lambda one, sign: _sorted(one.run and one.run.run_id, sign),
    "params.p": lambda one, sign: _sorted(one.run and one.run.params.get("p"), sign),
}


def _sorted(value: str | None, sign: int) -> tuple[int, list[int]]:
    # The database sorts by bytes; the 0 marks the end, so that a prefix sorts first, or last when descending.
    return (1, []) if value is None else (0, [sign * (byte + 1) for byte in value.encode()] + [0])


def _orders(
    dice: random.Random, known: dict[str, Callable[[Known, int], Any]]
) -> tuple[list[str], Callable[[Known], Any]]:
    chosen = [(name, dice.choice(["ASC", "DESC"])) for name in dice.sample(sorted(known), dice.randint(0, 2))]

    def key(one: Known) -> Any:
        first = [known[name](one, 1 if direction == "ASC" else -1) for name, direction in chosen]
        if one.version and not first:
            first = [-one.updated]
        return (*first, _sorted(one.name, 1), -one.version)

    return [f"{name} {direction}" for name, direction in chosen], key


@pytest.mark.parametrize("sizes", ["usual", "all many", "all large", "nothing tested by name"])
@pytest.mark.parametrize("seed", range(10))
async def test_versions_agree_with_the_reference_on_every_page(
    world: World, monkeypatch: pytest.MonkeyPatch, seed: int, sizes: str
) -> None:
    if sizes == "all many":
        monkeypatch.setattr(search, "FEW", 0)
    if sizes == "all large":
        monkeypatch.setattr(search, "FEW", 0)
        monkeypatch.setattr(search, "LARGE", 0)
        monkeypatch.setattr(search, "MAX_TESTED", 12)
    if sizes == "nothing tested by name":
        monkeypatch.setattr(search, "MAX_TESTED", 0)
        monkeypatch.setattr(search, "MAX_COUNTED", 0)
    dice = random.Random(seed)
    for _search in range(10):
        filter_text, test = _tree(dice, dice.randint(0, 3), _comparison_of_versions)
        orders, key = _orders(dice, VERSION_ORDERS)
        expected = sorted((one for one in world.versions if test(one) and not one.is_prompt), key=key)
        seen, token, size = list[tuple[str, int]](), None, dice.choice([2, 7, 100])
        for _page in range(VERSIONS + 1):
            page = await search_versions(world.store, world.reader, filter_text, orders, size, token)
            seen += [(found.name, found.version) for found in page.versions]
            if (token := page.next_token) is None:
                break
        assert seen == [(one.name, one.version) for one in expected], (filter_text, orders)


@pytest.mark.parametrize("seed", range(40))
async def test_models_agree_with_the_reference_on_every_page(world: World, seed: int) -> None:
    dice = random.Random(seed)
    filter_text, test = _tree(dice, dice.randint(0, 3), _comparison_of_models)
    orders, key = _orders(dice, ORDERS)
    expected = sorted((one for one in world.models if test(one) and not one.is_prompt), key=key)
    seen, token, size = list[str](), None, dice.choice([1, 3, 100])
    for _page in range(MODELS + 1):
        page = await search_models(world.store, filter_text, orders, size, token)
        seen += [found.name for found in page.models]
        if (token := page.next_token) is None:
            break
    assert seen == [one.name for one in expected], (filter_text, orders)
