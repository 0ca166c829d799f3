"""A platform whose metric store is a ClickHouse server."""

from __future__ import annotations

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from mlplat.metrics.queries import Statement
from mlplat.metrics.store import MetricStore
from tests.clickhouse import RemoteStore
from tests.platform import Platform


def test_the_stock_client_logs_and_reads(remote_platform: Platform, remote_store: RemoteStore) -> None:
    client = MlflowClient(remote_platform.url)
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
    store = MetricStore(remote_store.url)
    rows = store.query(
        Statement("SELECT count() AS n FROM metric_points FINAL WHERE run_id = {r:String}", {"r": run_id})
    )
    assert rows["n"].to_pylist() == [501]
    assert not (remote_platform.state_dir / "chdb").exists()


def test_it_works_while_the_server_restarts(remote_platform: Platform, remote_store: RemoteStore) -> None:
    client = MlflowClient(remote_platform.url)
    run_id = client.create_run("0").info.run_id
    client.log_metric(run_id, "loss", 0.5, step=0)
    assert len(client.get_metric_history(run_id, "loss")) == 1
    remote_store.server.kill()
    for step in range(1, 20):
        client.log_metric(run_id, "loss", 0.5, step=step)
    remote_store.server.start()
    assert len(client.get_metric_history(run_id, "loss")) == 20
