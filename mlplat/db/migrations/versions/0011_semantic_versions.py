"""semantic versions beside the counting number"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("registered_model", sa.Column("last_semantic", postgresql.ARRAY(sa.Integer()), nullable=True))
    op.add_column("model_version", sa.Column("semantic", postgresql.ARRAY(sa.Integer()), nullable=True))
    op.add_column("model_version", sa.Column("bump", sa.Text(), nullable=True))
    op.add_column("model_version", sa.Column("bump_reason", sa.Text(), nullable=True))
    op.add_column(
        "model_version", sa.Column("facts", postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False)
    )
    op.execute(
        "UPDATE model_version AS v SET semantic = ARRAY[1, 0, counted.place - 1], bump_reason = 'nothing was compared', "
        "bump = CASE counted.place WHEN 1 THEN '' ELSE 'patch' END "
        "FROM (SELECT name, version, row_number() OVER (PARTITION BY name ORDER BY version)::integer AS place "
        "FROM model_version) AS counted WHERE (v.name, v.version) = (counted.name, counted.version)"
    )
    op.execute(
        "UPDATE registered_model AS m SET last_semantic = "
        "(SELECT max(semantic) FROM model_version AS v WHERE v.name = m.name)"
    )
    for column in ("semantic", "bump", "bump_reason"):
        op.alter_column("model_version", column, nullable=False)
    op.create_unique_constraint(op.f("uq_model_version_name_semantic"), "model_version", ["name", "semantic"])


def downgrade() -> None:
    raise NotImplementedError("semantic versions have no older form")
