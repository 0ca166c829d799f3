"""Writing the files of an archive: a folder, or a tar. It appears under its name when it is complete."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from mlplat.errors import AlreadyExists
from mlplat.tracking.archive import FORMAT, MANIFEST, VERSION, FileEntry, Manifest


class ArchiveWriter:
    """Writes an archive beside its final place; ``.tar`` at the end of the name makes it a tar."""

    def __init__(self, target: Path) -> None:
        """Raises:
        AlreadyExists: something is there already.
        """
        if target.exists() or target.is_symlink():
            raise AlreadyExists(f"{target} exists already")
        self._target = target
        self._files: dict[str, FileEntry] = {}
        target.parent.mkdir(parents=True, exist_ok=True)
        self._scratch = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=target.parent))
        self._content = self._scratch / "content"
        self._tar: tarfile.TarFile | None = None
        if target.suffix == ".tar":
            self._tar = tarfile.open(self._content, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115 - closed by `finish`
        else:
            self._content.mkdir()
        self._count = 0

    def new_path(self) -> Path:
        """A path for a file that is to be added."""
        self._count += 1
        return self._scratch / str(self._count)

    def add(self, name: str, file: Path) -> None:
        """Takes a file over as ``name``."""
        with file.open("rb") as body:
            digest = hashlib.file_digest(body, "sha256").hexdigest()
        self._files[name] = FileEntry(digest, file.stat().st_size)
        self._place(name, file)

    def add_bytes(self, name: str, body: bytes) -> None:
        """Adds a small file."""
        file = self.new_path()
        file.write_bytes(body)
        self.add(name, file)

    def finish(self, runs: int, points: int, models: int = 0) -> Manifest:
        """Writes the manifest and puts the archive in its place."""
        manifest = Manifest(FORMAT, VERSION, runs, points, self._files, models)
        file = self.new_path()
        file.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
        self._place(MANIFEST, file)
        if self._tar is not None:
            self._tar.close()
            with self._content.open("rb") as body:
                os.fsync(body.fileno())
        if self._target.exists():
            raise AlreadyExists(f"{self._target} exists already")
        self._content.rename(self._target)
        self._scratch.rmdir()
        return manifest

    def discard(self) -> None:
        """Removes what was written; fine after ``finish``."""
        if self._tar is not None:
            self._tar.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _place(self, name: str, file: Path) -> None:
        if self._tar is None:
            place = self._content / name
            place.parent.mkdir(parents=True, exist_ok=True)
            file.rename(place)
            return
        member = tarfile.TarInfo(name)
        member.size, member.mtime, member.mode = file.stat().st_size, int(file.stat().st_mtime), 0o644
        with file.open("rb") as body:
            self._tar.addfile(member, body)
        file.unlink()


@contextmanager
def writing(target: Path) -> Iterator[ArchiveWriter]:
    """A writer that leaves nothing behind when the block fails."""
    writer = ArchiveWriter(target)
    try:
        yield writer
    finally:
        writer.discard()
