"""/api/v1/artifacts: files as lists of chunks, so that clients send only what the platform does not have."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from mlplat.artifacts.direct import DirectTransfers
from mlplat.artifacts.entry import Entry
from mlplat.artifacts.frames import decode_frames
from mlplat.artifacts.model import safe_path
from mlplat.http.guarded import guarded
from mlplat.http.services import Services
from mlplat.http.uploads import Uploads

#: Digests that one request may ask about.
MAX_ASKED = 10_000
MAX_CHUNKS = 1_000_000
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Chunking(BaseModel):
    """How files are cut: by FastCDC (2020) with this average, a quarter of it at least, four times as much at most."""

    average_bytes: int
    #: Whether chunks may go straight to the bucket and come from there.
    direct: bool
    #: The folder that chunks are in, for clients that have it, too, and the text in its file `.collector/place`.
    folder: str | None = None
    place: str | None = None


class Asked(BaseModel):
    """SHA-256 digests of chunks."""

    sha256: list[Sha256] = Field(max_length=MAX_ASKED)
    urls: bool = Field(default=False, description="Say where in the bucket to send them, where that is possible.")


class Missing(BaseModel):
    """Those that have to be sent. With `urls`, they may be PUT there, each with the header `x-amz-checksum-sha256` (its
    digest in Base64), and then be named to `/accepted`."""

    missing: list[str]
    urls: dict[str, str] = {}


class Sent(BaseModel):
    """SHA-256 and size of chunks that were sent to the bucket."""

    chunks: list[tuple[Sha256, int]] = Field(max_length=MAX_ASKED)


class Received(BaseModel):
    """Chunks that are stored."""

    chunks: int


class FileOfChunks(BaseModel):
    """A file: its size in bytes, its SHA-256, and SHA-256 and size of its chunks in order."""

    size: int = Field(ge=0)
    sha256: Sha256
    chunks: list[tuple[Sha256, int]] = Field(max_length=MAX_CHUNKS)
    #: Where in the bucket the chunks are, in order, if that was asked; those that end in .zst before the ? are packed.
    urls: list[str] = []


def router(services: Services, uploads: Uploads) -> APIRouter:
    """The routes."""
    api = APIRouter(prefix="/api/v1/artifacts", tags=["artifacts"])
    artifacts = services.artifacts
    direct = DirectTransfers(artifacts, allowed=services.direct_artifacts)

    @api.get("/chunking")
    async def chunking() -> Chunking:
        """How this platform's files are cut into chunks."""
        folder, place = await asyncio.to_thread(artifacts.place) or (None, None)
        return Chunking(
            average_bytes=artifacts.objects.chunk_bytes, direct=direct.are_possible, folder=folder, place=place
        )

    @api.post("/missing", response_model_exclude_defaults=True)
    async def missing(asked: Asked) -> Missing:
        """Which chunks the platform does not have."""
        found = await asyncio.to_thread(artifacts.missing, asked.sha256)
        urls = await asyncio.to_thread(direct.urls_to_write, found) if asked.urls else {}
        return Missing(missing=found, urls=urls)

    @api.post("/accepted")
    async def accept(sent: Sent) -> Received:
        """Makes chunks of what was sent to the bucket, once it is certain that the bytes are right."""
        await asyncio.to_thread(direct.accept, sent.chunks)
        return Received(chunks=len(sent.chunks))

    @api.post("/chunks")
    async def put_chunks(request: Request) -> Received:
        """Stores chunks: a body of frames, each 32 bytes SHA-256, size and number of bytes (both 4 bytes, big-endian),
        and the bytes, compressed with zstd when they are fewer than the size. Digests that do not agree are refused."""

        def store(pieces: Iterator[bytes]) -> int:
            return sum(1 for _chunk in artifacts.put_frames(decode_frames(pieces)))

        return Received(chunks=await uploads.store(request, store))

    @api.put("/files/{path:path}", response_model_exclude_defaults=True)
    async def assemble(path: str, file: FileOfChunks) -> FileOfChunks:
        """Makes a file of chunks that the platform has; 409 when some are missing."""
        path = safe_path(path)
        async with guarded(services, path, file.size) as written:
            entry = await asyncio.to_thread(artifacts.assemble, path, file.size, file.sha256, file.chunks)
            written.size = entry.size
        return _told(entry)

    @api.get("/files/{path:path}", response_model_exclude_defaults=True)
    async def file(path: str, urls: bool = False) -> FileOfChunks:
        """The chunks of a file."""
        entry = await asyncio.to_thread(artifacts.entry, safe_path(path))
        told = _told(entry)
        if urls:
            told.urls = await asyncio.to_thread(direct.urls_to_read, entry)
        return told

    return api


def _told(entry: Entry) -> FileOfChunks:
    if entry.body is not None:
        chunks = [(entry.sha256, entry.size)] if entry.size else []
    else:
        chunks = [(chunk.sha256, chunk.size) for chunk in entry.chunks]
    return FileOfChunks(size=entry.size, sha256=entry.sha256, chunks=chunks)
