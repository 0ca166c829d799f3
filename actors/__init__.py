"""Thin Ray shells around the services of ``mlplat``: placement, restarts, handles."""
