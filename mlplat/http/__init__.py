"""The HTTP API: MLflow's REST and the native one, over the same services."""
