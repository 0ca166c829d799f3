"""heartbeats of runs"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("run", sa.Column("heartbeat_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index("ix_run_running", "run", ["run_id"], postgresql_where=sa.text("status = 'RUNNING'"))


def downgrade() -> None:
    op.drop_index("ix_run_running", "run")
    op.drop_column("run", "heartbeat_at")
