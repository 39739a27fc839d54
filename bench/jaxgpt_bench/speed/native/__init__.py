"""What the engine gains on trained weights: drafts, the screen of the head, several texts at once."""
