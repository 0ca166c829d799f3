"""what the files of versions were"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("model_version", sa.Column("manifest", sa.Text(), nullable=True))
    op.add_column("model_version", sa.Column("stamp", sa.Text(), nullable=True))


def downgrade() -> None:
    raise NotImplementedError("what the files of versions were has no older form")
