"""Definitions as they arrive, checked once: submitting the same definition again costs a look-up."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from mlplat.errors import InvalidPipeline
from mlplat.pipelines.loader import MAX_BYTES, build_spec
from mlplat.pipelines.spec import PipelineSpec

MAX_KNOWN = 500


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
    return ParsedSpec(spec, msgspec.Raw(msgspec.json.encode(spec.to_json())), tuple(_names(spec, "")))


def _names(spec: PipelineSpec, prefix: str) -> Iterator[tuple[str, str]]:
    for section, steps in (("steps", spec.steps), ("finally", spec.finally_)):
        for name, step in steps.items():
            path = f"{prefix}{section}.{name}"
            if step.uses is not None and not step.uses.startswith("pickle:"):
                yield f"{path}.uses", step.uses
            if step.pipeline is not None:
                yield from _names(step.pipeline, f"{path}.pipeline.")
