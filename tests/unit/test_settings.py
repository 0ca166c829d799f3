"""Settings from the environment, and the configuration they lead to."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError
from sqlalchemy import make_url

from mlplat.errors import InvalidInput
from mlplat.settings import (
    UNIX_PATH_MAX,
    Settings,
    default_state_dir,
    embedded_postgres_url,
    postgres_socket_dir,
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MLPLAT_")]:
        monkeypatch.delenv(name)


def test_defaults() -> None:
    settings = Settings()
    assert settings.state_dir == default_state_dir()
    assert (settings.http_port, settings.dashboard_port) == (8700, 8265)
    assert settings.http_url == "http://127.0.0.1:8700"
    assert settings.object_store_bytes == 256 * 1024 * 1024
    assert settings.ray_address is None


@pytest.mark.parametrize("user", [0, 1000])
def test_roots_state_lives_where_other_users_reach_it(user: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setenv("HOME", "/home/me")
    assert default_state_dir() == Path("/var/lib/mlplat" if user == 0 else "/home/me/.mlplat")


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPLAT_STATE_DIR", "/srv/mlplat")
    monkeypatch.setenv("MLPLAT_HTTP_PORT", "9000")
    monkeypatch.setenv("MLPLAT_NUM_CPUS", "4")
    settings = Settings()
    assert (settings.state_dir, settings.http_port, settings.num_cpus) == (Path("/srv/mlplat"), 9000, 4)


def test_embedded_engines_live_in_the_state_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPLAT_STATE_DIR", "/srv/mlplat")
    config = Settings().config
    assert config.state_dir == "/srv/mlplat"
    assert config.postgres_url == "postgresql+psycopg://postgres@/mlplat?host=/srv/mlplat/postgres/socket"
    assert config.clickhouse_url == "chdb:///srv/mlplat/chdb"
    assert config.artifacts_url == "file:///srv/mlplat/artifacts"
    assert pickle.loads(pickle.dumps(config)) == config


def test_own_engines_replace_the_embedded_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPLAT_POSTGRES_URL", "postgresql+psycopg://u@db/x")
    monkeypatch.setenv("MLPLAT_CLICKHOUSE_URL", "clickhouses://ch:8443/x")
    monkeypatch.setenv("MLPLAT_ARTIFACTS_URL", "s3://bucket/x")
    config = Settings().config
    assert config.postgres_url == "postgresql+psycopg://u@db/x"
    assert config.clickhouse_url == "clickhouses://ch:8443/x"
    assert config.artifacts_url == "s3://bucket/x"


@pytest.mark.parametrize(
    "url",
    [
        "clickhouse://ch",
        "clickhouse://[::1]:8123",
        "clickhouse://me:p%40ss@ch:9000/data%20base/",
        "clickhouses://me:pw@ch/db?verify=false",
        "clickhouses://ch:9440?ca_cert=/etc/ca.pem&client_cert=/etc/me.pem&client_cert_key=/etc/me.key",
    ],
)
def test_a_clickhouse_url_may_have_a_login_a_database_and_tls_options(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLPLAT_CLICKHOUSE_URL", url)
    assert Settings().config.clickhouse_url == url


def test_a_refused_url_is_not_repeated_with_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPLAT_CLICKHOUSE_URL", "clickhouse://me:secret@ch?x=y")
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert [error["msg"] for error in caught.value.errors()] == [
        "Value error, the option x is not known; there are ca_cert, client_cert, client_cert_key, compress, "
        "server_host_name, verify"
    ]


def test_with_an_own_postgres_the_state_folder_may_have_a_long_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPLAT_STATE_DIR", "/" + "x" * 200)
    monkeypatch.setenv("MLPLAT_POSTGRES_URL", "postgresql+psycopg://u@db/x")
    assert Settings().config.state_dir == "/" + "x" * 200


def test_the_url_has_no_trailing_slash_and_wins_over_the_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLPLAT_HTTP_PORT", "9000")
    assert Settings().http_url == "http://127.0.0.1:9000"
    monkeypatch.setenv("MLPLAT_URL", "https://ml.example/base/")
    assert Settings().http_url == "https://ml.example/base"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_PORT", "0"),
        ("HTTP_PORT", "65536"),
        ("HTTP_PORT", "http"),
        ("DASHBOARD_PORT", "-1"),
        ("NUM_CPUS", "0"),
        ("OBJECT_STORE_BYTES", "1000"),
        ("POSTGRES_URL", "postgresql://u@db/x"),
        ("POSTGRES_URL", "mysql://db"),
        ("CLICKHOUSE_URL", "http://ch"),
        ("CLICKHOUSE_URL", "clickhouse://"),
        ("CLICKHOUSE_URL", "clickhouse:///db"),
        ("CLICKHOUSE_URL", "clickhouse://ch:many"),
        ("CLICKHOUSE_URL", "clickhouse://ch:70000"),
        ("CLICKHOUSE_URL", "clickhouse://ch/db/table"),
        ("CLICKHOUSE_URL", "clickhouse://ch?secure=true"),
        ("CLICKHOUSE_URL", "clickhouse://ch?interface=chdb"),
        ("ARTIFACTS_URL", "/srv/artifacts"),
        ("ARTIFACTS_URL", "file://relative"),
        ("ARTIFACTS_URL", "gs://bucket"),
        ("MODE", "sometimes"),
        ("SPOOL_BYTES", "1000"),
        ("HEARTBEAT_TIMEOUT_S", "1"),
        ("CAPTURE", "maybe"),
        ("CAPTURE_SYSTEM_INTERVAL_S", "0"),
        ("CAPTURE_NODE", "a/b"),
    ],
)
def test_a_bad_setting_is_refused_by_its_name(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"MLPLAT_{name}", value)
    with pytest.raises(ValidationError) as caught:
        Settings()
    assert [error["loc"] for error in caught.value.errors()] == [(name.lower(),)]


def test_the_state_folder_becomes_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("MLPLAT_STATE_DIR", "state")
    assert Settings().state_dir == tmp_path / "state"
    monkeypatch.setenv("MLPLAT_STATE_DIR", "~/state")
    assert Settings().state_dir == Path("/home/me/state")


def test_the_spool_is_in_the_state_folder_unless_it_has_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLPLAT_STATE_DIR", "/srv/mlplat")
    assert Settings().spool_folder == Path("/srv/mlplat/spool")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLPLAT_SPOOL_DIR", "mine")
    assert Settings().spool_folder == tmp_path / "mine"


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Settings().http_port = 1  # type: ignore[misc]


def test_a_path_too_long_for_a_socket_is_refused() -> None:
    longest = UNIX_PATH_MAX - len("/postgres/socket/.s.PGSQL.5432")
    fits = Path("/" + "x" * (longest - 1))
    assert postgres_socket_dir(fits) == fits / "postgres" / "socket"
    with pytest.raises(InvalidInput, match="Set MLPLAT_STATE_DIR to a shorter one"):
        postgres_socket_dir(Path(f"{fits}x"))
    with pytest.raises(InvalidInput, match="too long"):
        postgres_socket_dir(Path("/" + "ü" * (longest // 2 + 1)))


@pytest.mark.parametrize("folder", ["/srv/mlplat", "/srv/my data", "/srv/ü", "/srv/a#b"])
def test_the_embedded_url_names_the_socket_folder(folder: str) -> None:
    url = make_url(embedded_postgres_url(Path(folder)))
    assert (url.username, url.database, url.host) == ("postgres", "mlplat", None)
    assert url.query == {"host": f"{folder}/postgres/socket"}


def test_private_targets_of_webhooks_are_hosts_addresses_and_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().config.webhook_private_targets == ()
    monkeypatch.setenv("MLPLAT_WEBHOOK_PRIVATE_TARGETS", "hooks.internal, 10.0.0.0/8,,::1 ")
    assert Settings().config.webhook_private_targets == ("hooks.internal", "10.0.0.0/8", "::1")
    for wrong in ("http://x/", "10.0.0.0/33", "a b", "-x", "x/8", "*"):
        monkeypatch.setenv("MLPLAT_WEBHOOK_PRIVATE_TARGETS", wrong)
        with pytest.raises(ValidationError, match="is no host, address or network"):
            Settings()
