"""`jaxgpt-bench reproduce`: the earlier project's experiment, from the text to one page. See command.py."""
