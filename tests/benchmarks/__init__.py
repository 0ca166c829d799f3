"""Benchmarks: ``make bench`` or ``make bench ONLY=tracking``. Every value comes with a floor from the same run."""
