"""pipelines: queueing, signals, children, progress, cached outputs"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column("pipeline_run", sa.Column("seq", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("pipeline_run", sa.Column("source", sa.Text(), server_default="", nullable=False))
    op.add_column("pipeline_run", sa.Column("priority", sa.SmallInteger(), server_default="0", nullable=False))
    op.add_column("pipeline_run", sa.Column("concurrency_key", sa.Text(), nullable=True))
    op.add_column("pipeline_run", sa.Column("concurrency_limit", sa.Integer(), nullable=True))
    op.add_column("pipeline_run", sa.Column("resumed_from", sa.Text(), nullable=True))
    op.add_column("pipeline_run", sa.Column("resumed_step", sa.Text(), nullable=True))
    op.add_column("pipeline_run", sa.Column("output", postgresql.JSON(), nullable=True))
    op.add_column("pipeline_run", sa.Column("stopping", sa.Text(), nullable=True))
    op.create_index("ix_pipeline_run_name", "pipeline_run", ["name", sa.text("created_at DESC")])
    op.create_index(
        "ix_pipeline_run_finished", "pipeline_run", ["finished_at"],
        postgresql_where=sa.text("finished_at IS NOT NULL"),
    )  # fmt: skip

    op.drop_constraint("fk_attempt_run_id_step_item", "attempt", type_="foreignkey")
    op.drop_constraint("fk_step_run_run_id", "step_run", type_="foreignkey")
    op.add_column("step_run", sa.Column("reused_from", sa.Text(), nullable=True))
    op.add_column("step_run", sa.Column("seq", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("step_run", sa.Column("queued_at", _TIME, nullable=True))

    op.add_column("attempt", sa.Column("node", sa.Text(), nullable=True))
    op.add_column("attempt", sa.Column("progress", postgresql.JSON(), nullable=True))
    op.add_column("attempt", sa.Column("child_id", sa.Text(), nullable=True))
    op.add_column("attempt", sa.Column("seq", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("attempt", sa.Column("queued_at", _TIME, nullable=True))
    op.execute("UPDATE attempt SET queued_at = started_at")
    op.alter_column("attempt", "queued_at", nullable=False)
    op.alter_column("attempt", "started_at", nullable=True)

    op.create_table(
        "pipeline_signal",
        sa.Column("signal_id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("step", sa.Text(), server_default="", nullable=False),
        sa.Column("by", sa.Text(), nullable=False),
        sa.Column("comment", sa.Text(), server_default="", nullable=False),
        sa.Column("created_at", _TIME, server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["run_id"], ["pipeline_run.run_id"], name=op.f("fk_pipeline_signal_run_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("signal_id", name=op.f("pk_pipeline_signal")),
    )
    op.create_index(op.f("ix_pipeline_signal_run_id"), "pipeline_signal", ["run_id"])
    op.create_table(
        "step_cache",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("output", postgresql.JSON(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("step", sa.Text(), nullable=False),
        sa.Column("item", sa.Integer(), nullable=False),
        sa.Column("created_at", _TIME, server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_step_cache")),
    )


def downgrade() -> None:
    raise NotImplementedError("runs with children and signals have no older form")
