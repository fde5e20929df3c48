"""Benchmarks: each prints one table and writes one JSON; `benchmarks.plot` draws it."""
