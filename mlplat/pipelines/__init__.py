"""Pipelines: definition, validation, planning and durable state."""
