"""stages, requests of several commands, and whose history an event is"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("registered_model", sa.Column("model_id", sa.BigInteger(), sa.Identity(), nullable=False))
    op.create_unique_constraint(op.f("uq_registered_model_model_id"), "registered_model", ["model_id"])
    op.add_column("model_version", sa.Column("stage", sa.Text(), server_default="None", nullable=False))
    op.create_index(op.f("ix_model_version_name_stage_version"), "model_version", ["name", "stage", "version"])
    op.add_column("registry_event", sa.Column("part", sa.SmallInteger(), server_default="0", nullable=False))
    op.add_column("registry_event", sa.Column("model_id", sa.BigInteger(), nullable=True))
    op.add_column("registry_event", sa.Column("user_id", sa.Text(), server_default="", nullable=False))
    op.add_column("registry_event", sa.Column("reason", sa.Text(), server_default="", nullable=False))
    op.drop_constraint(op.f("uq_registry_event_request_id"), "registry_event")
    op.create_unique_constraint(op.f("uq_registry_event_request_id_part"), "registry_event", ["request_id", "part"])
    op.create_index(op.f("ix_registry_event_model_id_event_id"), "registry_event", ["model_id", "event_id"])
    op.execute(
        "UPDATE registry_event AS e SET model_id = m.model_id FROM registered_model AS m "
        "WHERE e.created_at >= m.created_at "
        "AND (m.name = e.name OR (e.kind = 'RenameModel' AND m.name = e.command ->> 'new_name'))"
    )
    _create_change()
    _remember()


def _create_change() -> None:
    op.create_table(
        "registry_change",
        sa.Column("change_id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("event_id", sa.BigInteger(), nullable=False),
        sa.Column("model_id", sa.BigInteger(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("before", sa.Text(), nullable=True),
        sa.Column("after", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["event_id"], ["registry_event.event_id"], name=op.f("fk_registry_change_event_id")),
        sa.PrimaryKeyConstraint("change_id", name=op.f("pk_registry_change")),
    )
    op.create_index(op.f("ix_registry_change_event_id"), "registry_change", ["event_id"])
    op.create_index(
        op.f("ix_registry_change_model_id_subject_key_change_id"),
        "registry_change",
        ["model_id", "subject", "key", "change_id"],
    )
    op.create_index(
        "ix_registry_change_name", "registry_change", ["after", "change_id"],
        postgresql_where=sa.text("subject = 'model'"),
    )  # fmt: skip


def _remember() -> None:
    """What is there now: since its own event, or since the model has its name where that event has an older name."""
    op.execute(
        "INSERT INTO registry_change (event_id, model_id, subject, key, before, after) "
        "SELECT max(e.event_id), m.model_id, 'model', 'name', NULL, m.name "
        "FROM registered_model AS m JOIN registry_event AS e USING (model_id) "
        "WHERE (e.kind = 'CreateModel' AND e.name = m.name) "
        "OR (e.kind = 'RenameModel' AND e.command ->> 'new_name' = m.name) GROUP BY m.model_id, m.name ORDER BY 1"
    )
    _remember_each("stage", "version", "'None'", "model_version", "CreateVersion", "answer ->> 'version'")
    _remember_each("alias", "alias", "t.version::text", "model_alias", "SetAlias", "command ->> 'alias'")


def _remember_each(subject: str, key: str, after: str, table: str, kind: str, key_of_event: str) -> None:
    op.execute(
        "INSERT INTO registry_change (event_id, model_id, subject, key, before, after) "  # noqa: S608 - of our words
        f"SELECT coalesce(own.event_id, named.event_id), m.model_id, '{subject}', t.{key}::text, NULL, {after} "
        f"FROM {table} AS t JOIN registered_model AS m USING (name) "
        "JOIN registry_change AS named ON named.model_id = m.model_id AND named.subject = 'model' "
        f"LEFT JOIN LATERAL (SELECT event_id FROM registry_event AS e WHERE e.model_id = m.model_id "
        f"AND e.kind = '{kind}' AND e.{key_of_event} = t.{key}::text ORDER BY event_id DESC LIMIT 1) AS own ON true "
        f"ORDER BY 1, t.{key}"
    )


def downgrade() -> None:
    raise NotImplementedError("the registry's history has no older form")
