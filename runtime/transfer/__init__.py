"""Moving KV from the engine that read a prompt to the engine that goes on from it."""
