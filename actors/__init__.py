"""Ray: processes, placement, failure. Thin, with no tensor mathematics."""
