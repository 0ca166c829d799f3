"""Indexes that search of the registry needs: tags by value, aliases, versions newest first."""

from __future__ import annotations

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

_OWNERS = {"registered_model_tag": "name", "model_version_tag": "name, version"}
_NEWEST = "updated_at DESC, name, version DESC"
_RUN = "INCLUDE (run_id)"


def upgrade() -> None:
    for table, owner in _OWNERS.items():
        op.execute(
            f"CREATE INDEX ix_{table}_short_value ON {table} (key, value) INCLUDE ({owner}) WHERE length(value) <= 64"
        )
        op.execute(f"CREATE INDEX ix_{table}_long_value ON {table} (key) INCLUDE ({owner}) WHERE length(value) > 64")
    op.execute("CREATE INDEX ix_model_alias_alias ON model_alias (alias) INCLUDE (name, version)")
    op.execute(f"CREATE INDEX ix_model_version_newest ON model_version ({_NEWEST}) {_RUN}")
    op.execute(
        f"CREATE INDEX ix_model_version_stage_newest ON model_version (stage, {_NEWEST}) {_RUN} WHERE stage <> 'None'"
    )


def downgrade() -> None:
    op.execute("DROP INDEX ix_model_version_stage_newest")
    op.execute("DROP INDEX ix_model_version_newest")
    op.execute("DROP INDEX ix_model_alias_alias")
    for table in _OWNERS:
        op.execute(f"DROP INDEX ix_{table}_long_value")
        op.execute(f"DROP INDEX ix_{table}_short_value")
