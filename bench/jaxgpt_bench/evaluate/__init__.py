"""What a trained model can do: programs for requests and problems, held-out functions."""
