"""A bundle's model card, and the way of both to Hugging Face."""
