"""The audit file of a model version: one page that people read in any browser, with the same facts as JSON inside.

It needs nothing else: no server, no other file, no script. The JSON is in the element with the id ``facts``, and the
SHA-256 of its text is shown on the page.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

import jinja2
import msgspec

from mlplat.lineage.model import Graph
from mlplat.lineage.openlineage import openlineage_events
from mlplat.lineage.store import Provenance
from mlplat.registry.history import Recorded
from mlplat.registry.model import ModelVersion
from mlplat.registry.move_store import Move, Refusal
from mlplat.registry.policy import Policy, policy_to_json

FORMAT = "mlplat-audit/1"
Json = dict[str, Any]


def provenance_json(found: Provenance) -> Json:
    """What a model version comes from, for JSON."""
    answer: Json = {
        "version": version_json(found.version),
        "run": found.run and found.run.run_id,
        "runs": msgspec.to_builtins(found.runs),
        "data": msgspec.to_builtins(found.data),
        "parents": found.parents,
        "pipelines": msgspec.to_builtins(found.pipelines),
        "graph": graph_json(found.graph),
    }
    return answer


def version_json(version: ModelVersion) -> Json:
    """A version, for JSON."""
    return msgspec.to_builtins({**asdict(version), "semantic": str(version.semantic)})  # type: ignore[no-any-return]


def graph_json(graph: Graph) -> Json:
    """A graph, for JSON: nodes with their distance from the start, the nearest first."""
    nodes = sorted(graph.nodes.items(), key=lambda entry: (entry[1], entry[0]))
    return {
        "nodes": [{"node": str(node), "kind": node.kind.value, "distance": distance} for node, distance in nodes],
        "edges": [{"from": str(edge.upstream), "to": str(edge.downstream)} for edge in sorted(graph.edges)],
        "truncated": graph.truncated,
    }


def audit_json(
    found: Provenance,
    history: Sequence[Recorded],
    policy: Policy,
    moves: Sequence[Move],
    refusals: Sequence[Refusal],
    *,
    at: datetime,
    producer: str,
) -> Json:
    """All that is known of a model version.

    Args:
        history: changes of the model's name and aliases, and of the version's stage.
        moves: requests for the version, with what was decided.
        refusals: changes of the model that were refused.
        at: when the file is made.
    """
    return {
        "format": FORMAT,
        "made_at": at.isoformat(),
        "producer": producer,
        **provenance_json(found),
        "history": msgspec.to_builtins([{**asdict(item.change), **_whose(item)} for item in history]),
        "policy": policy_to_json(policy),
        "requests": msgspec.to_builtins([asdict(move) for move in moves]),
        "refusals": msgspec.to_builtins([asdict(item) for item in refusals]),
        "openlineage": openlineage_events(found, producer),
    }


def audit_page(document: Json) -> str:
    """The audit file."""
    facts = json.dumps(document, ensure_ascii=False, indent=1, sort_keys=True)
    # A text of JSON may have these characters in strings alone, where it can have them escaped.
    for character in "<>&\u2028\u2029":
        facts = facts.replace(character, f"\\u{ord(character):04x}")
    digest = hashlib.sha256(facts.encode()).hexdigest()
    return _PAGE.render(audit=document, facts=facts, digest=digest)


def _whose(item: Recorded) -> Json:
    return {"at": item.at, "by": item.user_id, "reason": item.reason, "request_id": item.request_id}


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("mlplat.lineage"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
    lstrip_blocks=True,
)  # fmt: skip
_PAGE = _ENVIRONMENT.get_template("audit.html")
