"""policies of models, moves that need approvals, and what was refused"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

_NOW = sa.text("clock_timestamp()")


def upgrade() -> None:
    op.add_column("registered_model", sa.Column("policy", postgresql.JSONB(), nullable=True))
    _create_requests()
    _create_decisions()
    _create_refusals()


def _create_requests() -> None:
    op.create_table(
        "move_request",
        sa.Column("move_id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("model_id", sa.BigInteger(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("before", sa.Text(), nullable=False),
        sa.Column("archive_others", sa.Boolean(), nullable=False),
        sa.Column("state", sa.Text(), server_default="OPEN", nullable=False),
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=_NOW, nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("move_id", name=op.f("pk_move_request")),
    )
    op.create_index(op.f("ix_move_request_model_id_move_id"), "move_request", ["model_id", "move_id"])
    op.create_index(
        "ix_move_request_open", "move_request", ["model_id", "move_id"], postgresql_where=sa.text("state = 'OPEN'")
    )


def _create_decisions() -> None:
    op.create_table(
        "move_decision",
        sa.Column("move_id", sa.BigInteger(), nullable=False),
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.Column("approve", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=_NOW, nullable=False),
        sa.ForeignKeyConstraint(["move_id"], ["move_request.move_id"], name=op.f("fk_move_decision_move_id")),
        sa.PrimaryKeyConstraint("move_id", "user_id", name=op.f("pk_move_decision")),
    )


def _create_refusals() -> None:
    op.create_table(
        "registry_refusal",
        sa.Column("refusal_id", sa.BigInteger(), sa.Identity(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("model_id", sa.BigInteger(), nullable=True),
        sa.Column("commands", postgresql.JSONB(), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("user_id", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=_NOW, nullable=False),
        sa.PrimaryKeyConstraint("refusal_id", name=op.f("pk_registry_refusal")),
    )
    op.create_index(op.f("ix_registry_refusal_name_refusal_id"), "registry_refusal", ["name", "refusal_id"])
    op.create_index(op.f("ix_registry_refusal_model_id_refusal_id"), "registry_refusal", ["model_id", "refusal_id"])


def downgrade() -> None:
    raise NotImplementedError("what was asked for and approved has no older form")
