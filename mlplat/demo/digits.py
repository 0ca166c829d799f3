"""The steps of ``train_digits.yaml``. Plain functions: they run the same in a test or a notebook."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from mlflow.models import infer_signature
from mlflow.sklearn import save_model
from ray import tune as ray_tune
from sklearn.datasets import load_digits
from sklearn.linear_model import SGDClassifier
from sklearn.model_selection import StratifiedKFold, train_test_split
from sklearn.neural_network import MLPClassifier

import mlplat
from mlplat.execution.tuning import sweep

EXPERIMENT = "digits"
MODEL = "digits"
ALIAS = "champion"
EPOCHS = 12
CANDIDATES = 3
CLASSES = np.arange(10)

Config = dict[str, Any]


@dataclass(frozen=True)
class Dataset:
    """Images as rows of 64 grey values in 0..1, and their digits."""

    images: np.ndarray
    digits: np.ndarray


@dataclass(frozen=True)
class Split:
    """What models learn from, and what they are judged by in the end."""

    train: Dataset
    test: Dataset


def load(simulate_failure: bool) -> Dataset:
    """1,797 handwritten digits. Fails on its first attempt when asked to."""
    step = mlplat.current_step()
    if simulate_failure and step is not None and step.attempt == 1:
        raise ConnectionError("simulated: the data source did not answer")
    bunch = load_digits()
    print(f"loaded {len(bunch.target)} digits")
    return Dataset(bunch.data / 16.0, bunch.target)


def split(data: Dataset, seed: int) -> Split:
    """80% to learn from, 20% to be judged by."""
    images, test_images, digits, test_digits = train_test_split(
        data.images, data.digits, test_size=0.2, stratify=data.digits, random_state=seed
    )
    return Split(Dataset(images, digits), Dataset(test_images, test_digits))


def build(config: Config, seed: int) -> Any:
    """An untrained classifier of the configuration's family."""
    if config["family"] == "linear":
        return SGDClassifier(loss="log_loss", alpha=config["alpha"], random_state=seed)
    return MLPClassifier(
        hidden_layer_sizes=(config["hidden"],), alpha=config["alpha"], learning_rate_init=config["learning_rate"],
        batch_size=32, random_state=seed,
    )  # fmt: skip


def fit_epochs(config: Config, seed: int, train: Dataset) -> Iterator[Any]:
    """The classifier after each epoch."""
    model = build(config, seed)
    order = np.random.default_rng(seed)
    for _epoch in range(EPOCHS):
        rows = order.permutation(len(train.digits))
        model.partial_fit(train.images[rows], train.digits[rows], classes=CLASSES)
        yield model


def tune(data: Split, trials: int, seed: int) -> list[dict[str, Any]]:
    """A Ray Tune sweep over both families; every trial is a tracked run with its curve. Best first."""
    rows = np.random.default_rng(seed).permutation(len(data.train.digits))
    held_out = len(rows) // 5
    images, digits = data.train.images[rows], data.train.digits[rows]
    train = Dataset(images[held_out:], digits[held_out:])

    def objective(config: Config) -> Iterator[dict[str, float]]:
        for model in fit_epochs(config, seed, train):
            yield {
                "accuracy": float(model.score(images[:held_out], digits[:held_out])),
                "train_accuracy": float(model.score(train.images, train.digits)),
            }

    found = sweep(
        objective,
        {
            "family": ray_tune.grid_search(["linear", "mlp"]),
            "alpha": ray_tune.loguniform(1e-5, 1e-1),
            "learning_rate": ray_tune.loguniform(3e-4, 1e-2),
            "hidden": ray_tune.choice([32, 64, 128]),
        },
        num_samples=trials // 2,
        metric="accuracy",
        experiment=EXPERIMENT,
        name="tune-digits",
        seed=seed,
    )
    return [{"config": trial.config, "accuracy": trial.metrics["accuracy"], "run_id": trial.run_id} for trial in found]


def pick(trials: list[dict[str, Any]], folds: int) -> list[dict[str, Any]]:
    """The best trials, once per fold."""
    return [
        {"candidate": index, "config": trial["config"], "fold": fold, "folds": folds}
        for index, trial in enumerate(trials[:CANDIDATES])
        for fold in range(folds)
    ]


def cross_validate(data: Split, fold: dict[str, Any], seed: int) -> dict[str, Any]:
    """The accuracy of one candidate on one fold."""
    folds = StratifiedKFold(fold["folds"], shuffle=True, random_state=seed)
    learn, judge = list(folds.split(data.train.images, data.train.digits))[fold["fold"]]
    *_, model = fit_epochs(fold["config"], seed, Dataset(data.train.images[learn], data.train.digits[learn]))
    accuracy = float(model.score(data.train.images[judge], data.train.digits[judge]))
    print(f"candidate {fold['candidate']}, fold {fold['fold']}: {accuracy:.4f}")
    return {"candidate": fold["candidate"], "fold": fold["fold"], "accuracy": accuracy}


def evaluate(data: Split, trials: list[dict[str, Any]], scores: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The best candidate by its mean over the folds, trained on everything and judged on the test set."""
    by_candidate: dict[int, list[float]] = {}
    for score in scores:
        by_candidate.setdefault(score["candidate"], []).append(score["accuracy"])
    means = {candidate: float(np.mean(values)) for candidate, values in by_candidate.items()}
    best = max(means, key=lambda candidate: means[candidate])
    config = trials[best]["config"]
    with mlplat.start_run(EXPERIMENT, "evaluate", params=config) as run, tempfile.TemporaryDirectory() as folder:
        run.log_dataset({"features": data.train.images, "targets": data.train.digits}, "digits-train")
        run.log_dataset({"features": data.test.images, "targets": data.test.digits}, "digits-test", "evaluation")
        *_, model = fit_epochs(config, seed, data.train)
        accuracy = float(model.score(data.test.images, data.test.digits))
        run.log({"cv_accuracy": means[best], "test_accuracy": accuracy})
        save_model(
            model,
            f"{folder}/model",
            signature=infer_signature(data.test.images, model.predict(data.test.images)),
            pip_requirements=["scikit-learn"],
            serialization_format="cloudpickle",
        )
        run.log_artifacts(f"{folder}/model", "model")
    candidates = [
        {"candidate": candidate, "config": trials[candidate]["config"], "cv_accuracy": mean}
        for candidate, mean in sorted(means.items(), key=lambda entry: -entry[1])
    ]
    return {"run_id": run.run_id, "config": config, "test_accuracy": accuracy, "candidates": candidates}


def register(candidate: dict[str, Any]) -> dict[str, Any]:
    """The evaluated model as the next version of ``digits``, and its champion."""
    version = mlplat.register_model(MODEL, candidate["run_id"], "model", alias=ALIAS)
    print(f"registered {MODEL} version {version} as @{ALIAS}")
    return {"name": MODEL, "version": version, "alias": ALIAS, "test_accuracy": candidate["test_accuracy"]}
