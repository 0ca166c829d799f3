"""MLflow's endpoints for what goes into runs and comes out of them, and for datasets."""

from __future__ import annotations

import msgspec

from mlplat.errors import InvalidInput
from mlplat.http.mlflow.endpoint import Answer, Endpoint, require
from mlplat.http.mlflow.experiments import Tag
from mlplat.http.mlflow.runs import ById, run_id_of
from mlplat.http.services import Services
from mlplat.tracking.inputs import Dataset, DatasetInput, ModelOutput
from mlplat.tracking.model import parse_experiment_id

MAX_EXPERIMENTS = 20
#: What a model's entry in a run's history has of the description that the client sends.
_HISTORY_KEYS = ("run_id", "utc_time_created", "artifact_path", "model_uuid")
_REQUIRED_KEYS = ("artifact_path", "flavors", "utc_time_created", "run_id")


class WireDataset(msgspec.Struct):
    """A dataset on the wire."""

    name: str = ""
    digest: str = ""
    source_type: str = ""
    source: str = ""
    schema: str | None = None
    profile: str | None = None


class WireInput(msgspec.Struct):
    """A use of a dataset."""

    dataset: WireDataset | None = None
    tags: list[Tag] = []


class WireModel(msgspec.Struct):
    """A model that goes into a run or comes out of it."""

    model_id: str = ""
    step: int = 0


class LogInputs(ById):
    """runs/log-inputs"""

    datasets: list[WireInput] = msgspec.field(default_factory=list)
    models: list[WireModel] = msgspec.field(default_factory=list)


class LogOutputs(ById):
    """runs/outputs"""

    models: list[WireModel] = msgspec.field(default_factory=list)


class LogModel(ById):
    """runs/log-model: ``model_json`` is an MLmodel description as JSON."""

    model_json: str = ""


class SearchDatasets(msgspec.Struct):
    """experiments/search-datasets"""

    experiment_ids: list[str] = []


def _input(wire: WireInput) -> DatasetInput:
    if wire.dataset is None:
        raise InvalidInput("Dataset cannot be None: every entry of 'datasets' needs a 'dataset'.")
    return DatasetInput(Dataset(**msgspec.structs.asdict(wire.dataset)), {tag.key: tag.value for tag in wire.tags})


def _output(wire: WireModel) -> ModelOutput:
    if not -(2**63) <= wire.step < 2**63:
        raise InvalidInput(f"Invalid value {wire.step} for parameter 'step' supplied: out of range.")
    return ModelOutput(require("model_id", wire.model_id), wire.step)


async def log_inputs(services: Services, request: LogInputs) -> Answer:
    """POST runs/log-inputs"""
    inputs = [_input(wire) for wire in request.datasets]
    model_ids = [require("model_id", wire.model_id) for wire in request.models]
    await services.datasets.log_inputs(run_id_of(request), inputs, model_ids)
    return {}


async def log_outputs(services: Services, request: LogOutputs) -> Answer:
    """POST runs/outputs"""
    run_id = run_id_of(request)
    if not request.models:
        raise InvalidInput("Missing value for required parameter 'models'. See the API docs for more information.")
    await services.datasets.log_outputs(run_id, [_output(wire) for wire in request.models])
    return {}


async def log_model(services: Services, request: LogModel) -> Answer:
    """POST runs/log-model"""
    run_id, text = run_id_of(request), require("model_json", request.model_json)
    try:
        model = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        model = None
    if not isinstance(model, dict):
        raise InvalidInput(f"Malformed model info. \n {text[:1000]} \n is not a valid JSON.")
    missing = [key for key in _REQUIRED_KEYS if key not in model]
    if missing:
        raise InvalidInput(f"Model json is missing mandatory fields: {missing}")
    if not isinstance(model["flavors"], dict):
        raise InvalidInput("Malformed model info. 'flavors' must be an object.")
    flavors = {
        name: {key: value for key, value in flavor.items() if key != "config"} if isinstance(flavor, dict) else flavor
        for name, flavor in model["flavors"].items()
    }
    entry = {key: model[key] for key in _HISTORY_KEYS if key in model} | {"flavors": flavors}
    await services.runs.record_model(run_id, entry)
    return {}


async def search_datasets(services: Services, request: SearchDatasets) -> Answer:
    """POST experiments/search-datasets"""
    if not request.experiment_ids:
        raise InvalidInput("SearchDatasets request must specify at least one experiment_id.")
    if len(request.experiment_ids) > MAX_EXPERIMENTS:
        raise InvalidInput(
            f"SearchDatasets request cannot specify more than {MAX_EXPERIMENTS} experiment_ids. "
            f"Received {len(request.experiment_ids)} experiment_ids."
        )
    found = await services.datasets.summaries([parse_experiment_id(value) for value in request.experiment_ids])
    if not found:
        return {}
    summaries: list[Answer] = [
        {"experiment_id": str(one.experiment_id), "name": one.name, "digest": one.digest}
        | ({} if one.context is None else {"context": one.context})
        for one in found
    ]
    return {"dataset_summaries": summaries}


ENDPOINTS = (
    Endpoint(("POST",), "runs/log-inputs", LogInputs, log_inputs),
    Endpoint(("POST",), "runs/outputs", LogOutputs, log_outputs),
    Endpoint(("POST",), "runs/log-model", LogModel, log_model),
    Endpoint(("POST",), "experiments/search-datasets", SearchDatasets, search_datasets),
)
