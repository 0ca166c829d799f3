"""Model registry: registered models, versions, aliases and the log of every change."""
