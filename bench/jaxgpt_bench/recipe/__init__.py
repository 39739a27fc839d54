"""`jaxgpt-bench recipe`: how many steps each change of the training recipe saves."""
