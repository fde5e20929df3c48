"""Model families: their shapes, their weights, their forward pass."""
