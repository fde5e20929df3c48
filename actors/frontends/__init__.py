"""Doors to an engine: HTTP and gRPC."""
