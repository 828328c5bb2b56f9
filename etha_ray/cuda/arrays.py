"""Where torch meets addresses: which GPU a tensor is on, and a tensor over memory that somebody else mapped."""

from __future__ import annotations

from typing import Any

import torch

from etha_ray.errors import MemoryHandleError


def gpu_of(tensor: torch.Tensor) -> int | None:
    """The ordinal, in this process, of the GPU that a tensor is on; None if it is on none."""
    return tensor.device.index if tensor.device.type == "cuda" else None


class _Array:
    """What torch reads an address from. It holds on to this object, and so to ``owner``, for as long as a tensor uses the memory."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self.owner = owner
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def storage_at(address: int, nbytes: int, ordinal: int, owner: object) -> torch.UntypedStorage:
    """``nbytes`` bytes at an address that GPU ``ordinal`` can use, as a storage there; ``owner`` lives as long as that does.

    The memory may be another GPU's that this process does not see, so torch is told which device to take it for.

    Raises:
        MemoryHandleError: torch takes it for another device's.
    """
    device = torch.device("cuda", ordinal)
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8, device=device).untyped_storage()
    bytes_there = torch.as_tensor(_Array(address, nbytes, owner), device=device)
    if bytes_there.device != device or bytes_there.data_ptr() != address:
        raise MemoryHandleError(
            f"torch {torch.__version__} takes {nbytes} bytes that are mapped on {device} for memory of {bytes_there.device}:"
            " install torch 2.11 or newer"
        )
    return bytes_there.untyped_storage()
