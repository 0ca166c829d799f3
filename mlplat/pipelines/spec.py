"""The one form that YAML and Python definitions compile to. Its JSON Schema is ``mlplat pipeline schema``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from mlplat.pipelines.parameters import Parameter, ParameterValue, Strict, resolve_params

MAX_STEPS = 10_000
#: Sub-pipelines inside sub-pipelines.
MAX_DEPTH = 8
WEEK_S = 7 * 86_400

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_\-]{0,62}$")]
#: Step and parameter names are identifiers, because expressions use them unquoted.
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,62}$")]


def _exception_name(value: object) -> object:
    """Python says which exception by its class."""
    if not isinstance(value, type):
        return value
    return value.__qualname__ if value.__module__ == "builtins" else f"{value.__module__}.{value.__qualname__}"


#: The class of an exception, with or without its module: ``ConnectionError``, ``requests.exceptions.Timeout``.
ExceptionName = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]{0,200}$"), BeforeValidator(_exception_name)]
EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Seconds = Annotated[float, Field(gt=0, le=WEEK_S)]

#: What a step is, exactly one of these fields.
KINDS = ("uses", "command", "notebook", "pipeline", "approval")


class Retry(Strict):
    """How often a failing step is tried, how long it waits before each further attempt, and for which errors.

    ``on`` and ``never_on`` name exception classes; a subclass counts as its base. ``never_on`` wins.
    """

    max_attempts: int = Field(default=1, ge=1, le=100)
    initial_s: float = Field(default=1.0, ge=0, le=86_400)
    factor: float = Field(default=2.0, ge=1, le=10)
    cap_s: float = Field(default=60.0, ge=0, le=86_400)
    #: Fraction of the wait that is random.
    jitter: float = Field(default=0.1, ge=0, le=1)
    on: list[ExceptionName] = Field(default_factory=list, max_length=50)
    never_on: list[ExceptionName] = Field(default_factory=list, max_length=50)


class Resources(Strict):
    """What an attempt reserves on its node."""

    cpus: float = Field(default=1.0, ge=0, le=4_096)
    gpus: float = Field(default=0.0, ge=0, le=1_024)
    memory_mb: int | None = Field(default=None, ge=1)
    #: As Ray names it: ``A100``, ``H100``, ``TPU-V4`` …
    accelerator: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_\-]{1,64}$")
    #: Ray's custom resources.
    custom: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_:.\-]{1,128}$")], Annotated[float, Field(gt=0, le=1e6)]] = (
        Field(default_factory=dict, max_length=50)
    )


class Env(Strict):
    """The environment of an attempt; Ray builds it on the attempt's node and keeps it for the next."""

    #: Requirements, as pip takes them.
    packages: list[Annotated[str, Field(min_length=1, max_length=500)]] = Field(default_factory=list, max_length=500)
    variables: dict[EnvName, Annotated[str, Field(max_length=32_768)]] = Field(default_factory=dict, max_length=500)
    #: A folder beside the definition; the definition that is sent has the digest of its zip file.
    working_dir: str | None = Field(default=None, min_length=1, max_length=1_000)


class Cache(Strict):
    """The step may take the output of an earlier attempt with equal code, inputs and environment."""

    #: Older outputs do not count; None: they always do.
    ttl_s: float | None = Field(default=None, gt=0)
    #: Part of the key: raise it to leave earlier outputs behind.
    version: str = Field(default="", max_length=200)


class Checkpoint(Strict):
    """What is kept of an attempt's checkpoints."""

    keep: int = Field(default=3, ge=1, le=1_000)
    #: Which scores are better: beside the last checkpoint those with the best scores stay. None: the last ones stay.
    best: Literal["max", "min"] | None = None


class Approval(Strict):
    """The run waits here until a person approves; a rejection fails the step."""

    message: str = Field(default="", max_length=10_000)
    #: Who may decide; empty: anybody but the submitter, if ``not_submitter``.
    approvers: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(default_factory=list, max_length=100)
    not_submitter: bool = False


class Concurrency(Strict):
    """At most ``limit`` runs with equal ``key`` at once."""

    #: May have expressions over ``params``.
    key: str = Field(min_length=1, max_length=500)
    limit: int = Field(default=1, ge=1, le=10_000)
    #: What happens to a run beyond the limit, or to those before it.
    when_full: Literal["queue", "cancel_running", "reject"] = "queue"


class Step(Strict):
    """One step. ``needs`` lists what must come first; expressions add what they read."""

    uses: str | None = Field(
        default=None, pattern=r"^(pickle:[0-9a-f]{64}:\S+|[A-Za-z_][\w.]*:[A-Za-z_][\w.]*)$",
        description="module:function",
    )  # fmt: skip
    #: A shell command, or a program with its arguments.
    command: str | list[str] | None = Field(default=None, min_length=1)
    #: A notebook beside the definition; the definition that is sent has ``blob:<digest>:<name>``.
    notebook: str | None = Field(default=None, min_length=1, max_length=1_000)
    #: A definition inside this one. YAML files may name another file.
    pipeline: PipelineSpec | None = None
    approval: Approval | None = None
    description: str = ""
    needs: list[Identifier] = Field(default_factory=list)
    with_: dict[Identifier, JsonValue] = Field(default_factory=dict, alias="with")
    #: An expression; the step is SKIPPED when it gives false, null, 0 or something empty.
    when: str | None = None
    #: An expression that gives a list, or a list: the step runs once per element, as ``item``.
    foreach: str | list[JsonValue] | None = None
    #: Items of the fan-out that run at once.
    max_parallel: int | None = Field(default=None, ge=1, le=100_000)
    retry: Retry = Retry()
    #: Per attempt, from its start on a worker.
    timeout_s: Seconds | None = None
    resources: Resources = Resources()
    env: Env = Env()
    cache: bool | Cache = False
    checkpoint: Checkpoint = Checkpoint()
    #: The attempt outlives the actors that supervise it. Unset: with GPUs, and with a timeout over an hour.
    durable: bool | None = None
    #: The attempt gets a worker process of its own, which ends with it and gives its memory back at once.
    fresh_process: bool = False

    @model_validator(mode="after")
    def _is_one_thing(self) -> Step:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of {', '.join(KINDS)}; it has {' and '.join(given) or 'none'}")
        if self.max_parallel is not None and self.foreach is None:
            raise ValueError("max_parallel needs foreach")
        if self.approval is not None and (self.foreach is not None or self.cache or self.with_):
            raise ValueError("an approval takes no foreach, with or cache")
        if self.pipeline is not None and (self.cache or self.durable):
            raise ValueError("cache and durable belong to the steps of the sub-pipeline")
        return self

    @property
    def kind(self) -> str:
        """One of ``KINDS``."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def is_durable(self) -> bool:
        """Whether its attempts run in an actor of their own."""
        if self.durable is not None:
            return self.durable
        return self.resources.gpus > 0 or (self.timeout_s or 0) > LONG_S

    @property
    def caching(self) -> Cache | None:
        """Its cache settings; None when it is never cached."""
        if isinstance(self.cache, Cache):
            return self.cache
        return Cache() if self.cache else None


#: A timeout beyond this says that a step is worth an actor of its own.
LONG_S = 3_600


class PipelineSpec(Strict):
    """A pipeline definition."""

    name: Name
    description: str = ""
    parameters: dict[Identifier, Parameter] = Field(default_factory=dict)
    steps: dict[Identifier, Step] = Field(min_length=1, max_length=MAX_STEPS)
    #: Steps that run when all others are over, however they ended. They may read ``run.state`` and ``steps.x.state``.
    finally_: dict[Identifier, Step] = Field(default_factory=dict, alias="finally", max_length=100)
    #: What the run gives to the step that it is a sub-pipeline of, and to people.
    outputs: dict[Identifier, JsonValue] = Field(default_factory=dict, max_length=100)
    #: Of the whole run without its ``finally``, from its start.
    timeout_s: Seconds | None = None
    #: Higher runs first.
    priority: int = Field(default=0, ge=-100, le=100)
    concurrency: Concurrency | None = None
    #: For every step that has no ``env`` of its own.
    env: Env = Env()

    @model_validator(mode="after")
    def _is_json(self) -> PipelineSpec:
        json.dumps(self.to_json(), allow_nan=False)  # its ValueError is the message
        twice = sorted(self.steps.keys() & self.finally_.keys())
        if twice:
            raise ValueError(f"a step and a finally step have the same name: {', '.join(twice)}")
        return self

    @property
    def all_steps(self) -> dict[str, Step]:
        """Steps, then finally steps, each in the order of the definition."""
        return {**self.steps, **self.finally_}

    def env_of(self, step: Step) -> Env:
        """The environment of a step's attempts: its own, or the pipeline's."""
        return step.env if step.env != Env() else self.env

    def to_json(self) -> dict[str, Any]:
        """The spec as it is stored and sent: only what differs from the defaults, so it reads as it was written."""
        return self.model_dump(mode="json", by_alias=True, exclude_defaults=True)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON, in hex: equal definitions have equal digests."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def resolve_params(self, given: Mapping[str, object]) -> dict[str, ParameterValue]:
        """All parameters with their values.

        Raises:
            InvalidPipeline: an unknown parameter, a missing one, or a value that does not fit.
        """
        return resolve_params(self.name, self.parameters, given)
