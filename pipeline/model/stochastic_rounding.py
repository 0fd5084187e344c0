"""Round float32 to bf16 up or down at random, so that the mean of many roundings is the value itself.

A step of DPO changes a weight by far less than the distance of two bf16 numbers. Rounded to the nearest, nothing would change at
all. The random bits are a hash of a key and of the value's number in its tensor: no generator is involved, and they are the same
on every device, in chunks of any size, and for any number of processes.

Shapes: N values.
"""

import hashlib

import torch

# Constants of a Weyl sequence and of a mixer with little bias (https://github.com/skeeto/hash-prospector), as signed numbers.
_STRIDE, _FIRST, _SECOND = 0x9E3779B1 - (1 << 32), 0x7FEB352D, 0x846CA68B - (1 << 32)


def make_key(*parts: int | str) -> int:
    """Return the key of what these numbers and names identify, such as a seed, a step and a parameter."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, signed=True)


def advance_key(key: int, n: int) -> int:
    """Return the key with which a chunk is rounded that begins at the n-th value of its tensor."""
    return (key + n * _STRIDE + (1 << 31)) % (1 << 32) - (1 << 31)


def random_bits(n: int, key: torch.Tensor, device: torch.device) -> torch.Tensor:
    """32 random bits for each of n values."""
    bits_N = torch.arange(n, dtype=torch.int32, device=device) * _STRIDE + key
    bits_N = (bits_N ^ (bits_N >> 16 & 0xFFFF)) * _FIRST
    bits_N = (bits_N ^ (bits_N >> 15 & 0x1FFFF)) * _SECOND
    return bits_N ^ (bits_N >> 16 & 0xFFFF)


def round_stochastically(values_N: torch.Tensor, bits_N: torch.Tensor) -> torch.Tensor:
    """Round float32 values to bf16, away from zero with the probability of what truncation would cut off.

    `bits_N` are random below 2^16. The bits that bf16 lacks are the lowest 16 of a float32; added to them, they carry with that
    probability.
    """
    return (values_N.view(torch.int32) + bits_N & -0x10000).view(torch.float32).bfloat16()
