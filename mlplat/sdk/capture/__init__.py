"""What a run records by itself: code, environment, console and system metrics."""
