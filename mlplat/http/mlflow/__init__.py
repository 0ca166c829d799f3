"""MLflow's REST API, as its stock client speaks it."""
