"""`gemma-run serve`: OpenAI's requests over HTTP, and a chat page."""
