"""A process with memory of a GPU that is the host's (`tests/cuda/fake.py`)."""

from __future__ import annotations

from typing import Any

from etha_ray.memory import ForAgent, decode_handle, encode_handle, export_tensors, open_tensors
from tests.cuda.fake import CHUNK, install, library, uuid
from tests.tensor_bus.cluster import Worker


class GpuOwner:
    """A process with GPU memory that it exports until killed. ``tensors``: code that makes them."""

    def __init__(self, tensors: str, devices: str = "0", gpu: int = 0) -> None:
        self._worker = Worker()
        self.pid = self._worker.pid
        self.handles = [decode_handle(handle) for handle in self._worker.call(_export, library(), devices, uuid(gpu), tensors)]

    def ask(self, expression: str) -> Any:
        return self._worker.call(_evaluate, expression)

    def kill(self) -> None:
        self._worker.process.kill()
        self._worker.process.join()


def _export(state: dict[str, Any], path: str, devices: str, gpu: str, tensors: str) -> list[bytes]:
    state |= {"gpus": install(devices, path), "CHUNK": CHUNK, "open_tensors": open_tensors, "decode_handle": decode_handle}
    state["tensors"] = eval(tensors, state)
    state["exported"] = export_tensors(state["tensors"], agent=ForAgent("cuda:0", gpu))
    return [encode_handle(handle) for handle in state["exported"].handles]


def _evaluate(state: dict[str, Any], expression: str) -> Any:
    return eval(expression, state)
