"""`gemma-eval`: perplexity, KL divergence and tasks of bundles and Hugging Face folders."""
