"""Memory that ran out, by whichever name it is raised."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch has an error of its own for a GPU's memory; its allocator for the CPU raises a plain one."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )
