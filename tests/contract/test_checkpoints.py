"""``ctx.checkpoint`` over the folder store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest

from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import InvalidInput
from mlplat.sdk.checkpoints import Checkpoints

OWN, BEFORE = "pipelines/run1/checkpoints/train/-1", "pipelines/run0/checkpoints/train/-1"


@pytest.fixture
def artifacts(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(f"file://{tmp_path / 'artifacts'}")


def of(artifacts: ArtifactStore, attempt: int = 1, keep: int = 3, *more: str) -> Checkpoints:
    return Checkpoints(artifacts, [OWN, *more], attempt, keep)


def manifests(artifacts: ArtifactStore) -> list[str]:
    entries = artifacts.list(OWN)
    names = sorted(entry.path for entry in entries if not entry.is_dir)
    assert [f"{entry.path}.json" for entry in entries if entry.is_dir] == names, "files and manifests go together"
    return names


class Odd:
    def __reduce__(self) -> Any:
        raise TypeError("not this one")


def test_without_a_checkpoint_there_is_the_default(artifacts: ArtifactStore, tmp_path: Path) -> None:
    assert of(artifacts).load() is None
    assert of(artifacts).load({"epoch": 0}) == {"epoch": 0}
    assert not of(artifacts).load_folder(tmp_path / "none")


@pytest.mark.parametrize("state", [None, {"epoch": 3, "weights": [0.5]}, "x" * 100_000, Path("a"), b"\x00"])
def test_the_next_attempt_gets_what_was_saved_last(state: Any, artifacts: ArtifactStore) -> None:
    first = of(artifacts)
    first.save("before")
    first.save(state)
    assert first.load() == state
    assert of(artifacts, 2).load("default") == state


def test_only_the_newest_stay(artifacts: ArtifactStore) -> None:
    first = of(artifacts, keep=2)
    for number in range(5):
        first.save(number)
    assert manifests(artifacts) == ["000001-000004.json", "000001-000005.json"]
    second = of(artifacts, 2, keep=2)
    second.save("second")
    assert manifests(artifacts) == ["000001-000005.json", "000002-000001.json"]


def test_an_attempt_that_was_given_up_does_not_overtake_its_successor(artifacts: ArtifactStore) -> None:
    first, second = of(artifacts, 1, 1), of(artifacts, 2, 1)
    first.save("first")
    second.save("second")
    for number in range(12):
        first.save(f"late {number}")
        assert of(artifacts, 3).load() == "second"


def test_a_save_that_was_not_finished_leaves_the_one_before(artifacts: ArtifactStore) -> None:
    checkpoints = of(artifacts)
    checkpoints.save("good")
    artifacts.write(f"{OWN}/000001-000002/0", [b"of one that died before its manifest"])
    with pytest.raises(InvalidInput, match="a Odd, cannot be pickled: not this one"):
        checkpoints.save(Odd())
    assert of(artifacts, 2).load() == "good"


def test_a_resumed_run_goes_on_from_the_earlier_one_until_it_has_its_own(artifacts: ArtifactStore) -> None:
    Checkpoints(artifacts, [BEFORE], 4, 3).save("of the earlier run")
    resumed = of(artifacts, 1, 3, BEFORE)
    assert resumed.load() == "of the earlier run"
    resumed.save("own")
    assert of(artifacts, 2, 3, BEFORE).load() == "own"
    assert Checkpoints(artifacts, [BEFORE], 5, 3).load() == "of the earlier run"


def test_a_folder_is_kept_with_its_files(artifacts: ArtifactStore, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "weights.bin").write_bytes(bytes(range(256)))
    (source / "deep" / "er" / "ü.txt").write_text("text")
    of(artifacts).save_folder(source)
    assert of(artifacts, 2).load_folder(target)
    assert {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()} == {
        "weights.bin": bytes(range(256)), "deep/er/ü.txt": b"text",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil-of-mlplat", "a/../../evil", "link/evil"])
def test_a_checkpoint_writes_nothing_outside_of_its_folder(artifacts: ArtifactStore, tmp_path: Path, name: str) -> None:
    """Whoever may write artifacts may write one."""
    artifacts.write(f"{OWN}/000001-000001/0", [b"sound"])
    artifacts.write(f"{OWN}/000001-000001/1", [b"evil"])
    manifest = {"kind": "folder", "files": ["sound", name]}
    artifacts.write(f"{OWN}/000001-000001.json", [json.dumps(manifest).encode()])
    target, outside = tmp_path / "target", tmp_path / "outside"
    target.mkdir()
    outside.mkdir()
    (target / "link").symlink_to(outside)
    with pytest.raises(InvalidInput, match="outside of its folder"):
        of(artifacts, 2).load_folder(target)
    assert [path.name for path in target.iterdir()] == ["link"]
    assert list(outside.iterdir()) == []
    assert not (tmp_path / "evil").exists()
    assert not Path("/tmp/evil-of-mlplat").exists()


def test_a_folder_is_no_object_and_the_other_way_round(artifacts: ArtifactStore, tmp_path: Path) -> None:
    checkpoints = of(artifacts)
    checkpoints.save(1)
    with pytest.raises(InvalidInput, match="load gives it back"):
        checkpoints.load_folder(tmp_path)
    checkpoints.save_folder(tmp_path)
    with pytest.raises(InvalidInput, match="load_folder gives it back"):
        checkpoints.load()


def test_what_is_no_folder_is_refused(artifacts: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(InvalidInput, match="expected a folder"):
            of(artifacts).save_folder(path)
    assert of(artifacts).load() is None


@pytest.mark.parametrize(("best", "kept", "top"), [("max", [0.9, 0.8, 0.1], 0.9), ("min", [0.2, 0.3, 0.1], 0.1)])
def test_the_best_stay_beside_the_last(
    artifacts: ArtifactStore, best: Literal["max", "min"], kept: list[float], top: float
) -> None:
    checkpoints = Checkpoints(artifacts, [OWN], 1, 3, best)
    for score in (0.5, 0.9, 0.2, None, 0.8, 0.3, 0.1):
        checkpoints.save(score, score)
    assert len(manifests(artifacts)) == 3
    assert checkpoints.load() == 0.1
    assert checkpoints.load(best=True) == top
    after = Checkpoints(artifacts, [BEFORE, OWN], 1, 3, best)
    assert after.load(best=True) == top
    after.save("without a score")
    assert (after.load(), after.load(best=True)) == ("without a score", top)
    found = {checkpoints._manifest(f"{OWN}/{name.removesuffix('.json')}")["score"] for name in manifests(artifacts)}
    assert found == set(kept)


def test_without_scores_none_is_the_best_and_no_score_is_nan(artifacts: ArtifactStore, tmp_path: Path) -> None:
    checkpoints = Checkpoints(artifacts, [OWN], 1, 2, "max")
    for number in range(4):
        checkpoints.save(number)
    assert manifests(artifacts) == ["000001-000003.json", "000001-000004.json"]
    assert checkpoints.load("default", best=True) == "default"
    assert not checkpoints.load_folder(tmp_path, best=True)
    with pytest.raises(InvalidInput, match="must be a number"):
        checkpoints.save(1, float("nan"))
