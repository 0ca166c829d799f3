"""``ctx.checkpoint``: what an attempt leaves for the one after it.

A checkpoint is a folder ``<attempt>-<number>`` of numbered files in the node's folder and, beside it, a small manifest
``<attempt>-<number>.json``. The manifest is written last, and the newest one counts: an attempt that dies half-way
through a save leaves the one before in force, and one that was given up writes below its successor's. What is equal
in several checkpoints is stored once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import cloudpickle

from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import InvalidInput

MAX_FILES = 10_000
PIECE_BYTES = 1024 * 1024


class Checkpoints:
    """Checkpoints of one node.

    Args:
        artifacts: where they are kept.
        folders: the node's own folder, then those of earlier runs that this one goes on from.
        attempt: number of the attempt under way.
        keep: how many stay; others go with the next save.
        best: which scores are better; beside the last checkpoint those with the best scores stay. None: the last ones.
    """

    def __init__(
        self,
        artifacts: ArtifactStore,
        folders: Sequence[str],
        attempt: int,
        keep: int,
        best: Literal["max", "min"] | None = None,
    ) -> None:
        self._best = best
        self._artifacts = artifacts
        self._folders = folders
        self._attempt = attempt
        self._keep = keep
        self._count = 0

    def save(self, state: object, score: float | None = None) -> None:
        """Keeps an object, pickled, with how good it is. It is durable when this returns.

        Raises:
            InvalidInput: it cannot be pickled, or the score is not a number.
        """
        try:
            body = cloudpickle.dumps(state)
        except Exception as error:  # pickling runs the user's own code, which may raise anything
            raise InvalidInput(f"the checkpoint, a {type(state).__name__}, cannot be pickled: {error}") from error
        self._add("object", [("", [body])], score)

    def load(self, default: Any = None, *, best: bool = False) -> Any:
        """The object that was saved last, or the one with the best score, by this attempt or one before it; ``default``
        when there is none."""
        folder, manifest = self._scored_best() if best else self._newest()
        if manifest is None:
            return default
        if manifest["kind"] != "object":
            raise InvalidInput("the last checkpoint is a folder; load_folder gives it back")
        return cloudpickle.loads(b"".join(self._artifacts.read(f"{folder}/0")))

    def save_folder(self, folder: str | Path, score: float | None = None) -> None:
        """Keeps a folder with all its files, and how good it is. What an earlier one had takes no room again.

        Raises:
            InvalidInput: no such folder, more than ``MAX_FILES`` files, or the score is not a number.
        """
        root = Path(folder)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        if not root.is_dir() or len(files) > MAX_FILES:
            raise InvalidInput(f"{root}: expected a folder with at most {MAX_FILES} files")
        self._add("folder", ((str(path.relative_to(root)), _pieces(path)) for path in files), score)

    def load_folder(self, target: str | Path, *, best: bool = False) -> bool:
        """Writes the folder that was saved last, or the one with the best score, to ``target``; False: there is none.

        Raises:
            InvalidInput: it has a file that would be outside of ``target``; nothing is written.
        """
        folder, manifest = self._scored_best() if best else self._newest()
        if manifest is None:
            return False
        if manifest["kind"] != "folder":
            raise InvalidInput("the last checkpoint is an object; load gives it back")
        paths = [_inside(Path(target), name) for name in manifest["files"]]
        for number, path in enumerate(paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as out:
                out.writelines(self._artifacts.read(f"{folder}/{number}"))
        return True

    def _add(self, kind: str, files: Iterable[tuple[str, Iterable[bytes]]], score: float | None) -> None:
        if score is not None and math.isnan(score):
            raise InvalidInput("the score of a checkpoint must be a number")
        self._count += 1
        own = self._folders[0]
        name = f"{self._attempt:06d}-{self._count:06d}"
        names = list[str]()
        for path, pieces in files:
            self._artifacts.write(f"{own}/{name}/{len(names)}", pieces)
            names.append(path)
        manifest = {"kind": kind, "files": names, "score": None if score is None else float(score)}
        self._artifacts.write(f"{own}/{name}.json", [json.dumps(manifest).encode()])
        for old in self._superfluous(own):
            self._artifacts.delete(f"{own}/{old}.json")
            self._artifacts.delete(f"{own}/{old}")

    def _superfluous(self, folder: str) -> list[str]:
        names = self._names(folder)
        if self._best is None or len(names) <= self._keep:
            return names[: -self._keep]
        earlier = sorted(names[:-1], key=lambda name: (self._rank(self._manifest(f"{folder}/{name}")), name))
        return earlier[: len(names) - self._keep]

    def _rank(self, manifest: dict[str, Any]) -> float:
        """Higher is better; without a score it is the worst. Any: JSON."""
        score = manifest.get("score")
        if score is None:
            return -math.inf
        return float(-score if self._best == "min" else score)

    def _scored_best(self) -> tuple[str, dict[str, Any] | None]:
        """Its folder and manifest; of equal ones the newest."""
        found = [f"{folder}/{name}" for folder in reversed(self._folders) for name in self._names(folder)]
        manifests = [(place, self._manifest(place)) for place in found]
        scored = [
            (self._rank(each), number)
            for number, (_place, each) in enumerate(manifests)
            if each.get("score") is not None
        ]
        return manifests[max(scored)[1]] if scored else ("", None)

    def _manifest(self, place: str) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads(b"".join(self._artifacts.read(f"{place}.json")))
        return manifest

    def _newest(self) -> tuple[str, dict[str, Any] | None]:
        """Its folder and manifest."""
        for folder in self._folders:
            names = self._names(folder)
            if names:
                newest = f"{folder}/{names[-1]}"
                return newest, self._manifest(newest)
        return "", None

    def _names(self, folder: str) -> list[str]:
        found = (entry.path for entry in self._artifacts.list(folder) if entry.path.endswith(".json"))
        return sorted(name.removesuffix(".json") for name in found)


def _inside(root: Path, name: str) -> Path:
    """The place of a file. Links that are in the folder already may lead out of it, too."""
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise InvalidInput(f"the checkpoint has a file outside of its folder: {name[:200]!r}")
    return path


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as source:
        while piece := source.read(PIECE_BYTES):
            yield piece
