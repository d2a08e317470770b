"""A bundle in a web page. What computes is JavaScript: gemma-edge.d.ts is its API, docs/runtimes/web.md explains it."""
