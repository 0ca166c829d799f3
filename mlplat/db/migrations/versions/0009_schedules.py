"""schedules, triggers, and what they decided"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

_TIME = sa.DateTime(timezone=True)
_NOW = sa.text("clock_timestamp()")
_TRANSACTION_ID = sa.text("(pg_current_xact_id())::text::bigint")


def upgrade() -> None:
    op.add_column("registry_event", sa.Column("txid", sa.BigInteger(), server_default=_TRANSACTION_ID, nullable=False))
    op.create_index(op.f("ix_registry_event_txid"), "registry_event", ["txid"])
    op.add_column("pipeline_run", sa.Column("ended_txid", sa.BigInteger(), nullable=True))
    op.create_index(
        "ix_pipeline_run_ended", "pipeline_run", ["ended_txid"], postgresql_where=sa.text("ended_txid IS NOT NULL")
    )
    _create_schedule()
    _create_trigger()
    _create_firing()


def _create_schedule() -> None:
    op.create_table(
        "schedule",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("params", postgresql.JSONB(), nullable=False),
        sa.Column("cron", sa.Text(), nullable=False),
        sa.Column("time_zone", sa.Text(), nullable=False),
        sa.Column("catch_up", sa.Text(), nullable=False),
        sa.Column("catch_up_limit", sa.Integer(), nullable=False),
        sa.Column("misfire_grace_s", postgresql.DOUBLE_PRECISION(), nullable=False),
        sa.Column("starts_at", _TIME, nullable=True),
        sa.Column("ends_at", _TIME, nullable=True),
        sa.Column("paused", sa.Boolean(), nullable=False),
        sa.Column("next_at", _TIME, nullable=True),
        sa.Column("last_at", _TIME, nullable=True),
        sa.Column("last_run_id", sa.Text(), nullable=True),
        sa.Column("created_by", sa.Text(), server_default="", nullable=False),
        sa.Column("created_at", _TIME, server_default=_NOW, nullable=False),
        sa.Column("updated_at", _TIME, server_default=_NOW, nullable=False),
        sa.ForeignKeyConstraint(["digest"], ["pipeline.digest"], name=op.f("fk_schedule_digest")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_schedule")),
    )
    op.create_index("ix_schedule_next", "schedule", ["next_at"], postgresql_where=sa.text("next_at IS NOT NULL"))


def _create_trigger() -> None:
    op.create_table(
        "trigger",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("params", postgresql.JSONB(), nullable=False),
        sa.Column("filter", postgresql.JSONB(), nullable=False),
        sa.Column("max_per_hour", sa.Integer(), nullable=False),
        sa.Column("paused", sa.Boolean(), nullable=False),
        sa.Column("since", sa.Text(), nullable=False),
        sa.Column("auth", sa.Text(), nullable=True),
        sa.Column("secret", sa.LargeBinary(), nullable=True),
        sa.Column("last_at", _TIME, nullable=True),
        sa.Column("last_run_id", sa.Text(), nullable=True),
        sa.Column("created_by", sa.Text(), server_default="", nullable=False),
        sa.Column("created_at", _TIME, server_default=_NOW, nullable=False),
        sa.Column("updated_at", _TIME, server_default=_NOW, nullable=False),
        sa.ForeignKeyConstraint(["digest"], ["pipeline.digest"], name=op.f("fk_trigger_digest")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_trigger")),
    )
    op.create_table(
        "event_cursor",
        sa.Column("origin", sa.Text(), nullable=False),
        sa.Column("snapshot", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("origin", name=op.f("pk_event_cursor")),
    )


def _create_firing() -> None:
    op.create_table(
        "firing",
        sa.Column("firing_id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("event_id", sa.Text(), nullable=False),
        sa.Column("event_at", _TIME, nullable=False),
        sa.Column("digest", sa.Text(), nullable=True),
        sa.Column("params", postgresql.JSONB(), nullable=True),
        sa.Column("submitted_by", sa.Text(), server_default="", nullable=False),
        sa.Column("lineage", postgresql.JSONB(), server_default=sa.text("'[]'"), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), server_default="", nullable=False),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column("tries", sa.Integer(), server_default="0", nullable=False),
        sa.Column("retry_at", _TIME, nullable=True),
        sa.Column("created_at", _TIME, server_default=_NOW, nullable=False),
        sa.ForeignKeyConstraint(["digest"], ["pipeline.digest"], name=op.f("fk_firing_digest")),
        sa.PrimaryKeyConstraint("firing_id", name=op.f("pk_firing")),
        sa.UniqueConstraint("source", "event_id", name=op.f("uq_firing_source_event_id")),
    )
    op.create_index(op.f("ix_firing_source_created_at"), "firing", ["source", "created_at"])
    op.create_index("ix_firing_pending", "firing", ["firing_id"], postgresql_where=sa.text("state = 'PENDING'"))
    op.create_index("ix_firing_run", "firing", ["run_id"], postgresql_where=sa.text("run_id IS NOT NULL"))


def downgrade() -> None:
    raise NotImplementedError("schedules and triggers have no older form")
