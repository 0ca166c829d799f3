"""What happens inside a worker: one attempt of a step, its logs, and sweeps."""
