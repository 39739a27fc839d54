"""The PyTorch module: the arithmetic, the layers, GPT-2."""
