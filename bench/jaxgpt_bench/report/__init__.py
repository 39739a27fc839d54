"""One page from what the other commands measured."""
