"""Definitions as they arrive, checked once: submitting the same definition again costs a look-up."""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from mlplat.errors import InvalidPipeline
from mlplat.pipelines.dag import Path as Where
from mlplat.pipelines.dag import Problem
from mlplat.pipelines.loader import MAX_BYTES, build_spec
from mlplat.pipelines.locations import report
from mlplat.pipelines.spec import Env, PipelineSpec, Step

MAX_KNOWN = 500
_DIGEST = re.compile("[0-9a-f]{64}")
_BLOB = re.compile(r"blob:[0-9a-f]{64}:[^/\\\x00]{1,200}")


@dataclass(frozen=True)
class ParsedSpec:
    """A checked definition.

    Args:
        raw: its JSON, as it is stored.
        uses: every ``module:function`` with the path of its step.
    """

    spec: PipelineSpec
    raw: msgspec.Raw
    uses: tuple[tuple[str, str], ...]

    @property
    def imports(self) -> list[str]:
        """The names that must be importable where steps run."""
        return sorted({name for _path, name in self.uses})


class SpecCache:
    """Checked definitions by their bytes, the latest ``MAX_KNOWN``."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, ParsedSpec] = OrderedDict()

    def get(self, text: bytes) -> ParsedSpec:
        """The definition in a JSON text.

        Raises:
            InvalidPipeline: one problem a line.
        """
        key = hashlib.sha256(text).digest()
        parsed = self._known.get(key)
        if parsed is None:
            parsed = parse_json(text)
            self._known[key] = parsed
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        return parsed


def parse_json(text: bytes) -> ParsedSpec:
    """The definition in a JSON text.

    Raises:
        InvalidPipeline: one problem a line.
    """
    if len(text) > MAX_BYTES:
        raise InvalidPipeline(f"the definition is larger than {MAX_BYTES} bytes")
    try:
        document = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidPipeline(f"the definition is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidPipeline("expected an object with 'name' and 'steps'")
    spec = build_spec(document)
    left = [Problem(path, message) for path, message in _left_behind(spec, ())]
    if left:
        raise InvalidPipeline(report(left, "definition", {}))
    names = tuple((".".join(map(str, path)), name) for path, name in _names(spec, ()))
    return ParsedSpec(spec, msgspec.Raw(msgspec.json.encode(spec.to_json())), names)


def _parts(spec: PipelineSpec, where: Where) -> Iterator[tuple[Where, Step, Env]]:
    """Every step at any depth, with its path and the environment that it gets."""
    for section, steps in (("steps", spec.steps), ("finally", spec.finally_)):
        for name, step in steps.items():
            path = (*where, section, name)
            yield path, step, step.env if step.env != Env() else spec.env
            if step.pipeline is not None:
                yield from _parts(step.pipeline, (*path, "pipeline"))


def _names(spec: PipelineSpec, where: Where) -> Iterator[tuple[Where, str]]:
    """Functions by name. Those of a working_dir can be imported only in it."""
    for path, step, env in _parts(spec, where):
        if step.uses is not None and not step.uses.startswith("pickle:") and env.working_dir is None:
            yield (*path, "uses"), step.uses


def _left_behind(spec: PipelineSpec, where: Where) -> Iterator[tuple[Where, str]]:
    """What lies beside a definition and was not sent with it."""
    for path, step, env in _parts(spec, where):
        if step.notebook is not None and not _BLOB.fullmatch(step.notebook):
            yield (
                (*path, "notebook"),
                "was not sent: expected blob:<digest>:<name>, as the SDK and mlplat submit make it",
            )
        if env.working_dir is not None and not _DIGEST.fullmatch(env.working_dir):
            yield (*path, "env", "working_dir"), "was not sent: expected a digest, as the SDK and mlplat submit make it"
