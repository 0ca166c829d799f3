"""Tracking: experiments, runs, params, tags and their search."""
