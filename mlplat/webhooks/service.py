"""Webhooks for the HTTP layer: what is asked for is checked, and can be tried."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from mlplat.webhooks.model import Answer, Webhook, check_secret, check_url, new_secret
from mlplat.webhooks.payload import body_of_test
from mlplat.webhooks.sender import Sender
from mlplat.webhooks.signing import headers
from mlplat.webhooks.store import NewWebhook, WebhookStore


@dataclass(frozen=True)
class Made:
    """A webhook, and the secret that was made up for it, which is not shown again."""

    webhook: Webhook
    secret: str | None = field(default=None, repr=False)


class Webhooks:
    """All methods are safe to call concurrently; ``store`` has what needs no check."""

    def __init__(self, store: WebhookStore, sender: Sender) -> None:
        self.store = store
        self._sender = sender

    async def create(self, new: NewWebhook) -> Made:
        """Adds a webhook; without a secret (an empty one) it gets one.

        Raises:
            InvalidInput: the URL or the secret is refused.
            AlreadyExists: another one has the name.
            Overloaded: there are too many.
        """
        made_up = None if new.secret else new_secret()
        checked = replace(new, url=await self._checked(new.url), secret=made_up or check_secret(new.secret))
        return Made(await self.store.create(checked), made_up)

    async def change(self, key: str, values: Mapping[str, Any]) -> Made:
        """Replaces columns; an empty secret asks for a new one.

        Raises:
            InvalidInput: the URL or the secret is refused.
            AlreadyExists: another one has the name.
        """
        new, made_up = dict(values), None
        if "url" in new:
            new["url"] = await self._checked(new["url"])
        if "secret" in new:
            made_up = None if new["secret"] else new_secret()
            new["secret"] = made_up or check_secret(new["secret"])
        return Made(await self.store.change(key, new), made_up)

    async def test(self, key: str, mlflow_name: str | None = None) -> Answer:
        """Sends an event of the kind ``test`` now, once; see ``body_of_test``."""
        found, secret = await self.store.get_with_secret(key)
        body = body_of_test(datetime.now(UTC).isoformat(), mlflow_name)
        signed = headers(secret, f"test-{uuid.uuid4().hex}", "test", int(time.time()), body)
        return await self._sender.post(found.url, signed, body)

    async def _checked(self, url: str) -> str:
        await self._sender.check(check_url(url))
        return url
