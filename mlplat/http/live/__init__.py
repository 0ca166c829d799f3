"""Pipeline runs as they happen, for everybody who watches them."""
