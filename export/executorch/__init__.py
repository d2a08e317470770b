"""The ExecuTorch backend: one `.pte` for XNNPACK and the official LLM runners."""

import logging

# it warns of torchao's registrations whenever that is imported, which is nothing that a user could act on
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
