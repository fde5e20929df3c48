"""From logits to a distribution, and from a distribution to a token."""
