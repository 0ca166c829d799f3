"""Artifacts: files of runs, and blobs named by their SHA-256, on a folder or on S3."""
