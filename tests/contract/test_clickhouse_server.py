"""The metric store over the network: logins, TLS, databases, and a server that goes away."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mlplat.errors import Unavailable
from mlplat.metrics import queries
from mlplat.metrics.model import Point
from mlplat.metrics.queries import Statement
from mlplat.metrics.store import SETTINGS, MetricStore
from tests.clickhouse import ClickHouse
from tests.contract.chdb import stored, stored_points, unique

PASSWORD = "p@ss/w:rd%?"
ENCODED = "p%40ss%2Fw%3Ard%25%3F"
ONE = Statement("SELECT 1 AS one")
Launch = Callable[..., ClickHouse]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Starts servers of the test's own."""
    with ExitStack() as stack:

        def start(**options: object) -> ClickHouse:
            server = ClickHouse(tmp_path / unique("server"), **options)  # type: ignore[arg-type]
            stack.callback(server.kill)
            server.start()
            return server

        yield start


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEM file with a key and its own certificate for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return file


def _point(run: str, step: int = 0) -> tuple[int, str, list[Point]]:
    return 1, run, [Point("m", 1.0, 1, step)]


def test_the_login_of_the_url_is_sent(launch: Launch) -> None:
    server = launch(login=f"me:{PASSWORD}")
    store = MetricStore(f"clickhouse://me:{ENCODED}@127.0.0.1:{server.port}/own")
    store.create_tables()
    assert store.query(ONE).to_pylist() == [{"one": 1}]
    for url in (f"clickhouse://me:wrong@127.0.0.1:{server.port}", server.url):
        with pytest.raises(Unavailable, match=r"the metric store refused: .*516.*Authentication failed") as caught:
            MetricStore(url).create_tables()
        assert "wrong" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_tls_is_the_schemes_choice_whatever_the_port(launch: Launch, certificate: Path) -> None:
    server = launch(certificate=certificate)
    secure = f"clickhouses://127.0.0.1:{server.port}"
    store = MetricStore(f"{secure}/db?ca_cert={certificate}")
    store.create_tables()
    assert store.query(ONE).num_rows == 1
    assert MetricStore(f"{secure}?verify=false").query(ONE).num_rows == 1
    with pytest.raises(Unavailable, match=f"127.0.0.1:{server.port} does not answer: .*certificate verify failed"):
        MetricStore(secure).query(ONE)
    with pytest.raises(Unavailable, match="does not answer"):
        MetricStore(server.url).query(ONE)


def test_a_database_is_created_and_kept_apart(clickhouse: ClickHouse) -> None:
    first, second = (MetricStore(f"{clickhouse.url}/{unique('data base')}") for _ in range(2))
    run = unique("run")
    for store in (first, second):
        store.create_tables()
        store.create_tables()
    first.insert(stored(*_point(run)))
    assert [store.query(stored_points(run))["n"].to_pylist() for store in (first, second)] == [[1], [0]]


def test_a_reader_needs_the_database(clickhouse: ClickHouse) -> None:
    with pytest.raises(Unavailable, match=r"refused: .*code: 81"):
        MetricStore(f"{clickhouse.url}/{unique('nowhere')}").query(ONE)


def test_the_settings_reach_the_engine(metric_store: MetricStore) -> None:
    for name, value in SETTINGS.items():
        row = metric_store.query(Statement("SELECT toString(getSetting({name:String})) AS value", {"name": name}))
        assert float(row["value"][0].as_py().replace("false", "0")) == value


def test_a_statement_that_takes_too_long_is_given_up_by_the_engine(
    metric_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SETTINGS, "max_execution_time", 1)
    with pytest.raises(Unavailable, match="Timeout exceeded"):
        MetricStore(metric_url).query(
            Statement("SELECT sum(sleepEachRow(0.1)) AS s FROM numbers(30) SETTINGS max_block_size = 1")
        )


def test_many_run_ids_fit_into_a_statement(metric_store: MetricStore) -> None:
    run = unique("run")
    metric_store.insert(stored(*_point(run)))
    runs = [unique("r" * 20) for _ in range(5_000)]
    assert metric_store.query(queries.latest([*runs, run])).num_rows == 1


def test_a_server_that_died_is_named_and_found_again(launch: Launch) -> None:
    server, run = launch(), unique("run")
    store = MetricStore(f"{server.url}/db")
    store.create_tables()
    store.insert(stored(*_point(run, 0)))
    server.kill()
    for attempt in (store.create_tables, lambda: store.insert(stored(*_point(run, 1)))):
        with pytest.raises(Unavailable) as caught:
            attempt()
        assert str(caught.value) == (
            f"the metric store at 127.0.0.1:{server.port} does not answer: [Errno 111] Connection refused"
        )
    server.start()
    store.insert(stored(*_point(run, 1)))
    assert store.query(stored_points(run))["n"].to_pylist() == [2]


def test_a_frozen_server_costs_a_bounded_wait_and_what_it_took_counts_once(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, run = launch(), unique("run")
    url = f"{server.url}/db"
    MetricStore(url).create_tables()
    monkeypatch.setattr("mlplat.metrics.store.ANSWER_TIMEOUT_S", 1)
    store = MetricStore(url)
    store.query(ONE)
    server.freeze()
    with pytest.raises(Unavailable, match=r"does not answer: .*timed out"):
        store.insert(stored(*_point(run)))
    server.thaw()  # now it does what it was told
    store.insert(stored(*_point(run)))
    assert store.query(stored_points(run))["n"].to_pylist() == [1]


def test_errors_leave_no_clients_behind(metric_url: str) -> None:
    store = MetricStore(metric_url)
    for _ in range(20):
        with pytest.raises(Unavailable, match="refused"):
            store.query(Statement("SELECT nonsense FROM nowhere"))
    assert len(store._clients) == 0
    store.query(ONE)
    assert len(store._clients) == 1


def test_where_names_no_login() -> None:
    assert MetricStore(f"clickhouse://me:{ENCODED}@ch/db").where == "ch:8123"
    assert MetricStore("clickhouses://ch").where == "ch:8443"
    assert MetricStore("chdb:///srv/a#b?c/chdb").where == "/srv/a#b?c/chdb"
