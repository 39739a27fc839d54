"""Text from an artifact: the command, and the sessions of module and engine."""
