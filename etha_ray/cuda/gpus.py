"""Which GPU this process works with, and why it cannot."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from etha_ray.cuda.driver import DriverError, driver
from etha_ray.errors import MemoryHandleError

_QUEUES = "32"
"""The most that CUDA takes; it takes 8 by default, and trainers often ask for 1."""


class Gpu(NamedTuple):
    """A GPU as this process finds it: ``uuid`` names it on this host; empty if it cannot be used, and ``trouble`` says why."""

    uuid: str
    trouble: str = ""


def find_gpu(ordinal: int) -> Gpu:
    """The GPU with this number among those that this process sees."""
    if torch.version.cuda is None:
        return Gpu("", f"torch {torch.__version__} has no CUDA; install a build that has")
    try:
        found = driver()
        count = found.count()
        if ordinal < count:
            return Gpu(found.uuid(ordinal))
    except DriverError as error:
        return Gpu("", f"CUDA's driver does not answer ({error})")
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Gpu("", f"it sees {count} GPUs" + ("" if seen is None else f", with CUDA_VISIBLE_DEVICES={seen!r}"))


def uuid_of(ordinal: int) -> str:
    """UUID of a GPU on which this process has a tensor. Raises `MemoryHandleError` if the driver does not say."""
    try:
        return driver().uuid(ordinal)
    except DriverError as error:
        raise MemoryHandleError(f"cuda:{ordinal}: CUDA's driver does not tell its UUID ({error})") from error


def see_only(device: str) -> int:
    """Have this process see the GPU of ``cuda:N`` alone, N being the node's own number, before it touches CUDA; its number from then on."""
    os.environ["CUDA_VISIBLE_DEVICES"] = device.removeprefix("cuda:")
    let_streams_run()
    return 0


def let_streams_run() -> None:
    """Set this process up, before it touches CUDA, so that no stream waits for another one, whatever the environment says.

    Streams get all hardware queues that there can be: of two in one queue the second waits where the first does, and what an agent
    sends must not wait behind what it receives, or two agents could wait for one another.
    """
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = _QUEUES
    os.environ.pop("NCCL_COMM_BLOCKING", None)  # it would have NCCL's calls wait, whatever a communicator is made with
    os.environ.pop("CUDA_LAUNCH_BLOCKING", None)  # a launch behind a message would wait for the other end, and nobody would look
