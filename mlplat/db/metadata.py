"""What all tables have in common."""

from __future__ import annotations

from sqlalchemy import Column, DateTime, Index, MetaData, text

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

#: Values of params and tags up to this many characters are searched in an index of their own; a btree entry
#: cannot hold the longest ones. Where names of models are in the entry, too, less fits.
SHORT_VALUE, SHORT_VALUE_BESIDE_NAME = 256, 64
NOW = text("clock_timestamp()")


def time_column(name: str, *, nullable: bool = False, default: bool = False) -> Column[object]:
    """A time with a zone; by default none, or the database's clock."""
    return Column(name, DateTime(timezone=True), nullable=nullable, server_default=NOW if default else None)


def short_value(table: str) -> int:
    """How many characters the short values of a table have at most."""
    return SHORT_VALUE_BESIDE_NAME if table in {"registered_model_tag", "model_version_tag"} else SHORT_VALUE


def value_indexes(table: str, *owner: str) -> tuple[Index, Index]:
    """Indexes that find the owners of a key by its value, without a look at the table."""
    included, short = list(owner), short_value(table)
    return (
        Index(f"ix_{table}_short_value", "key", "value", postgresql_include=included,
              postgresql_where=text(f"length(value) <= {short}")),
        Index(f"ix_{table}_long_value", "key", postgresql_include=included,
              postgresql_where=text(f"length(value) > {short}")),
    )  # fmt: skip
