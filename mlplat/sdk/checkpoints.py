"""``ctx.checkpoint``: what an attempt leaves for the one after it.

A checkpoint is a folder ``<attempt>-<number>`` of numbered files in the node's folder and, beside it, a small manifest
``<attempt>-<number>.json``. The manifest is written last, and the newest one counts: an attempt that dies half-way
through a save leaves the one before in force, and one that was given up writes below its successor's. What is equal
in several checkpoints is stored once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

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
        keep: how many stay; older ones go with the next save.
    """

    def __init__(self, artifacts: ArtifactStore, folders: Sequence[str], attempt: int, keep: int) -> None:
        self._artifacts = artifacts
        self._folders = folders
        self._attempt = attempt
        self._keep = keep
        self._count = 0

    def save(self, state: object) -> None:
        """Keeps an object, pickled. It is durable when this returns.

        Raises:
            InvalidInput: it cannot be pickled.
        """
        try:
            body = cloudpickle.dumps(state)
        except Exception as error:  # pickling runs the user's own code, which may raise anything
            raise InvalidInput(f"the checkpoint, a {type(state).__name__}, cannot be pickled: {error}") from error
        self._add("object", [("", [body])])

    def load(self, default: Any = None) -> Any:
        """The object that was saved last, by this attempt or one before it; ``default`` when there is none."""
        folder, manifest = self._newest()
        if manifest is None:
            return default
        if manifest["kind"] != "object":
            raise InvalidInput("the last checkpoint is a folder; load_folder gives it back")
        return cloudpickle.loads(b"".join(self._artifacts.read(f"{folder}/0")))

    def save_folder(self, folder: str | Path) -> None:
        """Keeps a folder with all its files. Files that an earlier checkpoint had take no room again.

        Raises:
            InvalidInput: no such folder, or more than ``MAX_FILES`` files.
        """
        root = Path(folder)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        if not root.is_dir() or len(files) > MAX_FILES:
            raise InvalidInput(f"{root}: expected a folder with at most {MAX_FILES} files")
        self._add("folder", ((str(path.relative_to(root)), _pieces(path)) for path in files))

    def load_folder(self, target: str | Path) -> bool:
        """Writes the folder that was saved last to ``target``; False when there is none.

        Raises:
            InvalidInput: it has a file that would be outside of ``target``; nothing is written.
        """
        folder, manifest = self._newest()
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

    def _add(self, kind: str, files: Iterable[tuple[str, Iterable[bytes]]]) -> None:
        self._count += 1
        own = self._folders[0]
        name = f"{self._attempt:06d}-{self._count:06d}"
        names = list[str]()
        for path, pieces in files:
            self._artifacts.write(f"{own}/{name}/{len(names)}", pieces)
            names.append(path)
        manifest = {"kind": kind, "files": names}
        self._artifacts.write(f"{own}/{name}.json", [json.dumps(manifest).encode()])
        for old in self._names(own)[: -self._keep]:
            self._artifacts.delete(f"{own}/{old}.json")
            self._artifacts.delete(f"{own}/{old}")

    def _newest(self) -> tuple[str, dict[str, Any] | None]:
        """Its folder and manifest."""
        for folder in self._folders:
            names = self._names(folder)
            if names:
                newest = f"{folder}/{names[-1]}"
                manifest: dict[str, Any] = json.loads(b"".join(self._artifacts.read(f"{newest}.json")))
                return newest, manifest
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
