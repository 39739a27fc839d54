"""Programs that a model wrote: what of a text is one, and where it runs without harm."""
