"""Backups of a whole installation, and what a restore makes of them."""
