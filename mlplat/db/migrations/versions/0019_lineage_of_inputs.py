"""indexes for lineage through feature views, and through files of runs"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_run_input_tags", "run_input", ["tags"], postgresql_using="gin")
    run_of_file = "left(split_part(split_part(source, 'mlplat://', 2), '/', 1), 64)"
    there = sa.text(f"{run_of_file} <> ''")
    op.create_index("ix_dataset_run", "dataset", [sa.text(run_of_file)], postgresql_where=there)


def downgrade() -> None:
    op.drop_index("ix_dataset_run", "dataset")
    op.drop_index("ix_run_input_tags", "run_input")
