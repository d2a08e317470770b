"""The ExecuTorch backend: one `.pte` for XNNPACK and the official LLM runners."""
