"""Exporting: tensors described for others, and their memory kept for as long as they may open it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from etha_ray.cuda import arrays
from etha_ray.cuda.gpus import uuid_of
from etha_ray.errors import NotShareableError, WrongDeviceError
from etha_ray.memory.cuda import CudaPlace, place_storages
from etha_ray.memory.handles import CudaHandle, SharedHandle, TensorHandle, lies, names_of
from etha_ray.memory.shared import share_storages
from etha_ray.processes import process_start_time
from etha_ray.shared_files import SharedFile


@dataclass(frozen=True)
class ForAgent:
    """The agent that is to open the memory: the device it is pinned to, and its GPU.

    ``gpu`` is the UUID; empty if it has none, or cannot use it, which ``trouble`` says.
    """

    device: str = "cpu"
    gpu: str = ""
    trouble: str = ""


class ExportedTensors:
    """What `export_tensors` shared: the handles, in the order of the tensors, and the memory they name.

    The memory stays alive until `close` (or until this object is collected) and for as long as a tensor uses it.
    """

    def __init__(self, handles: Sequence[TensorHandle], storages: Sequence[torch.UntypedStorage], places: Sequence[CudaPlace] = ()) -> None:
        self.handles = list(handles)
        self.gpu = places[0].ordinal if places else None
        """Which GPU of this process, as it counts them, some of the tensors are on; None if all are on the CPU."""
        self._storages = list(storages)
        self._places = list(places)

    @property
    def nbytes(self) -> int:
        """Bytes of all distinct storages."""
        return sum(storage.nbytes() for storage in self._storages)

    def close(self) -> None:
        """Let go of the memory: it is freed with the last tensor and, on the CPU, the last opener that use it. May be called twice.

        The tensors stay usable, and stay in shared memory. Of a GPU's memory nobody else may have a tensor any more then.
        """
        self._storages.clear()
        self._places.clear()

    def __repr__(self) -> str:
        return f"ExportedTensors({len(self.handles)} tensors, {len(self._storages)} storages, {self.nbytes} bytes)"


def export_tensors(tensors: Sequence[torch.Tensor], labels: Sequence[str] | None = None, agent: ForAgent | None = None) -> ExportedTensors:
    """Describe tensors by handles; of those on the CPU each distinct storage is moved into shared memory first, in place.

    Storages that are in shared memory already are not copied. A DTensor stands for its local tensor; views may have any
    strides. Memory that another library lent to torch (``torch.from_numpy``) is moved like any other: that library keeps
    its old bytes. A storage in shared memory cannot be resized, and is not pinned. A GPU's memory stays where it is.

    May raise this process's soft descriptor limit: a shared storage, or a chunk of an expandable segment, holds one descriptor.

    Args:
        tensors: dense tensors, parameters or DTensors, on the CPU or on the agent's GPU.
        labels: a name for each tensor, for error messages; by default its position.
        agent: who opens them; by default an agent without a GPU.

    Raises:
        NotShareableError: a tensor has no memory that another process could open (sparse, meta, quantized, nested, a
            lazily conjugated view, a subclass without a storage, a private file mapping, memory of cudaMallocAsync).
        WrongDeviceError: a tensor is neither on the CPU nor on the agent's GPU.
        SharedMemoryFullError: ``/dev/shm`` has no room for all storages; nothing has been moved.
        MemoryHandleError: the system refused (too many mappings or descriptors, for one), or CUDA's driver. Storages moved by
            then stay valid, in shared memory.
    """
    names = names_of(labels, len(tensors))
    plain = [_plain_tensor(tensor, name, agent or ForAgent()) for tensor, name in zip(tensors, names, strict=True)]
    storages: dict[int, torch.UntypedStorage] = {}
    owners: dict[int, str] = {}
    ordinals: dict[int, int] = {}
    for tensor, name in zip(plain, names, strict=True):
        storage = tensor.untyped_storage()
        storages.setdefault(storage._cdata, storage)
        owners.setdefault(storage._cdata, name)
        if (ordinal := arrays.gpu_of(tensor)) is not None:
            ordinals[storage._cdata] = ordinal
    places: dict[int, CudaPlace] = {}
    for ordinal in sorted(set(ordinals.values())):
        there = {key: storages[key] for key, found in ordinals.items() if found == ordinal}
        places |= place_storages(there, ordinal, owners)
    files = share_storages({key: storage for key, storage in storages.items() if key not in ordinals}, owners)
    pid = os.getpid()
    start_time = process_start_time(pid) or 0.0
    handles = [_handle(tensor, pid, start_time, places, files) for tensor in plain]
    return ExportedTensors(handles, list(storages.values()), list(places.values()))


def _handle(tensor: torch.Tensor, pid: int, start_time: float, places: dict[int, CudaPlace], files: dict[int, SharedFile]) -> TensorHandle:
    storage = tensor.untyped_storage()
    how = lies(tensor)
    place = places.get(storage._cdata)
    if place is not None:
        return CudaHandle(pid=pid, start_time=start_time, **place.fields(), **how)
    file = files[storage._cdata]
    return SharedHandle(
        pid=pid, start_time=start_time, path=file.path, device=file.device, inode=file.inode, data_offset=file.data_offset, **how
    )


def _plain_tensor(tensor: torch.Tensor, name: str, agent: ForAgent) -> torch.Tensor:
    """The dense tensor behind ``tensor``, detached; raises the typed error where there is none, or the agent cannot open it."""
    # A DTensor can only exist once its module is imported; importing it here would cost every process a second.
    dtensor_module = sys.modules.get("torch.distributed.tensor")
    if dtensor_module is not None and isinstance(tensor, dtensor_module.DTensor):
        with torch.no_grad():
            tensor = tensor.to_local()
    if tensor.device.type == "meta":
        raise NotShareableError(f"{name} is on the meta device and has no memory; materialize it first (to_empty)")
    _check_device(tensor, name, agent)
    if tensor.is_nested or tensor.layout != torch.strided:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise NotShareableError(f"{name} has layout {layout}; share .to_dense() (or its values and indices) instead")
    if tensor.is_quantized:
        raise NotShareableError(f"{name} is quantized ({tensor.dtype}); share .int_repr() and its scales instead")
    if tensor.is_conj() or tensor.is_neg():
        raise NotShareableError(f"{name} is a lazily conjugated or negated view; share .resolve_conj().resolve_neg() instead")
    try:
        storage = tensor.untyped_storage()
        without_memory = storage.nbytes() > 0 and storage.data_ptr() == 0
    except (NotImplementedError, RuntimeError) as error:
        raise NotShareableError(f"{name} ({type(tensor).__name__}) has no storage: {error}; share its parts instead") from error
    if without_memory or (tensor.numel() > 0 and storage.nbytes() == 0):
        raise NotShareableError(f"{name} ({type(tensor).__name__}) has a storage without memory; share its inner tensors instead")
    return tensor.detach()


def _check_device(tensor: torch.Tensor, name: str, agent: ForAgent) -> None:
    """Raise `WrongDeviceError` unless the tensor is on the CPU or on the agent's GPU."""
    ordinal = arrays.gpu_of(tensor)
    if ordinal is None:
        if tensor.device.type != "cpu":
            raise WrongDeviceError(
                f"{name} is a {tensor.device} tensor, and only those of the CPU and of CUDA can be shared; move it with .cpu()"
            )
        return
    here = f"{name} is a cuda:{ordinal} tensor"
    if agent.device == "cpu":
        raise WrongDeviceError(f"{here} on a CPU agent; move it with .cpu(), or use the agent of that device")
    if not agent.gpu:
        raise WrongDeviceError(f"{here}, and the agent of {agent.device} cannot use CUDA: {agent.trouble}")
    found = uuid_of(ordinal)
    if found != agent.gpu:
        raise WrongDeviceError(
            f"{here} ({found}), and this worker's agent is on {agent.device} of its node ({agent.gpu}): register it with the agent of"
            " its own GPU (AGENT_RANK, or the GPU that Ray gave this worker), or move it to the agent's"
        )
