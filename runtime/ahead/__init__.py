"""Drafting ahead: a drafter on ranks of its own, that goes on while the target verifies."""
