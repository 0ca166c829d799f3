"""Runs that nobody submits by hand: by schedule, and by what happens elsewhere."""
