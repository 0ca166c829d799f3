"""The native API, described by OpenAPI at /docs."""
