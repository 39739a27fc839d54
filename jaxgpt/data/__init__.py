"""From source text to a dataset folder: sources, docstring pairs, tokenizers, `prepare`."""
