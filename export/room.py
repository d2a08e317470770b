"""Whether PyTorch can be loaded here: a check that a command makes before it does anything."""

from __future__ import annotations

import importlib.util

from gemma_edge.errors import InputError
from gemma_edge.memory import room_in_address_space

TORCH_ADDRESSES = 3200 << 20  # measured: loading PyTorch takes 3157 MiB of address space with one thread


def need_torch() -> None:
    """Refuse to go on without PyTorch.

    Raises:
        InputError: it is not installed, or would not fit.
    """
    if importlib.util.find_spec("torch") is None:
        raise InputError("exporting needs PyTorch, which is not installed: pip install 'gemma-edge[export]'")
    room = room_in_address_space()
    if room is not None and room < TORCH_ADDRESSES:  # PyTorch would abort while it is being loaded
        raise InputError(
            f"PyTorch alone needs {TORCH_ADDRESSES >> 20} MiB of address space, but ulimit -v leaves {room >> 20} MiB;"
            " export under a higher limit"
        )
