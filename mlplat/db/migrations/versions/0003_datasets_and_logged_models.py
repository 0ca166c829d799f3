"""datasets and logged models"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "dataset",
        sa.Column("dataset_id", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("experiment_id", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("source_type", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("schema", sa.Text(), nullable=True),
        sa.Column("profile", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["experiment_id"], ["experiment.experiment_id"], name=op.f("fk_dataset_experiment_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("dataset_id", name=op.f("pk_dataset")),
        sa.UniqueConstraint("experiment_id", "name", "digest", name=op.f("uq_dataset_experiment_id_name_digest")),
    )
    op.create_table(
        "logged_model",
        sa.Column("model_id", sa.Text(), nullable=False),
        sa.Column("experiment_id", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("artifact_location", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("model_type", sa.Text(), nullable=True),
        sa.Column("source_run_id", sa.Text(), nullable=True),
        sa.Column("deleted", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["experiment_id"],
            ["experiment.experiment_id"],
            name=op.f("fk_logged_model_experiment_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("model_id", name=op.f("pk_logged_model")),
    )
    op.create_index(
        op.f("ix_logged_model_experiment_id_model_id"),
        "logged_model",
        ["experiment_id", sa.literal_column("created_at DESC"), "model_id"],
        unique=False,
    )
    op.create_index(op.f("ix_logged_model_source_run_id"), "logged_model", ["source_run_id"], unique=False)
    for table in ("logged_model_param", "logged_model_tag"):
        op.create_table(
            table,
            sa.Column("model_id", sa.Text(), nullable=False),
            sa.Column("key", sa.Text(), nullable=False),
            sa.Column("value", sa.Text(), nullable=False),
            sa.ForeignKeyConstraint(
                ["model_id"], ["logged_model.model_id"], name=op.f(f"fk_{table}_model_id"), ondelete="CASCADE"
            ),
            sa.PrimaryKeyConstraint("model_id", "key", name=op.f(f"pk_{table}")),
        )
    op.create_table(
        "logged_model_metric",
        sa.Column("model_id", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.DOUBLE_PRECISION(), nullable=False),
        sa.Column("timestamp", sa.BigInteger(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("dataset_name", sa.Text(), nullable=True),
        sa.Column("dataset_digest", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["model_id"], ["logged_model.model_id"], name=op.f("fk_logged_model_metric_model_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["run_id"], ["run.run_id"], name=op.f("fk_logged_model_metric_run_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("model_id", "digest", name=op.f("pk_logged_model_metric")),
    )
    op.create_index(op.f("ix_logged_model_metric_model_id_key"), "logged_model_metric", ["model_id", "key"])
    op.create_index(op.f("ix_logged_model_metric_run_id"), "logged_model_metric", ["run_id"])
    op.create_table(
        "run_input",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("dataset_id", sa.BigInteger(), nullable=False),
        sa.Column("tags", postgresql.JSONB(astext_type=sa.Text()), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("position", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.run_id"], name=op.f("fk_run_input_run_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["dataset_id"], ["dataset.dataset_id"], name=op.f("fk_run_input_dataset_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("run_id", "dataset_id", name=op.f("pk_run_input")),
    )
    op.create_index(op.f("ix_run_input_dataset_id"), "run_input", ["dataset_id"], unique=False)
    op.create_table(
        "run_model",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("direction", sa.Text(), nullable=False),
        sa.Column("model_id", sa.Text(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("position", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.run_id"], name=op.f("fk_run_model_run_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(
            ["model_id"], ["logged_model.model_id"], name=op.f("fk_run_model_model_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("run_id", "direction", "model_id", name=op.f("pk_run_model")),
    )
    op.create_index(op.f("ix_run_model_model_id"), "run_model", ["model_id"], unique=False)
