"""`jaxgpt-bench prepare`: how fast text becomes tokens, and in how much memory, beside nanoGPT's way."""
