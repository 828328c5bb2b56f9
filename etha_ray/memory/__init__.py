"""Tensor memory that another process of this host can open: export in the worker, open in the agent.

`export_tensors` describes tensors by handles; no bytes travel. `open_tensors` maps the same memory in the agent. On the CPU it is moved
into shared memory first, in place (`shared`); a GPU's can be opened where it is (`cuda`).

Threads: the functions may be called from any thread; exports of one process run one after another. Nobody may write to
a tensor while it is being exported (its bytes may be being copied to their new place).

Fork: a child made by ``fork`` shares the exported memory with its parent, so writing a weight there writes it in both; and
handles name the process that exported them, so they expire with the parent. A GPU's memory is of no use to such a child.
"""

from __future__ import annotations

from etha_ray.memory.exporting import ExportedTensors, ForAgent, export_tensors
from etha_ray.memory.handles import CudaHandle, SharedHandle, TensorHandle, decode_handle, encode_handle
from etha_ray.memory.opening import OpenedTensors, open_tensors

__all__ = [
    "CudaHandle",
    "ExportedTensors",
    "ForAgent",
    "OpenedTensors",
    "SharedHandle",
    "TensorHandle",
    "decode_handle",
    "encode_handle",
    "export_tensors",
    "open_tensors",
]
