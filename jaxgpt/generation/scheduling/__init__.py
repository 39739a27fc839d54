"""Many texts in the slots of a session: who runs, what a step takes, what is kept."""
