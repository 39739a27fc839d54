"""Tokens a second, beside the ceiling that the memory sets and beside other programs."""
