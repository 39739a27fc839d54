"""Where a training step's time goes: kernels by kind, from JAX's own profile data."""
