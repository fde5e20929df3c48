"""What one process needs to run a shard of an engine. Imports ``parallel``; never Ray, never
``actors``."""
