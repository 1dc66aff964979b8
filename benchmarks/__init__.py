"""Measurements whose results are committed under benchmarks/results."""
