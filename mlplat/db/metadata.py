"""What all tables have in common."""

from __future__ import annotations

from sqlalchemy import Column, DateTime, MetaData, text

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

NOW = text("clock_timestamp()")


def time_column(name: str, *, nullable: bool = False, default: bool = False) -> Column[object]:
    """A time with a zone; by default none, or the database's clock."""
    return Column(name, DateTime(timezone=True), nullable=nullable, server_default=NOW if default else None)
