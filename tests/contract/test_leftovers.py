"""Which processes of durable attempts are ended, and which are still waited for."""

from __future__ import annotations

from mlplat.pipelines.leftovers import LeftoverReaper
from mlplat.pipelines.model import WHOLE_STEP, Attempt, AttemptState, State, attempt_label
from tests.contract.pipelines import NOW, Pipelines, change, transition


class Processes:
    """Those that there are, by label."""

    def __init__(self, labels: list[str]) -> None:
        self.alive = labels

    async def labels(self) -> list[str]:
        return list(self.alive)

    def kill(self, label: str) -> None:
        self.alive.remove(label)


async def test_only_processes_of_open_attempts_stay(pipelines: Pipelines) -> None:
    run_id, epoch = await pipelines.run()
    states = dict(enumerate(AttemptState, start=1))
    attempts = [Attempt("train", 0, number, state, NOW) for number, state in states.items()]
    await pipelines.writer.write(transition(run_id, epoch, [], attempts, change(run_id, State.RUNNING)))
    of_run = {number: attempt_label(run_id, "train", 0, number) for number in states}
    strange = [
        attempt_label(run_id, "train", WHOLE_STEP, 1), attempt_label(run_id, "train", 1, 1),
        attempt_label(run_id, "check", 0, 1), attempt_label("nobody", "train", 0, 1),
        attempt_label(run_id, "train", 0, 32_767),
    ]  # fmt: skip
    processes = Processes([*of_run.values(), *strange, "somebody's"])
    ended = await LeftoverReaper(pipelines.engine, processes).reap()
    wanted = [of_run[number] for number, state in states.items() if not state.is_final]
    assert len(wanted) == 2
    assert processes.alive == [*wanted, "somebody's"]
    assert set(ended) == {*of_run.values(), *strange} - set(wanted)
    assert await LeftoverReaper(pipelines.engine, processes).reap() == []


async def test_when_its_run_is_over_an_attempt_is_not_waited_for(pipelines: Pipelines) -> None:
    run_id, epoch = await pipelines.run()
    attempts = [Attempt("train", WHOLE_STEP, 1, AttemptState.RUNNING, NOW)]
    await pipelines.writer.write(transition(run_id, epoch, [], attempts, change(run_id, State.FAILED, finished_at=NOW)))
    processes = Processes([attempt_label(run_id, "train", WHOLE_STEP, 1)])
    assert len(await LeftoverReaper(pipelines.engine, processes).reap()) == 1
    assert processes.alive == []
