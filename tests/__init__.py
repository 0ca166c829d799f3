"""Tests, in layers: unit (pure), contract (one suite per store), http, actors, e2e, faults; and benchmarks."""
