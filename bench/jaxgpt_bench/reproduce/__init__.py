"""`jaxgpt-bench reproduce`: the original project's experiment, from the text to one page. See command.py."""
