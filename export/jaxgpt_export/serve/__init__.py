"""`jaxgpt-export serve`: artifacts behind an HTTP API, and in a browser."""
