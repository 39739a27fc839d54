"""What training, deployment and measurement share: no JAX, no PyTorch."""
