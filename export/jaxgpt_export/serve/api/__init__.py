"""What the server's routes take and give: OpenAI's API, and tokenizing."""
