"""the metric log is partitioned, so that flushed groups leave by TRUNCATE"""

from __future__ import annotations

import hashlib

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("CREATE TEMPORARY TABLE metric_log_0001 ON COMMIT DROP AS SELECT * FROM metric_log")
    op.drop_table("metric_log")
    op.create_table(
        "metric_log",
        sa.Column("slot", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("points", sa.Integer(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("slot", "seq", name=op.f("pk_metric_log")),
        postgresql_partition_by="LIST (slot)",
    )
    # What a crash left unflushed moves on; the shard reads bare Arrow streams too.
    connection = op.get_bind()
    for shard in connection.execute(sa.text("SELECT DISTINCT shard FROM metric_log_0001")).scalars().all():
        slot = f"{shard}/0"
        name = f"metric_log_{hashlib.sha256(slot.encode()).hexdigest()[:16]}"
        quoted = sa.literal(slot).compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True})
        op.execute(f"CREATE TABLE {name} PARTITION OF metric_log FOR VALUES IN ({quoted})")
        op.execute(f"ALTER TABLE {name} ALTER COLUMN body SET STORAGE EXTERNAL")
        connection.execute(
            sa.text("INSERT INTO metric_log SELECT :slot, seq, points, body FROM metric_log_0001 WHERE shard = :shard"),
            {"slot": slot, "shard": shard},
        )
