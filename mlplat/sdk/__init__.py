"""What runs in the user's process: runs, pipelines as Python, and the HTTP client under both."""
