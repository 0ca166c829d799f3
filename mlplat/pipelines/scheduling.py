"""What the pipeline scheduler does, apart from being an actor: accept, queue, assign, and re-assign.

The leader holds a lease. It keeps no truth: whatever it knows is in Postgres, and a new leader finds
it there. It never touches running work; executors own that.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

from sqlalchemy.ext.asyncio import AsyncEngine

from mlplat.db.engine import CONNECTION_ERRORS, why_away
from mlplat.db.group_commit import GroupCommit
from mlplat.db.lease import LeaseKeeper
from mlplat.errors import Fenced, InvalidInput, InvalidPipeline, Overloaded, PlatformError, Unavailable
from mlplat.pipelines.admission import AdmissionQueue, Candidate
from mlplat.pipelines.automation.service import Automation
from mlplat.pipelines.burst import Burst
from mlplat.pipelines.expressions import render
from mlplat.pipelines.model import Assignment, PipelineRun, State, Submission
from mlplat.pipelines.parsing import ParsedSpec, SpecCache
from mlplat.pipelines.resume import check_resume
from mlplat.pipelines.store import PipelineStore
from mlplat.pipelines.submissions import NewRun, SubmissionStore

RECONCILE_S = 1.0
#: An executor that has not answered for so long loses its runs to another one.
SILENCE_S = 5.0
RUN_ID_BYTES = 6
_log = logging.getLogger(__name__)


class Executor(Protocol):
    """An executor as the scheduler sees it. Methods raise ``Unavailable`` while it is out of reach."""

    @property
    def name(self) -> str:
        """Its actor name."""
        ...

    async def assign(self, assignments: Sequence[Assignment]) -> None:
        """Hands runs over; returns when the executor has them."""
        ...

    async def owned(self) -> Mapping[str, int]:
        """The runs it drives, with their epochs."""
        ...

    async def poke(self) -> None:
        """People told its runs something; it looks now."""
        ...


class ImportCheck(Protocol):
    """Tries to import ``module:function`` names where steps run."""

    def is_known(self, names: Sequence[str]) -> bool:
        """Whether all of these are known to be importable, without looking."""
        ...

    async def check(self, names: Sequence[str]) -> Mapping[str, str]:
        """Maps the names that cannot be imported to the reason."""
        ...


class SchedulerService:
    """The leader. Build it inside a running event loop, then ``await start()``."""

    def __init__(
        self,
        engine: AsyncEngine,
        lease: LeaseKeeper,
        executors: Sequence[Executor],
        imports: ImportCheck,
        *,
        max_active_runs: int,
    ) -> None:
        self._store = PipelineStore(engine)
        self._submissions = SubmissionStore(engine, lease)
        self._lease = lease
        self._executors = {executor.name: executor for executor in executors}
        self._lanes = {
            name: GroupCommit(executor.assign, max_group=500, max_pending=100_000)
            for name, executor in self._executors.items()
        }
        self._imports = imports
        self._burst = Burst()
        self._specs = SpecCache()
        self._queue = AdmissionQueue(max_active_runs)
        self._placed: dict[str, str] = {}
        #: Runs on their way to an executor, which does not know them yet.
        self._handing: set[str] = set()
        self._silent_since: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._automation = Automation(engine, lease, self.submit)

    async def start(self) -> None:
        """Waits for the leader's lease, finds what is open, then keeps runs placed in the background."""
        await self._lease.start()
        for run in await self._submissions.find_open(assigned=True):
            self._note_active(run)
        for run in await self._submissions.find_open(assigned=False):
            self._queue.add(_candidate(run))
        self._reconciler = asyncio.get_running_loop().create_task(self._reconcile_forever())
        self._automation.start()

    async def submit(self, submission: Submission) -> str:
        """Validates, stores and queues a run; returns its id once that is durable.

        Raises:
            InvalidPipeline: one problem a line, each with its path.
            InvalidInput: the idempotency key belongs to a different submission.
            NotFound: the run to resume does not exist.
            Overloaded: too many submissions at once, or the pipeline's concurrency key is full and says so.
            Unavailable: Postgres is away, or another scheduler leads.
        """
        self._burst.note()
        _refuse_nul(submission)
        try:
            new = await self._validate(submission)
            candidate = Candidate(
                new.run_id, new.priority, new.submitted_by, new.concurrency_key, new.concurrency_limit or 1
            )
            new.executor = self._place_at_once(candidate)
            return await self._store_new(new)
        except Fenced:
            self._lease.lost.set()
            raise
        except CONNECTION_ERRORS as error:
            raise Unavailable(why_away(error)) from error

    async def submit_known(self, submissions: Sequence[Submission]) -> list[str | PlatformError | None]:
        """Submits those whose definition and imports are known; the answer to the others is None.

        So nobody waits while something is imported for somebody else.
        """
        return await asyncio.gather(*(self._submit_if_known(submission) for submission in submissions))

    async def _submit_if_known(self, submission: Submission) -> str | PlatformError | None:
        if submission.resumed_from is not None:
            return None
        try:
            if not self._imports.is_known(self._specs.get(submission.spec).imports):
                return None
            return await self.submit(submission)
        except PlatformError as error:
            return error

    async def cancel(self, run_id: str, by: str) -> None:
        """Somebody has asked for the run's end, durably: it ends now if it waits, else its executor looks."""
        if run_id in self._placed:
            await self.poke(run_id)
        elif await self._submissions.end_waiting(run_id, State.CANCELLED, f"cancelled by {by}"):
            self._queue.end(run_id)

    async def poke(self, run_id: str) -> None:
        """People told the run something, durably: its executor looks now."""
        name = self._placed.get(run_id)
        if name is not None:
            await self._executors[name].poke()

    async def wake(self) -> None:
        """Schedules or triggers were changed or fired, durably: looks at them now."""
        self._automation.wake()

    async def ended(self, run_ids: Iterable[str]) -> None:
        """These runs are over: others may take their places."""
        for run_id in run_ids:
            self._placed.pop(run_id, None)
            self._queue.end(run_id)
        await self._admit()

    def lag(self) -> str:
        """What is under way and what waits, for people."""
        return f"{len(self._queue.active)} runs, {len(self._queue)} waiting"

    async def stop(self) -> None:
        """Gives the lease back."""
        await self._automation.stop()
        self._reconciler.cancel()
        await self._submissions.close()
        for lane in self._lanes.values():
            await lane.close()
        await self._lease.stop()

    async def _validate(self, submission: Submission) -> NewRun:
        parsed = self._specs.get(submission.spec)
        spec = parsed.spec
        params = dict(spec.resolve_params(submission.params))
        await self._require_imports(parsed)
        if submission.resumed_from is not None:
            check_resume(await self._store.get_snapshot(submission.resumed_from), spec, submission.from_step)
        key = None
        if spec.concurrency is not None:
            key = str(render(spec.concurrency.key, {"params": params}))[:1_000]
            await self._make_room(parsed, key, submission.idempotency_key)
        return NewRun(
            secrets.token_hex(RUN_ID_BYTES), spec.digest, spec.name, parsed.raw, params, submission.idempotency_key,
            submission.submitted_by, submission.source,
            spec.priority if submission.priority is None else submission.priority,
            key, None if spec.concurrency is None else spec.concurrency.limit,
            submission.resumed_from, submission.from_step, None,
        )  # fmt: skip

    async def _require_imports(self, parsed: ParsedSpec) -> None:
        if not parsed.imports:
            return
        failures = await self._imports.check(parsed.imports)
        problems = [f"{path}: {failures[name]}" for path, name in parsed.uses if name in failures]
        if problems:
            raise InvalidPipeline("\n".join(problems))

    async def _make_room(self, parsed: ParsedSpec, key: str, idempotency_key: str) -> None:
        """What the pipeline says about a full concurrency key. A submission that is repeated is no other run."""
        concurrency = parsed.spec.concurrency
        if concurrency is None or concurrency.when_full == "queue" or not self._queue.is_full(key, concurrency.limit):
            return
        if await self._submissions.is_known(idempotency_key):
            return
        if concurrency.when_full == "reject":
            holders = ", ".join(self._queue.holders(key)[:5])
            raise Overloaded(f"concurrency key {key!r} is full: {holders} of {parsed.spec.name!r} must end first")
        if concurrency.when_full == "cancel_running":
            for run_id in self._queue.holders(key):
                await self._store.cancel(run_id, "the scheduler", f"a newer run has the concurrency key {key!r}")
                await self.cancel(run_id, "the scheduler")

    def _place_at_once(self, candidate: Candidate) -> str | None:
        """The executor for a new run whose turn it is already; it counts as under way from here on."""
        self._queue.add(candidate)
        others: dict[str, str] = {}
        while (taken := self._queue.take_next()) is not None:
            executor = self._choose_executor(taken.run_id)
            if taken is candidate:
                break
            others[taken.run_id] = executor
        if others:
            self._in_background(self._assign(others))
        return self._placed.get(candidate.run_id)

    def _choose_executor(self, run_id: str) -> str:
        answering = self._executors.keys() - self._silent_since.keys()
        loads = dict.fromkeys(sorted(answering or self._executors), 0)
        for name in self._placed.values():
            if name in loads:
                loads[name] += 1
        chosen = min(loads, key=loads.__getitem__)
        self._placed[run_id] = chosen
        return chosen

    async def _store_new(self, new: NewRun) -> str:
        self._handing.add(new.run_id)  # from before it is durable, so that no look finds it with nobody
        try:
            run_id, is_new = await self._submissions.add(new)
        except BaseException:
            self._forget(new.run_id)
            raise
        if new.executor is None:
            self._handing.discard(new.run_id)
        if not is_new:
            self._forget(new.run_id)
        elif new.executor is not None:
            self._hand_over(new.executor, Assignment(run_id, 1, bytes(new.spec), _fresh(new)))
        return run_id

    def _forget(self, run_id: str) -> None:
        self._handing.discard(run_id)
        self._placed.pop(run_id, None)
        self._queue.end(run_id)

    def _hand_over(self, executor: str, assignment: Assignment) -> None:
        self._handing.add(assignment.run_id)
        self._in_background(self._hand_over_now(executor, assignment))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """What fails there, reconciling repeats: the runs are durable."""
        task = asyncio.get_running_loop().create_task(self._quietly(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _quietly(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except (PlatformError, *CONNECTION_ERRORS) as error:
            _log.warning("left to the next look: %s", error)

    async def _hand_over_now(self, executor: str, assignment: Assignment) -> None:
        try:
            await self._burst.over()
            await self._lanes[executor].submit(assignment)
        finally:
            self._handing.discard(assignment.run_id)

    async def _admit(self) -> None:
        """Gives waiting runs to executors, as far as there is room."""
        placements: dict[str, str] = {}
        while (candidate := self._queue.take_next()) is not None:
            placements[candidate.run_id] = self._choose_executor(candidate.run_id)
        await self._assign(placements)

    async def _assign(self, placements: Mapping[str, str]) -> None:
        self._handing.update(placements)
        try:
            epochs = await self._submissions.assign(placements)
        except BaseException:
            self._handing.difference_update(placements)
            raise
        for run_id, executor in placements.items():
            if run_id in epochs:
                self._hand_over(executor, Assignment(run_id, epochs[run_id]))
            else:
                self._forget(run_id)

    def _note_active(self, run: PipelineRun) -> None:
        if run.executor is not None:
            self._placed[run.run_id] = run.executor
        if not run.source.startswith("step:"):  # a sub-pipeline has its place through the run that it is part of
            self._queue.start(_candidate(run))

    async def _reconcile_forever(self) -> None:
        while True:
            try:
                await self._reconcile()
            except Fenced:
                self._lease.lost.set()
                return
            except (PlatformError, *CONNECTION_ERRORS) as error:
                _log.warning("reconcile: %s", error)
            await asyncio.sleep(RECONCILE_S)

    async def _reconcile(self) -> None:
        """Gives every open run that nobody drives to an executor, and finds out what nobody has told."""
        before = set(self._placed)
        open_runs = {run.run_id: run for run in await self._submissions.find_open(assigned=True)}
        for run_id in before - open_runs.keys():
            self._forget(run_id)
        for run in open_runs.values():
            self._note_active(run)
        for run_id, by in await self._submissions.find_cancelled_waiting():
            await self.cancel(run_id, by)
        await self._find_forgotten()
        await self._admit()
        handing = set(self._handing)  # as it was before anybody was asked: an answer may be older than the hand-over
        owned = await self._ask_executors() if open_runs else {}
        lost = [
            run.run_id for run in open_runs.values() if run.run_id not in handing and not self._is_driven(run, owned)
        ]
        await self._assign({run_id: self._choose_executor(run_id) for run_id in lost})

    async def _find_forgotten(self) -> None:
        """Queues runs that became durable when their submitter, or the answer to it, had gone."""
        waiting = await self._submissions.find_waiting()
        if any(not self._queue.knows(run_id) for run_id in waiting):
            for run in await self._submissions.find_open(assigned=False):
                self._queue.add(_candidate(run))

    def _is_driven(self, run: PipelineRun, owned: Mapping[str, Mapping[str, int]]) -> bool:
        if run.executor not in self._executors:
            return False
        if run.executor not in owned:
            return not self._is_given_up(run.executor)
        return owned[run.executor].get(run.run_id) == run.epoch

    async def _ask_executors(self) -> dict[str, Mapping[str, int]]:
        """What each executor drives; those that do not answer are left out, and since when is noted."""

        async def ask(executor: Executor) -> Mapping[str, int] | None:
            try:
                return await executor.owned()
            except Unavailable:
                return None

        answers = await asyncio.gather(*(ask(executor) for executor in self._executors.values()))
        owned: dict[str, Mapping[str, int]] = {}
        for name, answer in zip(self._executors, answers, strict=True):
            if answer is None:
                self._silent_since.setdefault(name, time.monotonic())
            else:
                self._silent_since.pop(name, None)
                owned[name] = answer
        return owned

    def _is_given_up(self, name: str) -> bool:
        """Whether others take its runs. A lone executor keeps them: Ray restarts it, and it has to do."""
        since = self._silent_since.get(name)
        others = self._executors.keys() - self._silent_since.keys()
        return since is not None and time.monotonic() - since > SILENCE_S and bool(others)


def _refuse_nul(submission: Submission) -> None:
    for name in ("idempotency_key", "submitted_by", "resumed_from", "from_step"):
        if "\x00" in (getattr(submission, name) or ""):
            raise InvalidInput(f"{name} may not contain NUL characters")


def _candidate(run: PipelineRun) -> Candidate:
    return Candidate(run.run_id, run.priority, run.submitted_by, run.concurrency_key, run.concurrency_limit or 1)


def _fresh(new: NewRun) -> PipelineRun:
    return PipelineRun(
        new.run_id, new.name, new.digest, new.params, State.QUEUED, executor=new.executor, epoch=1,
        submitted_by=new.submitted_by, created_at=datetime.now(UTC), priority=new.priority,
        concurrency_key=new.concurrency_key, concurrency_limit=new.concurrency_limit, source=new.source,
        resumed_from=new.resumed_from, resumed_step=new.resumed_step,
    )  # fmt: skip
