"""Legal holds and quotas: kept in Postgres, asked before artifacts are written or removed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.tables import experiment, legal_hold, run, storage_quota
from mlplat.errors import InvalidInput, NotFound, PermissionDenied, StorageFull
from mlplat.storage.held import held_below, owners_of
from mlplat.storage.model import (
    MAX_REASON,
    Hold,
    HoldKind,
    Owner,
    Quota,
    Subject,
    owner_of,
    parse_subject,
    require_users,
)

#: A hold or quota of another process is obeyed after so long.
LOOK_AGE_S = 2.0
MAX_HOLDS, MAX_QUOTAS = 100_000, 100_000


@dataclass
class Written:
    """A write: how many bytes there is room for (None: there is no limit), and how many the file has in the end."""

    room: int | None
    size: int = 0


class StorageGuard:
    """Holds and quotas. All methods are safe to call concurrently."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._looked_at = float("-inf")
        self._holds: Mapping[Subject, Hold] = {}
        self._quotas: Mapping[int, Quota] = {}

    async def hold(self, kind: str, id_: str, reason: str, by: str) -> Hold:
        """Holds an experiment or run; again changes the reason.

        Raises:
            InvalidInput: no reason, or one too long.
            NotFound: no such experiment or run.
        """
        subject = parse_subject(kind, id_)
        if not 0 < len(reason.strip()) <= MAX_REASON:
            raise InvalidInput(f"a legal hold needs a reason, of at most {MAX_REASON} characters")
        is_it = run.c.run_id == id_ if subject.kind is HoldKind.RUN else experiment.c.experiment_id == int(id_)
        values = {"reason": reason.strip(), "user_id": by}
        statement = insert(legal_hold).values(kind=str(subject.kind), id=id_, **values)
        async with self._engine.begin() as connection:
            if (await connection.execute(select(func.count()).where(is_it))).scalar_one() == 0:
                raise NotFound(f"No such {subject.kind}: {id_}")
            if (await connection.execute(select(func.count()).select_from(legal_hold))).scalar_one() >= MAX_HOLDS:
                raise InvalidInput(f"there are {MAX_HOLDS} legal holds already; hold experiments instead of their runs")
            at = (
                await connection.execute(
                    statement.on_conflict_do_update(index_elements=["kind", "id"], set_=values).returning(
                        legal_hold.c.created_at
                    )
                )
            ).scalar_one()
        self._looked_at = float("-inf")
        return Hold(subject, reason.strip(), by, at)

    async def lift(self, kind: str, id_: str) -> None:
        """Ends a hold.

        Raises:
            NotFound: there is none.
        """
        subject = parse_subject(kind, id_)
        is_it = (legal_hold.c.kind == str(subject.kind)) & (legal_hold.c.id == id_)
        async with self._engine.begin() as connection:
            if not (await connection.execute(delete(legal_hold).where(is_it))).rowcount:
                raise NotFound(f"There is no legal hold on {subject}.")
        self._looked_at = float("-inf")

    async def holds(self) -> list[Hold]:
        """All holds, the newest first."""
        await self._look(fresh=True)
        return sorted(self._holds.values(), key=lambda hold: hold.at, reverse=True)

    async def hold_on(self, owner: Owner, *, fresh: bool = False) -> Hold | None:
        """The hold on an owner's files, None when there is none."""
        await self._look(fresh=fresh)
        return self._hold_on(owner)

    async def set_quota(self, experiment_id: int, limit_bytes: int | None, used_bytes: int) -> None:
        """Limits the artifacts of an experiment; None: no longer.

        Raises:
            NotFound: no such experiment.
        """
        async with self._engine.begin() as connection:
            is_it = experiment.c.experiment_id == experiment_id
            if (await connection.execute(select(func.count()).where(is_it))).scalar_one() == 0:
                raise NotFound(f"No such experiment: {experiment_id}")
            await connection.execute(delete(storage_quota).where(storage_quota.c.experiment_id == experiment_id))
            if limit_bytes is not None:
                values = {"experiment_id": experiment_id, "limit_bytes": limit_bytes, "used_bytes": used_bytes}
                await connection.execute(insert(storage_quota).values(values))
        self._looked_at = float("-inf")

    async def quotas(self) -> list[Quota]:
        """All quotas, by experiment."""
        await self._look(fresh=True)
        return [quota for _id, quota in sorted(self._quotas.items())]

    async def hold_at(self, path: str) -> Hold | None:
        """The hold on what lies at a path, whether the path or only the database tells whose that is."""
        await self._look()
        hold = self._hold_on(owner_of(path))
        if hold is not None or not self._holds:
            return hold
        async with self._engine.connect() as connection:
            owners = await owners_of(connection, path)
        return next((hold for hold in map(self._hold_on, owners) if hold is not None), None)

    async def require_removable(self, path: str) -> None:
        """Asks whether a file, or a folder with all in it, may be removed.

        Raises:
            PermissionDenied: a legal hold is on it, or on something in it, or it is the platform's own.
        """
        require_users(path)
        hold = await self.hold_at(path)
        if hold is None and self._holds:
            async with self._engine.connect() as connection:
                subject = await held_below(connection, path)
            hold = None if subject is None else self._holds.get(subject)
        if hold is not None:
            raise held(path, hold)

    @asynccontextmanager
    async def writing(self, path: str, size: int) -> AsyncIterator[Written]:
        """The block writes a file of about ``size`` bytes to a path, and says how large it is. The experiment's quota
        has that much less room meanwhile, whoever else writes.

        Raises:
            PermissionDenied: that path is the platform's own.
            StorageFull: the experiment would have more than its quota.
        """
        require_users(path)
        await self._look()
        quota = self._quota_of(path)
        left = None if quota is None else await self._take(quota.experiment_id, size)
        if quota is None or left is None:
            yield Written(None)
            return
        written = Written(left + size)
        try:
            yield written
        finally:
            await self._give_back(quota.experiment_id, size - written.size)

    async def measured(self, sizes: Mapping[int, int]) -> None:
        """The bytes that the experiments' artifacts have by a count of all files."""
        async with self._engine.begin() as connection:
            for (experiment_id,) in (await connection.execute(select(storage_quota.c.experiment_id))).all():
                is_it = storage_quota.c.experiment_id == experiment_id
                used = sizes.get(experiment_id, 0)
                await connection.execute(update(storage_quota).where(is_it).values(used_bytes=used))
        self._looked_at = float("-inf")

    async def _take(self, experiment_id: int, size: int) -> int | None:
        """Takes room out of a quota; how much is left. None: there is no quota any more."""
        is_it = storage_quota.c.experiment_id == experiment_id
        used, limit = storage_quota.c.used_bytes, storage_quota.c.limit_bytes
        take = update(storage_quota).where(is_it, used + size <= limit).values(used_bytes=used + size)
        async with self._engine.begin() as connection:
            left = (await connection.execute(take.returning(limit - used))).scalar()
            if left is not None:
                return int(left)
            row = (await connection.execute(select(used, limit).where(is_it))).one_or_none()
        if row is None:
            return None
        raise StorageFull(
            f"experiment {experiment_id} may have {row.limit_bytes} bytes of artifacts and has about "
            f"{row.used_bytes}; {size} more do not fit. Delete and purge some, or ask for a larger quota."
        )

    async def _give_back(self, experiment_id: int, size: int) -> None:
        """Room that was taken and not used; less than nothing was taken where more was used."""
        if size:
            is_it = storage_quota.c.experiment_id == experiment_id
            used = func.greatest(0, storage_quota.c.used_bytes - size)
            async with self._engine.begin() as connection:
                await connection.execute(update(storage_quota).where(is_it).values(used_bytes=used))

    def _hold_on(self, owner: Owner) -> Hold | None:
        return next((self._holds[subject] for subject in owner.subjects if subject in self._holds), None)

    def _quota_of(self, path: str) -> Quota | None:
        experiment_id = owner_of(path).experiment_id
        return None if experiment_id is None or not self._quotas else self._quotas.get(int(experiment_id))

    async def _look(self, *, fresh: bool = False) -> None:
        now = time.monotonic()
        if not fresh and now - self._looked_at < LOOK_AGE_S:
            return
        async with self._engine.connect() as connection:
            holds = (await connection.execute(select(legal_hold).limit(MAX_HOLDS))).all()
            quotas = (await connection.execute(select(storage_quota).limit(MAX_QUOTAS))).all()
        found = (Hold(Subject(HoldKind(row.kind), row.id), row.reason, row.user_id, row.created_at) for row in holds)
        self._holds = {hold.subject: hold for hold in found}
        self._quotas = {row.experiment_id: Quota(*row) for row in quotas}
        self._looked_at = now


def held(path: str, hold: Hold) -> PermissionDenied:
    """What is raised instead of replacing or removing what is at a path."""
    return PermissionDenied(
        f"The artifact '{path}' is under a legal hold ({hold.subject}: {hold.reason}): "
        "it can neither be changed nor removed."
    )
