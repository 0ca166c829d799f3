"""Alembic migrations, run at bring-up under a lock."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from mlplat.db.engine import open_sync_engine
from mlplat.errors import BringUpError

#: Any constant will do, so long as every bring-up uses the same one.
_LOCK_KEY = 0x6D6C706C


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def head_revision() -> str:
    """The revision that this version of the code needs."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    assert head is not None, "the package ships no migrations"
    return head


def require_known(revision: str) -> None:
    """Checks that this version's code can bring a schema to its own.

    Raises:
        BringUpError: it is of a newer version.
    """
    if revision not in _known():
        raise BringUpError(
            f"schema {revision!r} is not known to this version of mlplat (schema {head_revision()!r}): it was written "
            "by a newer one. Install that version."
        )


def migrate(url: str, target: str = "head") -> str:
    """Brings the database at ``url`` to this version's schema, or up to ``target``, and returns the revision.

    Concurrent calls wait for one another; a second one finds nothing to do.

    Raises:
        BringUpError: the schema is newer than this version of the code.
    """
    engine = open_sync_engine(url, "migrate")
    try:
        with engine.connect() as connection:
            connection.execute(text("SET statement_timeout = 0"))
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _LOCK_KEY})
            connection.commit()
            try:
                return _upgrade(connection, target)
            finally:
                connection.rollback()
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _LOCK_KEY})
                connection.commit()
    finally:
        engine.dispose()


def _upgrade(connection: Connection, target: str) -> str:
    config = _config()
    current = MigrationContext.configure(connection).get_current_revision()
    if current is not None and current not in _known():
        raise BringUpError(
            f"the database has schema {current!r}, which this version (schema {head_revision()!r}) does not know: "
            "it was written by a newer mlplat. Install that version, or point MLPLAT_STATE_DIR at another folder."
        )
    if current == head_revision():
        return current
    config.attributes["connection"] = connection
    command.upgrade(config, target)
    connection.commit()
    return head_revision() if target == "head" else target


def _known() -> set[str]:
    return {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
