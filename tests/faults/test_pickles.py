"""Pickles from strangers: everywhere that bytes are taken, and never unpickled by a process of the platform."""

from __future__ import annotations

import io
import json
import pickle
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import httpx
import numpy as np
import psutil
import pytest

from mlplat.sdk.client import Client
from mlplat.sdk.exporting import export_experiment
from mlplat.sdk.importing import import_archive
from tests.faults.stage import rows
from tests.platform import Platform, eventually

FILES = "/api/2.0/mlflow-artifacts/artifacts"
MLFLOW = "/api/2.0/mlflow"
_FIRE = """
import json, os
with open({path!r}, "a") as file:
    file.write(json.dumps([os.getpid(), open("/proc/self/cmdline").read()]) + "\\n")
"""


class Evil:
    """Whoever unpickles it runs its code, and gets ``result``."""

    def __init__(self, code: str) -> None:
        self._code = code

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (self._code,)


@dataclass(frozen=True)
class Canary:
    """A side effect of unpickling: a line with the process that did it."""

    path: Path

    @property
    def code(self) -> str:
        """What is run."""
        return _FIRE.format(path=str(self.path))

    @property
    def pickled(self) -> bytes:
        """What must not be unpickled."""
        return pickle.dumps(Evil(self.code))

    def fired(self) -> dict[int, str]:
        """The command lines of the processes in which it fired, by pid."""
        if not self.path.exists():
            return {}
        return dict(json.loads(line) for line in self.path.read_text().splitlines())


@pytest.fixture
def canary(platform: Platform) -> Iterator[Canary]:
    """One that has been seen to fire, and has not fired since."""
    canary = Canary(platform.state_dir / f"canary-{uuid.uuid4().hex}")
    pickle.loads(canary.pickled)
    assert list(canary.fired()) == [psutil.Process().pid]
    canary.path.unlink()
    yield canary
    canary.path.unlink(missing_ok=True)


def servers(platform: Platform) -> dict[int, str]:
    """Pids of what the platform itself runs, each with what it is."""
    found = {row["pid"]: name for name, row in rows(platform).items() if row.get("pid")}
    replicas = [each for each in platform.processes() if "ServeReplica" in " ".join(each.cmdline())]
    assert replicas
    found |= {each.pid: "gateway" for each in replicas}
    assert {"pipeline-scheduler", "registry-coordinator", "metric-shard-0", "run-executor-0"} <= set(found.values())
    return found


def files_of(canary: Canary) -> dict[str, bytes]:
    """A model as MLflow writes it, all of which is evil, and evil files of other kinds."""
    arrays = io.BytesIO()
    np.save(arrays, np.array([Evil(canary.code)], dtype=object), allow_pickle=True)
    mlmodel = (
        "flavors:\n  python_function:\n    loader_module: mlflow.pyfunc.model\n    python_model: python_model.pkl\n"
        f"signature:\n  inputs: !!python/object/apply:builtins.exec [{json.dumps(canary.code)}]\n"
    )
    return {
        "model/MLmodel": mlmodel.encode(),
        "model/python_model.pkl": canary.pickled,
        "evil.pkl": canary.pickled,
        "evil.joblib": canary.pickled,
        "evil.npy": arrays.getvalue(),
        "large.pkl": canary.pickled + bytes(300_000),
        "mlplat/environment.json": canary.pickled,
        "mlplat/console/host-1-1/0": canary.pickled,
    }


def test_nothing_that_was_uploaded_is_unpickled(platform: Platform, canary: Canary, tmp_path: Path) -> None:
    name = f"pickles-{uuid.uuid4().hex[:8]}"
    with httpx.Client(base_url=platform.url, timeout=60, trust_env=False) as http:

        def call(method: str, path: str, **more: Any) -> httpx.Response:
            answer = http.request(method, path, **more)
            assert answer.is_success or answer.status_code in {404, 409}, f"{method} {path}: {answer.text}"
            return answer

        def made(path: str, **body: object) -> Any:
            answer = http.post(f"{MLFLOW}/{path}", json=body)
            assert answer.is_success, answer.text
            return answer.json()

        experiment = made("experiments/create", name=name)["experiment_id"]
        run_id = made("runs/create", experiment_id=experiment, start_time=1)["run"]["info"]["run_id"]
        root = f"{experiment}/{run_id}/artifacts"
        for path, body in files_of(canary).items():
            assert call("PUT", f"{FILES}/{root}/{path}", content=body).is_success
        logged = made("logged-models", experiment_id=experiment, name="logged", source_run_id=run_id)["model"]["info"]
        at = f"{FILES}/{experiment}/models/{logged['model_id']}/artifacts"
        call("PUT", f"{at}/python_model.pkl", content=canary.pickled)
        call("POST", "/api/v1/blobs", content=canary.pickled)
        for place in (
            "checkpoints/train/-1/000001-000001/0",
            "checkpoints/train/-1/000001-000001.json",
            "logs/a/-1/1/0",
        ):
            call("PUT", f"{FILES}/pipelines/{run_id}/{place}", content=canary.pickled)
        made("registered-models/create", name=name)
        for source in (f"runs:/{run_id}/model", f"runs:/{run_id}/model"):
            made("model-versions/create", name=name, source=source, run_id=run_id)
        made("registered-models/alias", name=name, alias="champion", version="1")
        made("runs/update", run_id=run_id, status="FINISHED", end_time=2)

        assert call("GET", f"/api/v1/models/{name}/versions/1/verify").is_success
        for path in (
            f"/api/v1/models/{name}/versions", f"/api/v1/models/{name}/history",
            f"/api/v1/lineage/model-versions/{name}/1", f"/api/v1/lineage/model-versions/{name}/1/audit?format=json",
            f"/api/v1/lineage/model-versions/{name}/1/audit", f"/api/v1/lineage/model-versions/{name}/1/openlineage",
            f"/api/v1/lineage/graph?node=model-version:{name}/1", "/api/v1/model-versions?filter=version>0",
            f"{FILES}?path={root}", f"{FILES}/{root}/evil.pkl", f"/get-artifact?run_id={run_id}&path=evil.npy",
            f"/model-versions/get-artifact?name={name}&version=1&path=python_model.pkl",
            f"/api/v1/artifacts/files/{root}/large.pkl", "/api/v1/storage/verify", "/api/v1/storage/usage",
            f"/api/v1/runs/{run_id}/console", f"/api/v1/runs/compare?run_id={run_id}",
            f"{MLFLOW}/logged-models/{logged['model_id']}/artifacts/directories",
        ):  # fmt: skip
            call("GET", path)
        made("runs/search", experiment_ids=[experiment], filter="tags.x != 'y'")
        made("logged-models/search", experiment_ids=[experiment])
        assert call("POST", "/api/v1/storage/collections", json={}).json()["report"]["damaged"] == []
    client = Client(platform.url)
    export_experiment(client, name, tmp_path / "exported.tar")
    import_archive(client, tmp_path / "exported.tar", f"{name}-again")
    assert "0 damaged" in platform.mlplat("artifacts", "verify", run_id)
    assert canary.fired() == {}


def ships(canary: Canary) -> dict[str, bytes]:
    """Functions as pipelines ship them, each of which fires in its own way."""
    code = canary.code

    def gives_evil() -> object:
        return Evil(code)

    def raises_evil() -> None:
        problem = RuntimeError("evil")
        problem.args = (Evil(code),)
        raise problem

    def ends_in_evil() -> None:
        kind = type("Worse", (BaseException,), {"__reduce__": lambda _self: (exec, (code,))})
        raise kind

    def cannot_be_told() -> None:
        def fail(_self: object) -> str:
            raise kind

        kind = type("Untold", (Exception,), {"__reduce__": lambda _self: (exec, (code,)), "__str__": fail})
        raise kind

    return {
        "unpickled": canary.pickled,
        "given": cloudpickle.dumps(gives_evil),
        "raised": cloudpickle.dumps(raises_evil),
        "ended": cloudpickle.dumps(ends_in_evil),
        "untold": cloudpickle.dumps(cannot_be_told),
    }


@pytest.mark.parametrize("which", ["unpickled", "given", "raised", "ended", "untold"])
def test_what_steps_do_stays_in_their_workers(platform: Platform, canary: Canary, which: str) -> None:
    """A step's own function is unpickled by its worker, where it may do as it likes; nothing of it gets further."""
    before = servers(platform)
    body = ships(canary)[which]
    with httpx.Client(base_url=platform.url, timeout=60, trust_env=False) as http:
        digest = http.post("/api/v1/blobs", content=body).json()["digest"]
        steps: dict[str, Any] = {"evil": {"uses": f"pickle:{digest}:evil:evil", "retry": {"max_attempts": 1}}}
        if which == "given":
            steps["next"] = {"uses": "json:dumps", "with": {"obj": "${{ steps.evil.output }}"}}
        submission = {
            "spec": {"name": "evil", "steps": steps},
            "idempotency_key": uuid.uuid4().hex,
        }
        answer = http.post("/api/v1/pipeline-runs", json=submission)
        assert answer.is_success, answer.text
        url = f"/api/v1/pipeline-runs/{answer.json()['run_id']}"

        def ended() -> Any:
            run = http.get(url).json()
            return run if run["state"] in {"SUCCEEDED", "FAILED", "CANCELLED"} else None

        run = eventually(ended, 120, "the run ends")
    if which == "unpickled":
        assert canary.fired(), "its worker has unpickled it"
    after = servers(platform)
    guilty = {what for pid, what in (before | after).items() if pid in canary.fired()}
    assert guilty == set(), run
    assert after == before, "nothing has died of it"
