"""Which request gets how many tokens. Pure Python: no torch, no numpy, no Ray."""
