"""Where the files of a model version are, and what they tell of it."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass

from mlplat.artifacts.model import served_path
from mlplat.artifacts.store import ArtifactStore
from mlplat.errors import InvalidInput
from mlplat.http.services import Services
from mlplat.registry.signature import read_signature
from mlplat.tracking.run_facts import MAX_FILE_BYTES, read_small

_RUNS_URI = re.compile(r"runs:/(?P<run_id>[^/]+)(?:/(?P<path>.*))?\Z")
_MODEL_URI = re.compile(r"models:/(?P<model_id>m-[0-9a-f]+)\Z")


@dataclass(frozen=True)
class ModelSource:
    """A version's files, and the run that its source names."""

    artifact_uri: str
    run_id: str | None = None

    async def signature(self, services: Services) -> str | None:
        """What the model takes and gives, as JSON; None: its files are elsewhere, or tell nothing."""
        try:
            folder = served_path(self.artifact_uri)
        except InvalidInput:  # nothing that the platform could have stored
            return None
        if folder is None:
            return None
        return await asyncio.to_thread(_read_signature, services.artifacts, f"{folder}/MLmodel")


async def resolve_source(services: Services, source: str, run_id: str | None) -> ModelSource:
    """``runs:/`` and ``models:/m-…`` name a run's or a logged model's files, anything else itself.

    Raises:
        NotFound: there is no such run or logged model.
        InvalidInput: it leaves its folder, or names another run than ``run_id``.
    """
    if ".." in source.replace("%2e", ".").replace("%2E", "."):
        raise InvalidInput(f"Invalid model version source: '{source[:200]}'. It may not contain '..'.")
    named = _MODEL_URI.match(source)
    if named is not None:
        model = await services.logged_models.get(named["model_id"])
        return ModelSource(model.artifact_location, model.source_run_id)
    match = _RUNS_URI.match(source)
    if match is None:
        return ModelSource(source)
    if run_id and match["run_id"] != run_id:
        raise InvalidInput(
            f"Invalid model version source: '{source}'. It names another run than the run_id '{run_id}'."
        )
    run = await services.runs.get(match["run_id"])
    return ModelSource("/".join(filter(None, (run.artifact_uri, match["path"]))), run.run_id)


def _read_signature(store: ArtifactStore, path: str) -> str | None:
    body = read_small(store, path)
    if body is None or len(body) > MAX_FILE_BYTES:
        return None
    signature = read_signature(body.decode(errors="replace"))
    return None if signature is None else json.dumps(signature, sort_keys=True, separators=(",", ":"))
