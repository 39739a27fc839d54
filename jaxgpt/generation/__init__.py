"""Choosing tokens, whoever computes the logits: no JAX, no PyTorch."""
