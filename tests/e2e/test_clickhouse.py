"""A platform whose metric store is a ClickHouse server."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from mlplat.metrics.queries import Statement
from mlplat.metrics.store import MetricStore
from tests.clickhouse import ClickHouse
from tests.platform import Platform


@pytest.fixture(scope="module")
def clickhouse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClickHouse]:
    server = ClickHouse(tmp_path_factory.mktemp("clickhouse"), login="mlplat:secret")
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def on_clickhouse(clickhouse: ClickHouse) -> Iterator[Platform]:
    with tempfile.TemporaryDirectory(prefix="mlt-", dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        url = f"clickhouse://mlplat:secret@127.0.0.1:{clickhouse.port}/mlplat"
        platform = Platform(Path(folder), extra={"MLPLAT_CLICKHOUSE_URL": url})
        try:
            platform.mlplat("up")
            yield platform
        finally:
            platform.run("down")
        assert not [process for process in platform.processes() if process.status() != psutil.STATUS_ZOMBIE]


def test_the_stock_client_logs_and_reads(on_clickhouse: Platform, clickhouse: ClickHouse) -> None:
    client = MlflowClient(on_clickhouse.url)
    run_id = client.create_run("0").info.run_id
    client.log_metric(run_id, "loss", 0.5, step=0, timestamp=1)
    curve = [Metric("loss", 1 / step, step, step) for step in range(1, 501)]
    client.log_batch(run_id, metrics=curve, params=[Param("rate", "0.1")])
    run = client.get_run(run_id)
    assert (run.data.metrics, run.data.params) == ({"loss": 1 / 500}, {"rate": "0.1"})
    history = client.get_metric_history(run_id, "loss")
    assert sorted(point.step for point in history) == list(range(501))
    [found] = client.search_runs(["0"], "metrics.loss < 0.01", order_by=["metrics.loss"])
    assert found.info.run_id == run_id

    # They are where the setting says, and nowhere else.
    store = MetricStore(on_clickhouse.extra["MLPLAT_CLICKHOUSE_URL"])
    rows = store.query(
        Statement("SELECT count() AS n FROM metric_points FINAL WHERE run_id = {r:String}", {"r": run_id})
    )
    assert rows["n"].to_pylist() == [501]
    assert not (on_clickhouse.state_dir / "chdb").exists()


def test_it_works_while_the_server_restarts(on_clickhouse: Platform, clickhouse: ClickHouse) -> None:
    client = MlflowClient(on_clickhouse.url)
    run_id = client.create_run("0").info.run_id
    client.log_metric(run_id, "loss", 0.5, step=0)
    assert len(client.get_metric_history(run_id, "loss")) == 1
    clickhouse.kill()
    for step in range(1, 20):
        client.log_metric(run_id, "loss", 0.5, step=step)
    clickhouse.start()
    assert len(client.get_metric_history(run_id, "loss")) == 20
