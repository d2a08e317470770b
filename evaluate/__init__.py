"""`gemma-eval`: perplexity, KL divergence and tasks of bundles and Hugging Face folders."""

from gemma_edge.public import callable_package

callable_package(__name__)
