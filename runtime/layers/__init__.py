"""The pieces a forward pass is made of, each a function or a small class over tensors."""
