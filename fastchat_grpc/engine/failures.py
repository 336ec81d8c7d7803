"""Which failures a device recovers from."""

from __future__ import annotations

import torch


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on whatever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "memory" in str(error) and "alloc" in str(error)


def is_broken(device: torch.device) -> bool:
    """Whether a device computes nothing any more, as a GPU after an illegal access, until its process ends."""
    try:
        return bool((torch.ones(2, device=device) + 1).sum().item() != 4.0)
    except Exception as error:
        return not is_out_of_memory(error)
