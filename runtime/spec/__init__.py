"""Speculative decoding: proposing tokens, verifying them, and keeping the drafter's KV exact."""
