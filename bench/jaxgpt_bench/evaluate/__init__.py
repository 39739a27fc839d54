"""What a trained model can do: programs for requests and for HumanEval's problems, run in a sandbox."""
