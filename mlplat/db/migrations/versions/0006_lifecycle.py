"""lifecycle: when things were deleted, what is being purged, moved or imported"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

_LATER = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column("experiment", sa.Column("deleted_at", _LATER, nullable=True))
    op.add_column("experiment", sa.Column("purge_started_at", _LATER, nullable=True))
    op.add_column("experiment", sa.Column("import_origin", sa.Text(), nullable=True))
    op.add_column("experiment", sa.Column("importing", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.create_unique_constraint(op.f("uq_experiment_import_origin"), "experiment", ["import_origin"])
    op.add_column("run", sa.Column("deleted_at", _LATER, nullable=True))
    op.add_column(
        "run", sa.Column("deleted_with_experiment", sa.Boolean(), server_default=sa.text("false"), nullable=False)
    )
    op.add_column("run", sa.Column("importing", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.add_column("run", sa.Column("purge_started_at", _LATER, nullable=True))
    op.create_index("ix_run_deleted", "run", ["run_id"], postgresql_where=sa.text("deleted"))
    # Nobody knows when these were deleted: their age counts from now, so that no purge takes them early.
    op.execute("UPDATE experiment SET deleted_at = clock_timestamp() WHERE deleted")
    op.execute(
        "UPDATE run SET deleted_at = clock_timestamp(), deleted_with_experiment = experiment.deleted "
        "FROM experiment WHERE experiment.experiment_id = run.experiment_id AND run.deleted"
    )
    op.create_table(
        "metric_outbox",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("created_at", _LATER, server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_metric_outbox")),
    )
    op.create_table(
        "run_import",
        sa.Column("experiment_id", sa.BigInteger(), nullable=False),
        sa.Column("source_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("complete", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.ForeignKeyConstraint(
            ["experiment_id"],
            ["experiment.experiment_id"],
            name=op.f("fk_run_import_experiment_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("experiment_id", "source_id", name=op.f("pk_run_import")),
        sa.UniqueConstraint("run_id", name=op.f("uq_run_import_run_id")),
    )


def downgrade() -> None:
    op.drop_table("run_import")
    op.drop_table("metric_outbox")
    op.drop_index("ix_run_deleted", "run")
    for column in ("purge_started_at", "importing", "deleted_with_experiment", "deleted_at"):
        op.drop_column("run", column)
    for column in ("importing", "import_origin", "purge_started_at", "deleted_at"):
        op.drop_column("experiment", column)
