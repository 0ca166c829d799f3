"""What an attempt needs to know, made from the definition and the values of its run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from mlplat.errors import InvalidInput
from mlplat.pipelines.expressions import as_text
from mlplat.pipelines.model import Attempt, AttemptRequest, ChildRequest, PipelineRun, Reservation, StepRun
from mlplat.pipelines.spec import Env, PipelineSpec, Step
from mlplat.pipelines.stored import canonical_form

CHILD_ID_BYTES = 6


def attempt_request(
    spec: PipelineSpec,
    run: PipelineRun,
    row: StepRun,
    step: Step,
    arguments: Mapping[str, Any],
    command: str | list[Any] | None,
) -> AttemptRequest:
    """The attempt with the number in ``row``; ``arguments`` and ``command`` are rendered."""
    env = spec.env_of(step)
    return AttemptRequest(
        pipeline=run.name,
        run_id=run.run_id,
        step=row.step,
        item=row.item,
        attempt=row.attempt,
        kind=step.kind,
        target=_target(step, command),
        arguments=arguments,
        max_attempts=step.retry.max_attempts,
        reservation=_reservation(step, env),
        working_dir=env.working_dir,
        timeout_s=step.timeout_s,
        durable=step.is_durable,
        fresh_process=step.fresh_process,
        keep_checkpoints=step.checkpoint.keep,
        best_checkpoints=step.checkpoint.best,
        checkpoints=tuple(
            checkpoint_folder(run_id, row.step, row.item) for run_id in (run.run_id, run.resumed_from) if run_id
        ),
        submitted_by=run.submitted_by,
        priority=run.priority,
    )


def child_request(
    run: PipelineRun, row: StepRun, inner: PipelineSpec, params: Mapping[str, Any], earlier: Attempt | None
) -> ChildRequest:
    """The run of a sub-pipeline. Its id follows from the attempt, so that a repeat finds the same run.

    Raises:
        InvalidInput: a parameter does not fit.
    """
    for name, value in params.items():
        if not isinstance(value, int | float | str | bool):
            raise InvalidInput(f"with.{name}: a sub-pipeline takes numbers, texts and booleans, not {value!r:.100}")
    seed = f"{run.run_id}/{row.step}/{row.item}/{row.attempt}"
    return ChildRequest(
        run_id=run.run_id,
        step=row.step,
        item=row.item,
        attempt=row.attempt,
        child_id=hashlib.sha256(seed.encode()).hexdigest()[: 2 * CHILD_ID_BYTES],
        spec=inner,
        params=dict(inner.resolve_params(params)),
        submitted_by=run.submitted_by,
        resumed_from=earlier.child_id if earlier is not None else None,
    )


def cache_key(request: AttemptRequest, version: str, code: str) -> str:
    """Equal for attempts that would do the same: code, arguments and environment.

    Args:
        version: the definition's own part of the key.
        code: digest of the code behind a name; a shipped function or notebook has its digest in the target.
    """
    parts = [request.kind, request.target, code, canonical_form(request.arguments), version]
    env = [request.reservation.env_vars, request.reservation.packages, request.working_dir]
    return hashlib.sha256(msgspec.json.encode([*parts, env], order="sorted")).hexdigest()


def checkpoint_folder(run_id: str, step: str, item: int) -> str:
    """Where the attempts of a node leave their checkpoints in the artifact store."""
    return f"pipelines/{run_id}/checkpoints/{step}/{item}"


def _reservation(step: Step, env: Env) -> Reservation:
    resources = step.resources
    return Reservation(
        resources.cpus,
        resources.gpus,
        resources.memory_mb,
        resources.accelerator,
        tuple(sorted(resources.custom.items())),
        tuple(sorted(env.variables.items())),
        tuple(env.packages),
    )


def _target(step: Step, command: str | list[Any] | None) -> str | list[str]:
    if step.command is None:
        return step.uses or step.notebook or ""
    if isinstance(command, list):
        return [as_text(part) for part in command]
    return command or ""
