"""The only reader of the environment.

``Settings`` is what the user may set; ``PlatformConfig`` is what bring-up made of it. Actors and
attempts receive the ``PlatformConfig`` as an argument and never look at the environment.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, quote, urlsplit

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from mlplat.errors import InvalidInput


def default_state_dir() -> Path:
    """``/var/lib/mlplat`` for root, else ``~/.mlplat``.

    Root's home is usually closed to other users, and Postgres refuses to run as root, so root's
    state lives where the database's own user can reach it.
    """
    return Path("/var/lib/mlplat") if os.geteuid() == 0 else Path.home() / ".mlplat"


class Settings(BaseSettings):
    """User settings, each read from ``MLPLAT_<NAME>``."""

    model_config = SettingsConfigDict(env_prefix="MLPLAT_", frozen=True)

    state_dir: Path = Field(default_factory=default_state_dir)
    http_port: int = Field(default=8700, ge=1, le=65535)
    dashboard_port: int = Field(default=8265, ge=1, le=65535)
    #: ``postgresql+psycopg://…``; unset: the embedded server.
    postgres_url: str | None = None
    #: ``clickhouse[s]://[user[:password]@]host[:port][/database][?option=value]``; unset: chDB.
    clickhouse_url: str | None = None
    #: ``s3://…`` or ``file://…``; unset: a folder in the state folder.
    artifacts_url: str | None = None
    #: Clients reach the bucket by the address that the platform has, and may send and fetch files' bytes there.
    artifacts_direct: bool = False
    #: Where clients find the HTTP API; unset: this machine's ``http_port``.
    url: str | None = None
    #: Logical CPUs and object store bytes of a head node that bring-up starts; unset: Ray's choice / 256 MiB.
    num_cpus: int | None = Field(default=None, ge=1)
    object_store_bytes: int = Field(default=256 * 1024 * 1024, ge=80 * 1024 * 1024)
    #: Joins a running cluster (``host:port``) instead of starting one.
    ray_address: str | None = None
    #: ``offline``: runs are kept on disk until ``mlplat sync`` sends them.
    mode: Literal["online", "offline"] = "online"
    #: Where the SDK keeps what it could not send yet; unset: a folder in the state folder.
    spool_dir: Path | None = None
    #: Bytes that all processes together may keep there.
    spool_bytes: int = Field(default=4 * 1024**3, ge=1024 * 1024)
    #: Seconds without a heartbeat after which a run that has sent some counts as dead.
    heartbeat_timeout_s: float = Field(default=60.0, ge=5)
    #: Actors that drive pipeline runs, and runs that may be under way at once; others wait in the queue.
    executors: int = Field(default=1, ge=1, le=100)
    max_active_runs: int = Field(default=500, ge=1, le=100_000)
    #: Hosts, addresses and networks (``10.0.0.0/8``) with commas between them, to which webhooks may go though these
    #: are not public.
    webhook_private_targets: Annotated[tuple[str, ...], NoDecode] = ()

    #: Days that checkpoints of pipeline runs, and logs, are kept after the end.
    keep_checkpoints_days: float = Field(default=7, ge=0, le=36_500)
    keep_logs_days: float = Field(default=365, ge=0, le=36_500)
    #: Days after a run's end from which on its points lie in Parquet files, and come back when they are read.
    hot_metrics_days: float = Field(default=365, ge=0, le=36_500)
    #: Hours that artifacts' bytes stay after the last file that had them; no write may take longer.
    collect_grace_hours: float = Field(default=24, ge=1, le=8_760)
    #: Hours between two collections of what nothing refers to; 0: only when somebody asks.
    collect_every_hours: float = Field(default=24, ge=0, le=8_760)

    #: What runs record by themselves; ``capture`` turns all of it off, the others their part.
    capture: bool = True
    capture_code: bool = True
    capture_environment: bool = True
    capture_console: bool = True
    #: Also what children and C code print, by way of the file descriptors.
    capture_console_fd: bool = False
    capture_system_metrics: bool = True
    #: Seconds between two points of system metrics.
    capture_system_interval_s: float = Field(default=10.0, ge=1, le=3600)
    #: This node's name in system metrics: ``system/<node>/…``; unset: one node, ``system/…``.
    capture_node: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.\- ]{1,64}$")
    #: The image that this process runs in, which a container cannot see for itself.
    container_image: str | None = None

    @field_validator("state_dir", "spool_dir")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.expanduser().absolute()

    @field_validator("postgres_url")
    @classmethod
    def _psycopg(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("postgresql+psycopg://"):
            raise ValueError("must start with postgresql+psycopg://")
        return value

    @field_validator("clickhouse_url")
    @classmethod
    def _clickhouse(cls, value: str | None) -> str | None:
        if value is not None:
            _check_clickhouse_url(value)
        return value

    @field_validator("artifacts_url")
    @classmethod
    def _artifacts(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("s3://", "file:///")):
            raise ValueError("must start with s3:// or file:///")
        return value

    @field_validator("webhook_private_targets", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("webhook_private_targets")
    @classmethod
    def _targets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            _check_target(entry)
        return value

    @property
    def http_url(self) -> str:
        """Base URL of the platform that clients talk to, without a trailing slash."""
        return (self.url or self.local_url).rstrip("/")

    @property
    def local_url(self) -> str:
        """Base URL of the platform that bring-up starts on this machine."""
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def spool_folder(self) -> Path:
        """Where the SDK keeps what it could not send yet."""
        return self.spool_dir or self.state_dir / "spool"

    @property
    def cache_folder(self) -> Path:
        """What the SDK found out and could find out again."""
        return self.state_dir / "cache"

    @property
    def config(self) -> PlatformConfig:
        """The configuration that these settings lead to, with embedded engines filled in."""
        return PlatformConfig(
            state_dir=str(self.state_dir),
            postgres_url=self.postgres_url or embedded_postgres_url(self.state_dir),
            clickhouse_url=self.clickhouse_url or f"chdb://{self.state_dir / 'chdb'}",
            artifacts_url=self.artifacts_url or f"file://{self.state_dir / 'artifacts'}",
            http_url=self.local_url,
            heartbeat_timeout_s=self.heartbeat_timeout_s,
            executors=self.executors,
            max_active_runs=self.max_active_runs,
            webhook_private_targets=self.webhook_private_targets,
            artifacts_direct=self.artifacts_direct,
            keep_checkpoints_days=self.keep_checkpoints_days,
            keep_logs_days=self.keep_logs_days,
            hot_metrics_days=self.hot_metrics_days,
            collect_grace_hours=self.collect_grace_hours,
            collect_every_hours=self.collect_every_hours,
        )


def notebook_path() -> str | None:
    """The notebook of this kernel, as Jupyter's server tells its kernels."""
    return os.environ.get("JPY_SESSION_NAME")


@dataclass(frozen=True)
class PlatformConfig:
    """Everything a process of the platform needs to know, picklable and complete."""

    state_dir: str
    postgres_url: str
    clickhouse_url: str
    artifacts_url: str
    http_url: str
    heartbeat_timeout_s: float = 60.0
    executors: int = 1
    max_active_runs: int = 500
    webhook_private_targets: tuple[str, ...] = ()
    artifacts_direct: bool = False
    keep_checkpoints_days: float = 7
    keep_logs_days: float = 365
    hot_metrics_days: float = 365
    collect_grace_hours: float = 24
    collect_every_hours: float = 24


#: What may follow ``?`` in a ClickHouse URL, with clickhouse-connect's meaning.
CLICKHOUSE_OPTIONS = ("ca_cert", "client_cert", "client_cert_key", "compress", "server_host_name", "verify")


def _check_clickhouse_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme not in {"clickhouse", "clickhouses"}:
        raise ValueError("must start with clickhouse:// (or clickhouses:// for TLS)")
    if not parts.hostname:
        raise ValueError("must name a host: clickhouse://host:8123/database")
    _ = parts.port  # raises when it is none
    if "/" in parts.path.strip("/"):
        raise ValueError("may have one name after the host, the database")
    for name, _value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in CLICKHOUSE_OPTIONS:
            raise ValueError(f"the option {name} is not known; there are {', '.join(CLICKHOUSE_OPTIONS)}")


def _check_target(entry: str) -> None:
    try:
        ipaddress.ip_network(entry, strict=False)
    except ValueError as error:
        if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.\-]*[A-Za-z0-9_])?", entry):
            raise ValueError(f"{entry!r} is no host, address or network such as 10.0.0.0/8") from error


#: Bytes a Unix socket path may have (``sun_path`` is 108 with its final NUL).
UNIX_PATH_MAX = 107


def postgres_socket_dir(state_dir: Path) -> Path:
    """Folder of the embedded Postgres' socket.

    Raises:
        InvalidInput: the state folder's path is too long for a Unix socket.
    """
    folder = state_dir / "postgres" / "socket"
    if len(os.fsencode(folder / ".s.PGSQL.5432")) > UNIX_PATH_MAX:
        raise InvalidInput(
            f"the state folder's path is too long for Unix sockets ({UNIX_PATH_MAX} bytes): {state_dir}. "
            "Set MLPLAT_STATE_DIR to a shorter one."
        )
    return folder


def embedded_postgres_url(state_dir: Path) -> str:
    """SQLAlchemy URL of the Postgres that lives in ``state_dir``."""
    return f"postgresql+psycopg://postgres@/mlplat?host={quote(str(postgres_socket_dir(state_dir)))}"
