"""Definitions as they arrive at the platform."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlplat.errors import InvalidPipeline
from mlplat.pipelines.parsing import parse_json

DIGEST = "0" * 64


def parse(steps: dict[str, Any], **more: Any) -> Any:
    return parse_json(json.dumps({"name": "p", "steps": steps, **more}).encode())


def test_functions_are_named_with_their_paths_at_any_depth() -> None:
    inner = {"name": "i", "steps": {"b": {"uses": "m:g"}, "c": {"uses": f"pickle:{DIGEST}:m.h"}}}
    parsed = parse({"a": {"uses": "m:f"}, "s": {"pipeline": inner}}, **{"finally": {"z": {"uses": "m:f"}}})
    assert parsed.uses == (("steps.a.uses", "m:f"), ("steps.s.pipeline.steps.b.uses", "m:g"), ("finally.z.uses", "m:f"))
    assert parsed.imports == ["m:f", "m:g"]


def test_functions_of_a_working_dir_can_be_imported_only_there() -> None:
    own = {"uses": "beside:f", "env": {"working_dir": DIGEST}}
    assert parse({"a": own, "b": {"uses": "m:f"}}).imports == ["m:f"]
    assert parse({"b": {"uses": "beside:f"}}, env={"working_dir": DIGEST}).imports == []


@pytest.mark.parametrize("name", ["explore.ipynb", "blob:1:x.ipynb", f"blob:{DIGEST}:../x.ipynb", f"blob:{DIGEST}:"])
def test_what_was_not_sent_along_is_refused(name: str) -> None:
    inner = {"name": "i", "steps": {"b": {"uses": "m:g", "env": {"working_dir": "src"}}}}
    with pytest.raises(InvalidPipeline) as caught:
        parse({"n": {"notebook": name}, "s": {"pipeline": inner}})
    lines = caught.value.message.splitlines()
    assert lines[0].startswith("definition: steps.n.notebook: was not sent: expected blob:<digest>:<name>")
    assert lines[1].startswith("definition: steps.s.pipeline.steps.b.env.working_dir: was not sent: expected a digest")
    assert parse({"n": {"notebook": f"blob:{DIGEST}:x y.ipynb"}}).imports == []
