"""``ctx.checkpoint``: what an attempt leaves for the one after it.

A checkpoint is content-addressed blobs and one small manifest, ``<attempt>-<number>.json`` in the node's folder. The
manifest is written last, and the newest one counts: an attempt that dies half-way through a save leaves the one
before in force, and one that was given up writes below its successor's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cloudpickle

from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import InvalidInput, NotFound

MAX_FILES = 10_000


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
        self._add({"kind": "object", "digest": self._artifacts.put_blob(body)})

    def load(self, default: Any = None) -> Any:
        """The object that was saved last, by this attempt or one before it; ``default`` when there is none."""
        manifest = self._newest()
        if manifest is None:
            return default
        if manifest["kind"] != "object":
            raise InvalidInput("the last checkpoint is a folder; load_folder gives it back")
        return cloudpickle.loads(self._artifacts.get_blob(manifest["digest"]))

    def save_folder(self, folder: str | Path) -> None:
        """Keeps a folder with all its files. Files that an earlier checkpoint had take no room again.

        Raises:
            InvalidInput: no such folder, or more than ``MAX_FILES`` files.
        """
        root = Path(folder)
        files = sorted(path for path in root.rglob("*") if path.is_file())
        if not root.is_dir() or len(files) > MAX_FILES:
            raise InvalidInput(f"{root}: expected a folder with at most {MAX_FILES} files")
        entries = {str(path.relative_to(root)): self._artifacts.put_blob(path.read_bytes()) for path in files}
        self._add({"kind": "folder", "files": entries})

    def load_folder(self, target: str | Path) -> bool:
        """Writes the folder that was saved last to ``target``; False when there is none."""
        manifest = self._newest()
        if manifest is None:
            return False
        if manifest["kind"] != "folder":
            raise InvalidInput("the last checkpoint is an object; load gives it back")
        for name, digest in manifest["files"].items():
            path = Path(target) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._artifacts.get_blob(digest))
        return True

    def _add(self, manifest: dict[str, Any]) -> None:
        self._count += 1
        own = self._folders[0]
        name = f"{self._attempt:06d}-{self._count:06d}.json"
        self._artifacts.write(f"{own}/{name}", [json.dumps(manifest).encode()])
        for old in self._names(own)[: -self._keep]:
            self._artifacts.delete(f"{own}/{old}")

    def _newest(self) -> dict[str, Any] | None:
        for folder in self._folders:
            names = self._names(folder)
            if names:
                manifest: dict[str, Any] = json.loads(b"".join(self._artifacts.read(f"{folder}/{names[-1]}")))
                return manifest
        return None

    def _names(self, folder: str) -> list[str]:
        try:
            return sorted(entry.path for entry in self._artifacts.list(folder) if entry.path.endswith(".json"))
        except NotFound:
            return []
