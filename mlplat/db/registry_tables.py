"""The tables of the model registry."""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from mlplat.db.metadata import metadata, value_indexes
from mlplat.db.metadata import time_column as _time
from mlplat.db.snapshots import TRANSACTION_ID

registered_model = Table(
    "registered_model",
    metadata,
    Column("name", Text, primary_key=True),
    # What its history is told by: names change, and may be used again by another model.
    Column("model_id", BigInteger, Identity(), nullable=False, unique=True),
    Column("description", Text, nullable=False, server_default=""),
    Column("last_version", BigInteger, nullable=False, server_default="0"),
    # The highest that there ever was, as three numbers.
    Column("last_semantic", ARRAY(Integer), nullable=True),
    # Who may move its versions where; see registry/policy.py.
    Column("policy", JSONB, nullable=True),
    _time("created_at"),
    _time("updated_at"),
)

registered_model_tag = Table(
    "registered_model_tag",
    metadata,
    Column(
        "name",
        ForeignKey("registered_model.name", ondelete="CASCADE", onupdate="CASCADE"),
        primary_key=True,
    ),
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
    *value_indexes("registered_model_tag", "name"),
)

model_version = Table(
    "model_version",
    metadata,
    Column(
        "name",
        ForeignKey("registered_model.name", ondelete="CASCADE", onupdate="CASCADE"),
        primary_key=True,
    ),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("description", Text, nullable=False, server_default=""),
    Column("source", Text, nullable=False),
    Column("artifact_uri", Text, nullable=False),
    Column("run_id", Text, nullable=True),
    Column("run_link", Text, nullable=True),
    Column("user_id", Text, nullable=False, server_default=""),
    Column("stage", Text, nullable=False, server_default="None"),
    # Three numbers; arrays compare as semantic versions do.
    Column("semantic", ARRAY(Integer), nullable=False),
    Column("bump", Text, nullable=False),
    Column("bump_reason", Text, nullable=False),
    # What its files were, see artifacts/manifest.py; null: they are elsewhere, or there were none.
    Column("manifest", Text, nullable=True),
    Column("stamp", Text, nullable=True),
    # Of these files; null: nobody has added it up yet.
    Column("size_bytes", BigInteger, nullable=True),
    # What the next version is compared with; the run may be gone by then.
    Column("facts", JSONB, nullable=False, server_default=text("'{}'")),
    _time("created_at"),
    _time("updated_at"),
    Index(None, "run_id"),
    # What was made of a logged model, or of another version.
    Index("ix_model_version_source", "source", postgresql_where=text("source LIKE 'models:/%'")),
    # Versions whose run only their source tells.
    Index("ix_model_version_facts_run", text("(facts ->> 'run_id')"), postgresql_where=text("run_id IS NULL")),
    UniqueConstraint("name", "semantic"),
    # The newest version of each stage.
    Index(None, "name", "stage", "version"),
    # The order of a search, which walks it without a look at the table; of the few versions with a stage, also by it.
    Index(
        "ix_model_version_newest",
        text("updated_at DESC"),
        "name",
        text("version DESC"),
        postgresql_include=["run_id"],
    ),
    Index(
        "ix_model_version_stage_newest",
        "stage",
        text("updated_at DESC"),
        "name",
        text("version DESC"),
        postgresql_include=["run_id"],
        postgresql_where=text("stage <> 'None'"),
    ),
)

model_version_tag = Table(
    "model_version_tag",
    metadata,
    Column("name", Text, primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
    ForeignKeyConstraint(
        ["name", "version"],
        ["model_version.name", "model_version.version"],
        ondelete="CASCADE",
        onupdate="CASCADE",
    ),
    *value_indexes("model_version_tag", "name", "version"),
)

model_alias = Table(
    "model_alias",
    metadata,
    Column("name", Text, primary_key=True),
    Column("alias", Text, primary_key=True),
    Column("version", BigInteger, nullable=False),
    ForeignKeyConstraint(
        ["name", "version"],
        ["model_version.name", "model_version.version"],
        ondelete="CASCADE",
        onupdate="CASCADE",
    ),
    Index(None, "alias", postgresql_include=["name", "version"]),
)

registry_event = Table(
    "registry_event",
    metadata,
    Column("event_id", BigInteger, Identity(), primary_key=True),
    # The caller's id of the request: a repeat finds its first answers here instead of acting twice.
    Column("request_id", Text, nullable=False),
    # A request may have several commands.
    Column("part", SmallInteger, nullable=False, server_default="0"),
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False),
    # No reference: the history of a deleted model stays.
    Column("model_id", BigInteger, nullable=True),
    Column("command", JSONB, nullable=False),
    Column("answer", JSONB, nullable=False),
    Column("user_id", Text, nullable=False, server_default=""),
    Column("reason", Text, nullable=False, server_default=""),
    Column("epoch", BigInteger, nullable=False),
    Column("txid", BigInteger, nullable=False, server_default=text(TRANSACTION_ID)),
    _time("created_at", default=True),
    UniqueConstraint("request_id", "part"),
    Index(None, "name", "event_id"),
    Index(None, "model_id", "event_id"),
    Index(None, "txid"),
)

registry_change = Table(
    "registry_change",
    metadata,
    Column("change_id", BigInteger, Identity(), primary_key=True),
    Column("event_id", ForeignKey("registry_event.event_id"), nullable=False),
    # No reference: the history of a deleted model stays.
    Column("model_id", BigInteger, nullable=False),
    Column("subject", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("before", Text, nullable=True),
    Column("after", Text, nullable=True),
    Index(None, "event_id"),
    # The latest change of each alias or version before a moment.
    Index(None, "model_id", "subject", "key", "change_id"),
    # Which model had a name.
    Index("ix_registry_change_name", "after", "change_id", postgresql_where=text("subject = 'model'")),
)
