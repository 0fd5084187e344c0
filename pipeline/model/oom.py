"""Recognize out-of-memory errors, whichever library raises them.

Imports nothing, so that the command line can ask before PyTorch is loaded.
"""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a GPU or the host ran out of memory."""
    if isinstance(error, MemoryError):
        return True
    # PyTorch has its own error for a GPU; its CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    )
