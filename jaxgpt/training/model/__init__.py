"""GPT-2 in Flax: the forward pass, its numerics, its loss, fake quantization."""
