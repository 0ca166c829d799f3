"""How functions, notebooks and folders reach the workers."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import zipfile
from pathlib import Path

import cloudpickle
import pytest

from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import InvalidPipeline
from mlplat.pipelines.spec import PipelineSpec
from mlplat.sdk import folders
from mlplat.sdk.folders import zip_folder
from mlplat.sdk.pipeline_runs import check_pipeline, compile_pipeline
from mlplat.sdk.shipping import Shipper
from mlplat.steps.working_dir import inside_working_dir

YAML = """\
name: shipped
env: {working_dir: src}
steps:
  local: {uses: "local_steps:double", with: {x: 2}}
  again: {uses: "local_steps:double", with: {x: 3}}
  installed: {uses: "json:dumps", with: {obj: 1}}
  book: {notebook: explore.ipynb, env: {working_dir: src}}
  sub:
    pipeline: parts/inner.yaml
finally:
  last: {uses: "local_steps:double", with: {x: 1}}
"""
INNER = """\
name: inner
steps:
  deep: {uses: "deeper_steps:triple", with: {x: 1}}
"""


class Blobs(dict[str, bytes]):
    """What would be uploaded, and how often."""

    uploads = 0

    def store(self, body: bytes) -> str:
        digest = hashlib.sha256(body).hexdigest()
        self[digest] = body
        self.uploads += 1
        return digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "p.yaml").write_text(YAML)
    (tmp_path / "local_steps.py").write_text("def double(x):\n    return 2 * x\n")
    (tmp_path / "explore.ipynb").write_text('{"cells": []}')
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "data.txt").write_text("x")
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "inner.yaml").write_text(INNER)
    (tmp_path / "parts" / "deeper_steps.py").write_text("def triple(x):\n    return 3 * x\n")
    for name in ("local_steps", "deeper_steps"):
        sys.modules.pop(name, None)
    return tmp_path


def test_everything_beside_a_definition_is_sent_once(folder: Path) -> None:
    blobs = Blobs()
    spec = compile_pipeline(folder / "p.yaml", blobs.store)
    uses = spec.steps["local"].uses or ""
    assert cloudpickle.loads(blobs[uses.split(":")[1]])(4) == 8
    assert uses.endswith(":local_steps.double")
    assert spec.steps["again"].uses == uses
    assert spec.finally_["last"].uses == uses
    assert spec.steps["installed"].uses == "json:dumps"
    inner = spec.steps["sub"].pipeline
    assert inner is not None
    assert cloudpickle.loads(blobs[(inner.steps["deep"].uses or "").split(":")[1]])(4) == 12
    kind, digest, name = (spec.steps["book"].notebook or "").split(":")
    assert (kind, blobs[digest], name) == ("blob", b'{"cells": []}', "explore.ipynb")
    assert spec.env.working_dir == spec.steps["book"].env.working_dir
    assert zipfile.ZipFile(io.BytesIO(blobs[spec.env.working_dir or ""])).namelist() == ["data.txt"]
    assert len(blobs) == 4
    assert PipelineSpec.model_validate(spec.to_json()).digest == spec.digest


def test_what_is_shipped_already_stays(folder: Path) -> None:
    spec = check_pipeline(folder / "p.yaml")
    again = compile_pipeline(spec, Blobs().store)
    assert again == spec


@pytest.mark.parametrize(
    ("remove", "problem"),
    [
        ("src/data.txt src", "env.working_dir: {}/src: no such folder"),
        ("explore.ipynb", "steps.book: {}/explore.ipynb: cannot be read: No such file or directory"),
    ],
)
def test_what_is_missing_is_told(folder: Path, remove: str, problem: str) -> None:
    for name in remove.split():
        path = folder / name
        path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(InvalidPipeline) as caught:
        check_pipeline(folder / "p.yaml")
    assert caught.value.message.startswith(f"{folder}/p.yaml: ")
    assert problem.format(folder.resolve()) in caught.value.message


def test_a_module_that_fails_is_told_with_its_line(folder: Path) -> None:
    (folder / "local_steps.py").write_text("import os\nos.nothing()\n")
    with pytest.raises(InvalidPipeline, match=r"steps\.local: cannot import 'local_steps': .*local_steps\.py:2\)"):
        check_pipeline(folder / "p.yaml")


def test_a_module_of_another_folder_is_not_taken_for_this_one(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    check_pipeline(folder / "p.yaml")
    other = tmp_path_factory.mktemp("other")
    (other / "local_steps.py").write_text("def double(x):\n    return 0\n")
    (other / "q.yaml").write_text('name: q\nsteps:\n  a: {uses: "local_steps:double", with: {x: 1}}\n')
    with pytest.raises(InvalidPipeline, match="another module 'local_steps' is in the way"):
        check_pipeline(other / "q.yaml")


def test_something_else_than_a_notebook(folder: Path) -> None:
    for text in ("", "[]", "{}", "{"):
        (folder / "explore.ipynb").write_text(text)
        with pytest.raises(InvalidPipeline, match=r"explore\.ipynb: not a notebook"):
            check_pipeline(folder / "p.yaml")


def test_equal_folders_are_equal_bytes(tmp_path: Path) -> None:
    def fill(root: Path) -> Path:
        for name in ("b.txt", "a/x.py", ".git/config", "a/__pycache__/x.pyc", "stale.pyc", ".venv/bin/python"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(name)
        (root / "run.sh").write_text("#!/bin/sh\n")
        (root / "run.sh").chmod(0o755)
        (root / "gone").symlink_to(root / "nothing")
        return root

    first, second = fill(tmp_path / "one"), fill(tmp_path / "two")
    os.utime(second / "b.txt", (1, 1))
    body = zip_folder(first)
    assert body == zip_folder(second)
    archive = zipfile.ZipFile(io.BytesIO(body))
    assert archive.namelist() == ["b.txt", "run.sh", "a/x.py"]
    assert archive.getinfo("run.sh").external_attr >> 16 == 0o755
    (second / "b.txt").write_text("changed")
    assert body != zip_folder(second)


def test_a_folder_has_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("12345")
    (tmp_path / "b").write_text("12345")
    monkeypatch.setattr(folders, "MAX_ZIPPED_BYTES", 9)
    with pytest.raises(InvalidPipeline, match="keep data outside of working_dir"):
        zip_folder(tmp_path)
    monkeypatch.setattr(folders, "MAX_ZIPPED_BYTES", 10)
    monkeypatch.setattr(folders, "MAX_FILES", 1)
    with pytest.raises(InvalidPipeline, match="more than 1 files"):
        zip_folder(tmp_path)


def test_modules_of_one_working_dir_do_not_reach_the_next(tmp_path: Path) -> None:
    store = ArtifactStore(f"file://{tmp_path / 'store'}")
    seen = []
    for answer in (1, 2):
        source = tmp_path / str(answer)
        source.mkdir()
        (source / "module_of_a_folder.py").write_text(f"ANSWER = {answer}\n")
        with inside_working_dir(store.put_blob(zip_folder(source)), store):
            import module_of_a_folder  # type: ignore[import-not-found]  # noqa: PLC0415

            seen.append(module_of_a_folder.ANSWER)
    assert seen == [1, 2]


def test_a_function_that_cannot_be_sent_is_told() -> None:
    lock = __import__("threading").Lock()

    def holds() -> object:
        return lock

    with pytest.raises(InvalidPipeline, match="holds: cannot be sent to where steps run: "):
        Shipper(Blobs().store).function(holds)


def test_a_function_is_sent_once_however_often_it_is_used() -> None:
    def local() -> None:
        pass

    blobs = Blobs()
    shipper = Shipper(blobs.store)
    assert shipper.function(local) == shipper.function(local)
    assert blobs.uploads == 1
