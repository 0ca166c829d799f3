"""Buckets of the tests' S3 server, by S3's own API."""

from __future__ import annotations

from typing import Any

from tests.s3 import S3Server


class Bucket:
    """A new bucket. ``client`` may be one that goes through something else, or gives up later."""

    def __init__(self, server: S3Server, client: Any = None) -> None:  # botocore has no types
        self.name = server.new_bucket()
        self.client = client or server.client()

    def put(self, key: str, body: bytes, **options: str) -> None:
        """Writes an object in one request."""
        self.client.put_object(Bucket=self.name, Key=key, Body=body, **options)

    def get(self, key: str, **options: str) -> bytes:
        """An object's bytes."""
        return bytes(self.client.get_object(Bucket=self.name, Key=key, **options)["Body"].read())

    def put_parts(self, key: str, bodies: list[bytes]) -> dict[str, Any]:
        """Uploads the parts of an object; returns what ``complete_multipart_upload`` takes to make it."""
        upload = {"Bucket": self.name, "Key": key}
        upload["UploadId"] = self.client.create_multipart_upload(**upload)["UploadId"]
        parts = [
            {"PartNumber": number, "ETag": self.client.upload_part(**upload, PartNumber=number, Body=body)["ETag"]}
            for number, body in enumerate(bodies, 1)
        ]
        return upload | {"MultipartUpload": {"Parts": parts}}

    def keys(self, prefix: str = "") -> list[str]:
        """All keys, in order."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def url(self, method: str, key: str) -> str:
        """A URL by which anybody may call ``get_object`` or ``put_object`` for a minute."""
        params = {"Bucket": self.name, "Key": key}
        return str(self.client.generate_presigned_url(method, Params=params, ExpiresIn=60))
