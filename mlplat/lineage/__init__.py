"""Lineage: what a model comes from, and what came of a dataset, to any depth; also after runs were purged."""
