"""Indexes that run search needs: params and tags by value, params by number, runs by start."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# As they were when this revision was made; the tables of the code may move on.
_NUMBER = (
    "CASE WHEN length(value) <= 200 AND (value ~ "
    r"'^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,2})?$|^[+-]?[0-9](\.[0-9]{0,17})?[eE][+-]?[12][0-9]{2}$' "
    "OR value ~* '^[+-]?(inf|infinity)$') THEN (value)::double precision END"
)


def upgrade() -> None:
    op.execute(f"ALTER TABLE run_param ADD COLUMN number double precision GENERATED ALWAYS AS ({_NUMBER}) STORED")
    op.execute("CREATE INDEX ix_run_param_number ON run_param (key, number) INCLUDE (run_id) WHERE number IS NOT NULL")
    for table in ("run_param", "run_tag"):
        op.execute(
            f"CREATE INDEX ix_{table}_short_value ON {table} (key, value) INCLUDE (run_id) WHERE length(value) <= 256"
        )
        op.execute(f"CREATE INDEX ix_{table}_long_value ON {table} (key) INCLUDE (run_id) WHERE length(value) > 256")
    op.execute("DROP INDEX ix_run_tag_key_value")
    op.execute("DROP INDEX ix_run_experiment_id_run_id")
    op.execute(
        "CREATE INDEX ix_run_experiment_id_run_id ON run (experiment_id, started_at DESC, run_id) INCLUDE (deleted)"
    )


def downgrade() -> None:
    op.execute("DROP INDEX ix_run_experiment_id_run_id")
    op.execute("CREATE INDEX ix_run_experiment_id_run_id ON run (experiment_id, started_at DESC, run_id)")
    op.execute("CREATE INDEX ix_run_tag_key_value ON run_tag (key, left(value, 256))")
    for table in ("run_param", "run_tag"):
        op.execute(f"DROP INDEX ix_{table}_short_value")
        op.execute(f"DROP INDEX ix_{table}_long_value")
    op.execute("ALTER TABLE run_param DROP COLUMN number")
