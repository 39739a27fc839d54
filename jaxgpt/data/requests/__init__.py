"""Requests for programs, made of the docstrings and names of functions; and those that are held out."""
