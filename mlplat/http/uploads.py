"""Bodies of any size: streamed to a thread that stores them, with little of them in memory."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from mlplat.errors import InvalidInput
from mlplat.http.streams import in_pieces

#: Pieces are handed to the thread in this size, and as many may wait for it.
PIECE_BYTES = 1024 * 1024
QUEUE_PIECES = 4
#: Uploads that are stored at once; others wait.
MAX_UPLOADS = 6
#: An upload of which less than a piece comes in this time has broken off.
IDLE_S = 60.0
_DIGESTS = re.compile(r"\s*[a-z0-9-]+=:[A-Za-z0-9+/=]*:(\s*,\s*[a-z0-9-]+=:[A-Za-z0-9+/=]*:)*\s*\Z")
_SHA256 = re.compile(r"sha-256=:([A-Za-z0-9+/=]{44}):")

T = TypeVar("T")


class Uploads:
    """The uploads that one process stores, in threads of their own: slow ones keep nothing else waiting."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_UPLOADS, thread_name_prefix="uploads")
        self._turn = asyncio.Semaphore(MAX_UPLOADS)

    async def store(self, request: Request, store: Callable[[Iterator[bytes]], T]) -> T:
        """What ``store``, in a thread, makes of the body.

        Raises:
            InvalidInput: the body broke off, or hardly anything came for ``IDLE_S``; ``store`` got the same error.
        """
        async with self._turn:
            queue: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUE_PIECES)
            loop = asyncio.get_running_loop()
            broken = False

            def pieces() -> Iterator[bytes]:
                while True:
                    # Nobody is kept waiting for ever, also when the loop ends.
                    piece = asyncio.run_coroutine_threadsafe(queue.get(), loop).result(2 * IDLE_S)
                    if piece is None:
                        if broken:
                            raise InvalidInput("the upload broke off")
                        return
                    yield piece

            storing = loop.run_in_executor(self._threads, store, pieces())
            try:
                async with asyncio.timeout(IDLE_S) as idle:
                    async for piece in in_pieces(request.stream(), PIECE_BYTES):
                        idle.reschedule(None)
                        await _put(queue, piece, storing)
                        idle.reschedule(loop.time() + IDLE_S)
            except TimeoutError as error:
                broken = True
                raise InvalidInput(f"less than {PIECE_BYTES} bytes of the upload came in {IDLE_S:.0f} s") from error
            except ClientDisconnect as error:
                broken = True
                raise InvalidInput("the upload broke off") from error
            except BaseException:
                broken = True
                raise
            finally:
                await _put(queue, None, storing)
                await asyncio.wait([storing])
                storing.exception()  # it counts as seen: what is raised here tells more
            return storing.result()


def wanted_digest(request: Request) -> str | None:
    """The SHA-256 in hex that the body must have, by ``Content-Digest`` or ``Repr-Digest`` (RFC 9530).

    Raises:
        InvalidInput: the header has no SHA-256.
    """
    header = request.headers.get("content-digest") or request.headers.get("repr-digest")
    if header is None or ("sha-256=" not in header and _DIGESTS.match(header)):  # RFC 9530 lets others be ignored
        return None
    found = _SHA256.search(header)
    try:
        digest = base64.b64decode(found[1], validate=True) if found else b""
    except binascii.Error:
        digest = b""
    if len(digest) != 32:
        raise InvalidInput(f"not a digest as RFC 9530 has it, sha-256=:…: in Base64: {header[:100]!r}")
    return digest.hex()


async def _put(queue: asyncio.Queue[bytes | None], piece: bytes | None, storing: asyncio.Future[T]) -> None:
    """Queues a piece, unless the thread has ended (its error is raised by whoever awaits it)."""
    putting = asyncio.create_task(queue.put(piece))
    either: set[asyncio.Future[Any]] = {putting, storing}  # Any: their results are of two kinds
    await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    if not putting.done():
        putting.cancel()
        if piece is not None:
            storing.result()
