"""Clients against servers: `jaxgpt-bench serving`."""
