"""What says where a tensor's memory is and how the tensor lies in it: all that another process needs to open it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec
import torch

from etha_ray.decoding import Decoder
from etha_ray.errors import MemoryHandleError

_DTYPES = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype) and "q" not in str(v)}
INT64_MAX = 2**63 - 1


class _Handle(msgspec.Struct, frozen=True, array_like=True, tag_field="kind"):
    """What all handles say."""

    pid: int
    """The process that owns the memory."""
    start_time: float
    """When that process started, in seconds since boot: tells it from a later one with the same pid."""
    data_offset: int
    """Bytes from the start of the file, or of the segment, to the storage's first byte."""
    nbytes: int
    """Bytes of the whole storage. Of one without any, nothing is said of where it is."""
    dtype: str
    """As in ``torch.<dtype>``: ``"bfloat16"``."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements, never negative."""
    storage_offset: int
    """In elements, from the storage's first byte."""


class SharedHandle(_Handle, frozen=True, array_like=True, tag="shm"):
    """A tensor in shared memory of the host. Several handles may name the same file."""

    path: str
    """What to open: ``/proc/<pid>/fd/<fd>``, or a name in ``/dev/shm``."""
    device: int
    """``st_dev`` of the file; with ``inode`` it tells when a descriptor number has been reused."""
    inode: int

    @property
    def kind(self) -> str:
        """What sort of memory this is."""
        return "shm"


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """One of the allocations that lie side by side in a segment which can grow."""

    size: int
    serial: int
    """Tells it from all others that its process exported."""
    fd: int = -1
    """Its descriptor in the owner's process; -1 if it has none."""
    fabric: bytes = b""
    """What opens it if it has no descriptor."""


class CudaHandle(_Handle, frozen=True, array_like=True, tag="cuda"):
    """A tensor in a GPU's memory. Several may name the same segment: what its owner allocated in one piece, or chunks side by side."""

    gpu: str
    """UUID of the GPU."""
    base: int
    """The segment's address in the owner's process."""
    size: int
    """Bytes of the segment."""
    buffer: int
    """Tells the allocation from earlier ones at that address; 0 of chunks."""
    ipc: bytes
    """What CUDA opens the allocation with; empty if it is one of chunks."""
    chunks: tuple[Chunk, ...]

    @property
    def kind(self) -> str:
        """What sort of memory this is."""
        return "cuda"


TensorHandle: TypeAlias = SharedHandle | CudaHandle

_encoder = msgspec.msgpack.Encoder()
_decoder: Decoder[TensorHandle] = Decoder(TensorHandle)


def encode_handle(handle: TensorHandle) -> bytes:
    """The handle as msgpack; a `TensorHandle` may as well be a field of a larger msgspec struct."""
    return _encoder.encode(handle)


def decode_handle(data: bytes) -> TensorHandle:
    """The handle that `encode_handle` made.

    Raises:
        MemoryHandleError: ``data`` is not a handle.
    """
    try:
        return _decoder.decode(data)
    except msgspec.DecodeError as error:
        raise MemoryHandleError(f"not a tensor handle ({error}); both sides must run the same etha_ray version") from error


def lies(tensor: torch.Tensor) -> dict[str, Any]:
    """The fields of a handle that say how a tensor lies in its storage."""
    return {
        "nbytes": tensor.untyped_storage().nbytes(),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": tuple(tensor.shape),
        "stride": tensor.stride(),
        "storage_offset": int(tensor.storage_offset()),
    }


def names_of(labels: Sequence[str] | None, count: int) -> Sequence[str]:
    """What messages call each of ``count`` tensors. Raises ValueError unless there are as many labels, or none."""
    if labels is None:
        return [f"tensor {index}" for index in range(count)]
    if len(labels) != count:
        raise ValueError(f"{len(labels)} labels for {count} tensors; give one each, or none")
    return labels


def checked_dtype(handle: TensorHandle, name: str) -> torch.dtype:
    """The handle's dtype, once its shape, strides and offset are known to stay inside ``nbytes``.

    Raises:
        MemoryHandleError: they do not.
    """
    dtype = _DTYPES.get(handle.dtype)
    if dtype is None:
        raise MemoryHandleError(f"{name}: this torch has no dtype {handle.dtype!r}; both sides must run the same torch version")
    numbers = (*handle.shape, *handle.stride, handle.storage_offset, handle.data_offset, handle.nbytes)
    fits = len(handle.shape) == len(handle.stride) and all(0 <= number <= INT64_MAX for number in numbers)
    if fits and math.prod(handle.shape) > 0:
        last = handle.storage_offset + sum((size - 1) * step for size, step in zip(handle.shape, handle.stride, strict=True))
        fits = math.prod(handle.shape) <= INT64_MAX and (last + 1) * dtype.itemsize <= handle.nbytes
    if not fits:
        raise MemoryHandleError(
            f"{name}: shape {handle.shape}, stride {handle.stride}, offset {handle.storage_offset} of {handle.dtype} do not lie "
            f"in {handle.nbytes} bytes; the handle is corrupt"
        )
    return dtype


def laid_out(storage: torch.UntypedStorage, dtype: torch.dtype, handle: TensorHandle, name: str) -> torch.Tensor:
    """The handle's tensor in its storage. Raises `MemoryHandleError` if torch cannot do that."""
    try:
        if math.prod(handle.shape) == 0:
            return torch.empty(handle.shape, dtype=dtype, device=storage.device)
        return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, handle.storage_offset, handle.shape, handle.stride)
    except RuntimeError as error:
        raise MemoryHandleError(f"{name}: torch cannot lay out shape {handle.shape} ({error}); the handle is corrupt") from error


def expired(handle: TensorHandle, name: str, cause: str) -> str:
    """What to say of memory that is not there any more."""
    return (
        f"{name}: process {handle.pid} does not hold its memory any more ({cause}); register it again from a live worker "
        "on this host, in this container"
    )
