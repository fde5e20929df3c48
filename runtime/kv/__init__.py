"""The tensors behind the KV cache."""
