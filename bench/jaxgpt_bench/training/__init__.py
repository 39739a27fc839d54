"""Training beside PyTorch, and proof that a training resumes."""
