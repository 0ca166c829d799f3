"""Semantic versions as the registry gives them, by what it knows of each version."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.errors import AlreadyExists, InvalidInput, NotFound
from mlplat.registry.model import CreateModel, CreateVersion, DeleteVersion, RenameModel
from mlplat.registry.semver import EVERY, parse_range, parse_semantic_version
from mlplat.registry.service import RegistryService
from mlplat.registry.store import RegistryStore
from mlplat.tracking.experiments import ExperimentStore
from tests.registry import registry_service


@dataclass(frozen=True)
class Model:
    """The registry of one database, with a model ``m``."""

    engine: AsyncEngine
    service: RegistryService
    store: RegistryStore

    async def add(self, request: str = "", name: str = "m", **options: Any) -> str:
        """Adds a version; returns its semantic version."""
        command = CreateVersion(name, "s3://b/m", "s3://b/m", **options)
        [answer] = await self.service.execute(request or uuid.uuid4().hex, [command])
        return str(answer["semantic_version"])

    async def run(self, run_id: str, data: str | None = None, **tags: str) -> None:
        """A run with tags (``__`` is a dot), and a dataset of this digest."""
        async with self.engine.begin() as connection:
            await connection.execute(
                text(
                    "INSERT INTO run (run_id, experiment_id, name, status, user_id, artifact_uri, started_at) "
                    "SELECT :id, min(experiment_id), 'r', 'FINISHED', '', '', now() FROM experiment"
                ),
                {"id": run_id},
            )
            for key, value in tags.items():
                row = {"id": run_id, "key": key.replace("__", "."), "value": value}
                await connection.execute(text("INSERT INTO run_tag VALUES (:id, :key, :value)"), row)
            if data is not None:
                await connection.execute(
                    text(
                        "WITH added AS (INSERT INTO dataset (experiment_id, name, digest, source_type, source) "
                        "SELECT min(experiment_id), 'digits', :digest, 't', 's' FROM experiment "
                        "ON CONFLICT (experiment_id, name, digest) DO UPDATE SET source = 's' RETURNING dataset_id) "
                        "INSERT INTO run_input (run_id, dataset_id) SELECT :id, dataset_id FROM added"
                    ),
                    {"id": run_id, "digest": data},
                )


@pytest.fixture
async def model(engine: AsyncEngine) -> AsyncIterator[Model]:
    service = registry_service(engine)
    await service.start()
    await service.execute("create", [CreateModel("m")])
    await ExperimentStore(engine, "mlflow-artifacts:").create("e", None, {})
    yield Model(engine, service, RegistryStore(engine))
    await service.stop()


def signature(*names: str) -> str:
    return json.dumps({"inputs": [{"name": name, "type": "long", "required": True} for name in names]})


async def _told(model: Model) -> list[tuple[str, str, str]]:
    return [
        (str(version.semantic), version.bump, version.bump_reason)
        for version in reversed(await model.store.list_versions("m", EVERY, 100))
    ]


async def test_each_version_says_what_changed(model: Model) -> None:
    code = {"mlflow__source__git__commit": "c0ffee", "mlflow__source__name": "/tmp/job-1/train.py"}
    await model.run("a", "1f", **code)
    await model.run("b", "1f", **(code | {"mlflow__source__name": "/tmp/job-2/train.py"}))
    await model.run("c", "2e", **code)
    await model.run("d", "2e", **(code | {"mlflow__source__git__commit": "decaf"}))
    await model.run(
        "e", "2e", **(code | {"mlflow__source__git__commit": "decaf", "mlflow__source__git__dirty": "true"})
    )
    for run_id in "abcde":
        await model.add(run_id=run_id, signature=signature("x"))
    await model.add(source_run_id="e", signature=signature("x", "y"))
    await model.add(run_id="nobody", signature=signature("x"))
    assert await _told(model) == [
        ("1.0.0", "", "the first version"),
        ("1.0.1", "patch", "no other signature, data or code is known"),
        ("1.1.0", "minor", "other data"),
        ("1.2.0", "minor", "other code: commit c0ffee became decaf"),
        ("1.3.0", "minor", "the code had changes that were not committed"),
        ("2.0.0", "major", "input y is new and required"),
        ("2.1.0", "minor", "the signature changed so that callers can go on"),
    ]


async def test_what_is_known_outlives_the_run(model: Model) -> None:
    await model.run("a", "1f")
    await model.add(run_id="a")
    async with model.engine.begin() as connection:
        await connection.execute(text("DELETE FROM run"))
        await connection.execute(text("DELETE FROM dataset"))
    await model.run("b", "2e")
    assert await model.add(run_id="b") == "1.1.0"


async def test_a_version_is_compared_with_the_highest(model: Model) -> None:
    await model.add(signature=signature("x"))
    await model.add(signature=signature("x", "y"))
    assert await model.add(signature=signature("x"), semantic_version="1.0.1") == "1.0.1"
    assert await model.add(signature=signature("x", "y")) == "2.0.1"
    assert (await model.store.get_in_range("m", parse_range("^1"))).version == 3
    assert (await model.store.get_in_range("m", parse_range("*"))).version == 4


async def test_numbers_may_be_given(model: Model) -> None:
    assert await model.add(semantic_version="major") == "1.0.0"  # nothing is there that could grow
    assert [await model.add(semantic_version=each) for each in ("major", "minor", "patch", "0.3.0", "4.0.0")] == [
        "2.0.0", "2.1.0", "2.1.1", "0.3.0", "4.0.0",
    ]  # fmt: skip
    assert await model.add() == "4.0.1"
    assert {reason for _semantic, _bump, reason in (await _told(model))[2:-1]} == {"set by hand"}


async def test_no_number_is_given_twice(model: Model) -> None:
    for semantic in (None, None, "3.0.0", "1.5.0"):
        await model.add(semantic_version=semantic)
    for version in (3, 4):
        await model.service.execute(f"delete {version}", [DeleteVersion("m", version)])
    for taken in ("1.0.0", "3.0.0", "1.5.0"):
        with pytest.raises(AlreadyExists, match=f"has or had a version {taken} already"):
            await model.add(semantic_version=taken)
    assert await model.add() == "3.0.1"
    await model.service.execute("rename", [RenameModel("m", "n")])
    with pytest.raises(AlreadyExists, match=r"1\.5\.0"):
        await model.add(name="n", semantic_version="1.5.0")


async def test_with_nothing_left_to_compare_with_callers_are_warned(model: Model) -> None:
    await model.add()
    await model.service.execute("delete", [DeleteVersion("m", 1)])
    await model.add()
    assert await _told(model) == [("2.0.0", "major", "no version is left to compare with")]


async def test_a_refused_version_uses_no_number(model: Model) -> None:
    for malformed in ("1.2", "first", ""):
        with pytest.raises(InvalidInput, match="Invalid semantic version"):
            await model.add(semantic_version=malformed)
    with pytest.raises(InvalidInput):
        await model.add(semantic_version="5.0.0", tags={"../x": "1"})
    assert await model.add(request="again") == "1.0.0"
    assert await model.add(request="again") == "1.0.0"
    assert await model.add() == "1.0.1"
    assert (await model.store.get_version("m", 2)).semantic == (1, 0, 1)


async def test_many_writers_get_numbers_of_their_own(model: Model) -> None:
    given = await asyncio.gather(*(model.add(request=f"request {number}") for number in range(20)))
    assert sorted(given, key=parse_semantic_version) == [f"1.0.{number}" for number in range(20)]


async def test_versions_are_listed_in_pages_of_a_range(model: Model) -> None:
    for semantic in ("1.0.0", "1.9.0", "1.10.0", "2.0.0", "1.10.1"):
        await model.add(semantic_version=semantic)
    wanted = parse_range("^1.1")
    first = await model.store.list_versions("m", wanted, 2)
    assert [str(version.semantic) for version in first] == ["1.10.1", "1.10.0"]
    rest = await model.store.list_versions("m", wanted, 2, first[-1].semantic)
    assert [str(version.semantic) for version in rest] == ["1.9.0"]
    with pytest.raises(NotFound, match=r"no version from 3\.0\.0"):
        await model.store.resolve("m", "^3")
    with pytest.raises(NotFound, match="name=nobody"):
        await model.store.resolve("nobody", "^1")
