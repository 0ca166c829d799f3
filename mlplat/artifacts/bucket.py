"""Objects of an S3 bucket."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from mlplat.artifacts.digests import in_base64
from mlplat.artifacts.folder import Folder
from mlplat.artifacts.objects import Child, ObjectInfo, Objects
from mlplat.errors import StorageFull, Unavailable

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 60
#: Tries of one request, with exponential waits and jitter between them (botocore's "standard" mode).
MAX_ATTEMPTS = 6
CONNECTIONS = 64
#: S3's limit of one DeleteObjects.
DELETED_AT_ONCE = 1_000
#: How long a signed URL works, in seconds.
SIGNED_FOR_S = 3_600

_CONFIG = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "read_timeout": READ_TIMEOUT_S,
    "max_pool_connections": CONNECTIONS,
    "retries": {"mode": "standard", "total_max_attempts": MAX_ATTEMPTS},
    "signature_version": "s3v4",
    # The store says what checksum its blobs have: botocore need not hash them once more to sign them, nor send
    # checksums of its own, which servers other than AWS refuse.
    "s3": {"payload_signing_enabled": False},
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}


def open_objects(url: str) -> Objects:
    """The objects at ``file:///…`` or ``s3://bucket/prefix``."""
    filesystem, root = open_filesystem(url)
    return Bucket(filesystem, root) if url.startswith("s3://") else Folder(root)


def open_filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Any: fsspec has no types."""
    # Listings are never cached: other processes write to the bucket too.
    options = {"use_listings_cache": False} | ({"config_kwargs": _CONFIG} if url.startswith("s3://") else {})
    filesystem, root = fsspec.core.url_to_fs(url, **options)
    return filesystem, root.rstrip("/")


class Bucket:
    """A bucket, or what is below a prefix of its keys. It may have an object ``a`` beside one ``a/b``."""

    is_near = False
    chunk_bytes = 4 * 1024 * 1024
    parallel = 6

    def __init__(self, filesystem: Any, root: str) -> None:
        # Any: s3fs has no types.
        self._fs = filesystem
        self._root = root
        self._bucket, _slash, prefix = root.partition("/")
        self._prefix = f"{prefix}/" if prefix else ""

    def make_folders(self, folders: Iterable[str]) -> None:
        """See ``Objects``; a bucket has none."""

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes | None:
        """See ``Objects``."""
        if end is not None and end <= start:
            return None if self.info(key) is None else b""
        try:
            with self._told():
                body: bytes = self._fs.cat_file(f"{self._root}/{key}", start=start or None, end=end)
                return body
        except FileNotFoundError:
            return None
        except _OutOfRange:
            return b""

    def write(
        self,
        key: str,
        body: bytes | memoryview,
        *,
        only_new: bool = False,
        sha256: str | None = None,
        named_later: bool = False,
    ) -> bool:
        """See ``Objects``."""
        del named_later  # a bucket knows no difference
        more = {"IfNoneMatch": "*"} if only_new else {}
        if sha256 is not None:
            more["ChecksumSHA256"] = in_base64(sha256)
        try:
            with self._told():
                self._call("put_object", Key=self._prefix + key, Body=bytes(body), **more)
        except FileExistsError:
            return False
        return True

    def sync(self, keys: Iterable[str]) -> None:
        """See ``Objects``."""

    def info(self, key: str) -> ObjectInfo | None:
        """See ``Objects``."""
        try:
            with self._told():
                found = self._call("head_object", Key=self._prefix + key)
        except FileNotFoundError:
            return None
        return _info(key, found["ContentLength"], found)

    def children(self, folder: str) -> list[Child]:
        """See ``Objects``."""
        prefix = self._prefix + (f"{folder}/" if folder else "")
        found = list[Child]()
        for page in self._pages(Prefix=prefix, Delimiter="/"):
            found += [
                Child(each["Prefix"][len(prefix) :].rstrip("/"), None) for each in page.get("CommonPrefixes") or ()
            ]
            found += [
                Child(each["Key"][len(prefix) :], self._listed(each))
                for each in page.get("Contents") or ()
                if each["Key"] != prefix
            ]
        return found

    def walk(self, folder: str) -> Iterator[ObjectInfo]:
        """See ``Objects``."""
        for page in self._pages(Prefix=self._prefix + (f"{folder}/" if folder else "")):
            for each in page.get("Contents") or ():
                yield self._listed(each)

    def delete(self, key: str) -> None:
        """See ``Objects``."""
        with self._told():
            self._call("delete_object", Key=self._prefix + key)
        keys = [{"Key": self._prefix + info.key} for info in self.walk(key)]
        for start in range(0, len(keys), DELETED_AT_ONCE):
            with self._told():
                gone = self._call("delete_objects", Delete={"Objects": keys[start : start + DELETED_AT_ONCE]})
            if gone.get("Errors"):
                raise Unavailable(f"the bucket {self._bucket} keeps objects: {gone['Errors'][0]}")

    def url_to_read(self, key: str) -> str:
        """A URL by which anybody reads an object, for ``SIGNED_FOR_S`` seconds."""
        return self._sign("get_object", key, {})

    def url_to_write(self, key: str, sha256: str) -> str:
        """A URL by which anybody writes an object, with the header of ``digests.s3_checksum`` and these bytes alone, if
        the server looks at checksums."""
        return self._sign("put_object", key, {"ChecksumSHA256": in_base64(sha256)})

    def checked_size(self, key: str, sha256: str) -> int | None:
        """The size of an object of which the server itself has seen that it has this SHA-256; None: it does not say."""
        try:
            with self._told():
                found = self._call("head_object", Key=self._prefix + key, ChecksumMode="ENABLED")
        except FileNotFoundError:
            return None
        return int(found["ContentLength"]) if found.get("ChecksumSHA256") == in_base64(sha256) else None

    def copy(self, source: str, target: str) -> bool:
        """Copies an object within the bucket; False: there is none."""
        where = {"Bucket": self._bucket, "Key": self._prefix + source}
        try:
            with self._told():
                self._call("copy_object", Key=self._prefix + target, CopySource=where)
        except FileNotFoundError:
            return False
        return True

    def _sign(self, method: str, key: str, more: dict[str, str]) -> str:
        with self._told():
            url: str = self._fs.sign(f"{self._root}/{key}", expiration=SIGNED_FOR_S, client_method=method, **more)
        return url

    def _pages(self, **request: Any) -> Iterator[dict[str, Any]]:
        """The pages of a listing. Any: S3's own requests and answers."""
        token: dict[str, Any] = {}
        while True:
            with self._told():
                page = self._call("list_objects_v2", **request, **token)
            yield page
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def _call(self, method: str, **request: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self._fs.call_s3(method, Bucket=self._bucket, **request)
        return answer

    def _listed(self, entry: dict[str, Any]) -> ObjectInfo:
        return _info(entry["Key"][len(self._prefix) :], entry["Size"], entry)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What the libraries below raise, as what the contract says."""
        try:
            yield
        except Exception as error:  # s3fs, botocore and aiohttp each have errors of their own
            code = _code(error)
            if isinstance(error, FileNotFoundError) and code != "NoSuchBucket":
                raise
            if code == "PreconditionFailed" or isinstance(error, FileExistsError):
                raise FileExistsError from error
            if code == "InvalidRange":
                raise _OutOfRange from error
            if code in {"QuotaExceeded", "InsufficientCapacity"}:
                raise StorageFull(f"the bucket {self._bucket} has no room: {error}") from error
            raise Unavailable(
                f"the bucket {self._bucket} does not answer as it should: {code or type(error).__name__}: {error}"
            ) from error


class _OutOfRange(Exception):
    """A range that begins behind the end."""


def _info(key: str, size: int, facts: dict[str, Any]) -> ObjectInfo:
    modified_s = float(int(facts["LastModified"].timestamp()))  # HEAD tells no fractions, listings may
    return ObjectInfo(key, size, modified_s, f"{facts.get('ETag', '')}.{modified_s:.0f}")


def _code(error: BaseException | None) -> str:
    """S3's code of an error, wherever s3fs hides it."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""
