"""Registering models from Python."""

from __future__ import annotations

from contextlib import suppress

from mlplat.errors import AlreadyExists, InvalidInput
from mlplat.sdk.client import API, client_for, default_url
from mlplat.sdk.run import Run
from mlplat.sdk.user import user_name


def register_model(
    name: str,
    run: Run | str,
    artifact_path: str,
    *,
    alias: str | None = None,
    semantic_version: str | None = None,
    url: str | None = None,
) -> int:
    """Registers a run's model as the next version of ``name``, which is created on first use, in the user's name.

    Args:
        name: the registered model.
        run: the run (or its id) whose artifacts hold the model.
        artifact_path: the model's folder below the run's artifacts.
        alias: pointed at the new version.
        semantic_version: such as ``2.0.0``, or which number grows (``major``, ``minor``, ``patch``); by default the
            platform compares signature, data and code with those of the highest version.
        url: the platform; by default ``MLPLAT_URL``, or the one on this machine.

    Returns:
        The version's number.

    Raises:
        Unavailable: the platform is away, or has not got all of the run's files yet.
    """
    if isinstance(run, Run):
        with suppress(InvalidInput):  # what was refused of the run is for its end to tell
            run.flush()
    client = client_for(url or default_url())
    run_id = run.run_id if isinstance(run, Run) else run
    by = user_name()
    with suppress(AlreadyExists):
        client.post_once(f"{API}/registered-models/create", {"name": name}, by)
    source = f"runs:/{run_id}/{artifact_path}"
    body = {"name": name, "source": source, "run_id": run_id, "semantic_version": semantic_version}
    created = client.post_once(f"{API}/model-versions/create", body, by)
    version = created["model_version"]["version"]
    if alias is not None:
        client.post_once(f"{API}/registered-models/alias", {"name": name, "alias": alias, "version": version}, by)
    return int(version)
