"""an index of the tags of inputs, which name feature views"""

from __future__ import annotations

from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_run_input_tags", "run_input", ["tags"], postgresql_using="gin")


def downgrade() -> None:
    op.drop_index("ix_run_input_tags", "run_input")
