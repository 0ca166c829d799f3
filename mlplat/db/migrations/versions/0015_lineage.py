"""lineage that outlives runs, and the ways through the graph"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "lineage_run",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("record", postgresql.JSONB(), nullable=False),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_lineage_run")),
    )
    op.create_table(
        "lineage_edge",
        sa.Column("upstream", sa.Text(), nullable=False),
        sa.Column("downstream", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("upstream", "downstream", name=op.f("pk_lineage_edge")),
    )
    op.create_index(op.f("ix_lineage_edge_downstream"), "lineage_edge", ["downstream"])
    for name, key in (("ix_run_tag_pipeline_run", "mlplat.pipelineRun"), ("ix_run_tag_parent", "mlflow.parentRunId")):
        op.create_index(name, "run_tag", ["value", "run_id"], postgresql_where=sa.text(f"key = '{key}'"))
    op.create_index(
        "ix_step_run_reused", "step_run", ["reused_from"], postgresql_where=sa.text("reused_from IS NOT NULL")
    )
    op.create_index(op.f("ix_dataset_digest_name"), "dataset", ["digest", "name"])
    op.create_index(
        "ix_model_version_source", "model_version", ["source"], postgresql_where=sa.text("source LIKE 'models:/%'")
    )
    op.create_index(
        "ix_model_version_facts_run", "model_version", [sa.text("(facts ->> 'run_id')")],
        postgresql_where=sa.text("run_id IS NULL"),
    )  # fmt: skip


def downgrade() -> None:
    raise NotImplementedError("lineage of purged runs has no older form")
