"""The part of the registry's coordinator that tells other systems what has happened.

It notes first, durably, and acts then: events become rows of the outbox together with the position in the log, and each
attempt is counted before it is made. Whoever is in charge afterwards goes on from there, so nothing is lost, whoever
dies when; what was sent and not noted is sent again, under the same delivery id.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.engine import CONNECTION_ERRORS
from mlplat.db.lease import LeaseKeeper
from mlplat.db.looking import look_forever, prune_forever
from mlplat.errors import Fenced, PlatformError
from mlplat.webhooks.model import Answer, DeliveryState, Retries, delivery_id
from mlplat.webhooks.outbox import Claim, Due, Outbox
from mlplat.webhooks.payload import body_of
from mlplat.webhooks.sender import Sender
from mlplat.webhooks.signing import headers

#: Between two looks, if nobody says that something has happened: a webhook is new, or a delivery is asked for again.
LOOK_S = 1.0
MAX_UNDERWAY = 64
#: Of one webhook: a receiver that is slow keeps nobody else waiting.
MAX_OF_ONE = 4
PRUNE_S = 3_600.0
_log = logging.getLogger(__name__)


class Deliveries:
    """Delivers events for as long as the lease is held. Build it inside a running event loop.

    Args:
        now: seconds since 1970, for the signatures.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        lease: LeaseKeeper,
        sender: Sender,
        retries: Retries | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._outbox = Outbox(engine, lease)
        self._lease = lease
        self._sender = sender
        self._retries = retries or Retries()
        self._now = now
        self._underway: dict[int, asyncio.Task[None]] = {}
        self._of: Counter[str] = Counter()
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Works in the background."""
        if not self._tasks:
            loop = asyncio.get_running_loop()
            self._tasks = [
                loop.create_task(look_forever(self.look, self._wake, self._lease, "webhooks", LOOK_S)),
                loop.create_task(prune_forever(self._outbox.prune, PRUNE_S)),
            ]

    def wake(self) -> None:
        """Something has happened: looks now."""
        self._wake.set()

    async def stop(self) -> None:
        """Ends; what is underway is sent again by whoever is in charge next."""
        tasks = [*self._tasks, *self._underway.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._sender.close()

    async def look(self) -> float:
        """Notes what is new, begins to deliver what is due, and returns the seconds until the next look.

        Raises:
            Fenced: another coordinator is in charge.
        """
        _ = self._lease.current
        while await self._outbox.fill():
            pass
        room = MAX_UNDERWAY - len(self._underway)
        if room <= 0:
            return LOOK_S
        busy = [webhook_id for webhook_id, count in self._of.items() if count >= MAX_OF_ONE]
        due, wait_s = await self._outbox.find_due(self._underway, busy, MAX_OF_ONE, 2 * MAX_UNDERWAY)
        for item in due:
            if len(self._underway) < MAX_UNDERWAY and self._of[item.webhook_id] < MAX_OF_ONE:
                self._begin(item)
        return LOOK_S if wait_s is None else min(LOOK_S, wait_s)

    async def settle(self) -> None:
        """Returns when every attempt that has begun is over."""
        while self._underway:
            await asyncio.wait(self._underway.values())
            await asyncio.sleep(0)

    def _begin(self, item: Due) -> None:
        task = asyncio.get_running_loop().create_task(self._deliver(item.number))
        self._underway[item.number] = task
        self._of[item.webhook_id] += 1
        task.add_done_callback(partial(self._is_over, item))

    def _is_over(self, item: Due, _task: asyncio.Task[None]) -> None:
        del self._underway[item.number]
        self._of -= Counter([item.webhook_id])
        self.wake()  # for what comes after it

    async def _deliver(self, number: int) -> None:
        try:
            claim = await self._outbox.claim(number)
            if claim is not None:
                await self._attempt(claim)
        except Fenced:
            self._lease.lost.set()
        except (PlatformError, *CONNECTION_ERRORS) as error:  # it is still PENDING, and tried again
            _log.warning("delivery %s: %s", number, error)
        except Exception:  # a defect in one delivery must not go unnoticed
            _log.exception("delivery %s", number)

    async def _attempt(self, claim: Claim) -> None:
        if claim.attempt > self._retries.max_attempts:
            await self._outbox.finish(claim, DeliveryState.DEAD, None, "the outcome of its last attempt is not known")
            return
        body, delivery = body_of(claim.event), delivery_id(claim.webhook_id, claim.event.event_id)
        signed = headers(claim.secret, delivery, claim.event.kind, int(self._now()), body)
        _ = self._lease.current  # as late as it can be: who has lost the lease meanwhile sends nothing
        await self._note(claim, await self._sender.post(claim.url, signed, body))

    async def _note(self, claim: Claim, answer: Answer) -> None:
        if not answer.error:
            await self._outbox.finish(claim, DeliveryState.DELIVERED, answer.status, "")
        elif self._retries.is_over(claim.attempt, answer):
            await self._outbox.finish(claim, DeliveryState.DEAD, answer.status, answer.error)
        else:
            luck = random.random()  # noqa: S311 - nobody gains by knowing it
            delay_s = self._retries.delay_s(claim.attempt, luck, answer.retry_after_s)
            await self._outbox.finish(claim, DeliveryState.PENDING, answer.status, answer.error, delay_s)
