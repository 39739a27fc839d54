"""A run, computed by Flax: the one room of this package that imports JAX."""
