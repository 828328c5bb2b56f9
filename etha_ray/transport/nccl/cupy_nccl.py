"""NCCL through ``cupy.cuda.nccl.NcclCommunicator``.

Communicators are made non-blocking, which is NCCL's own way to have every call bounded in time: a call that takes longer answers "in
progress", and a communicator can be aborted in any state, while it is made too. cupy does not know of it in two places:

- ``NcclConfig`` shows only ``split_share``. The C structure is in the object, so its other fields are set in place, once it has been
  recognised by its size and NCCL's magic number; a cupy that lays it out in another way is refused by name.
- ``NcclError`` has no name for "in progress" (7), and making one raises KeyError(7) instead. Both are taken for what they mean.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from etha_ray.accelerator import Accelerator, Lane
from etha_ray.cuda.extra import install_cupy
from etha_ray.errors import CommunicatorError, OptionalDependencyError
from etha_ray.transport.nccl.communicator import Communicator, Communicators, Message

_SUCCESS, _IN_PROGRESS = 0, 7
_RANKS = 2
_CONFIG_MAGIC = 0xCAFEBEEF
_UNDEFINED = -(2**31)

MAX_CTAS = 16
"""Blocks of each of NCCL's kernels. They wait on the device for the other end, so all that may run at a time must fit on it together: the
few transfers that a device may have (see `etha_ray.transport.network.slots`) times this are fewer than it has places."""


class _Config(ctypes.Structure):
    """How NCCL's ``ncclConfig_t`` begins, since its version 2.17."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cga_cluster_size", ctypes.c_int),
        ("min_ctas", ctypes.c_int),
        ("max_ctas", ctypes.c_int),
    )


class CupyCommunicators(Communicators):
    """Communicators on the device of ``accelerator``.

    Raises:
        OptionalDependencyError: cupy or NCCL is not installed, or does not have what is needed; the message has the install line.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._nccl = load_nccl()
        self._lane = accelerator.lane()
        configuration(self._nccl)  # raises here rather than when the first one is made

    def unique_id(self) -> bytes:
        return bytes(_called(self._nccl, "no unique id can be made", self._nccl.get_unique_id))

    def join(self, unique_id: bytes, rank: int) -> Communicator:
        kind = self._nccl.NcclCommunicator
        # Made apart from its initialisation: that raises "in progress", and the object must be had all the same.
        communicator = kind.__new__(kind)
        with self._lane.current():  # NCCL takes the thread's current device
            try:
                _called(
                    self._nccl,
                    "it cannot be joined",
                    lambda: kind.__init__(communicator, _RANKS, unique_id, rank, configuration(self._nccl)),
                )
            except CommunicatorError:
                # What failed in the background by now is in the object. cupy would destroy it, on whatever thread collects it; NCCL refuses
                # that to what has failed, and leaves a group of that thread's open, which swallows those after it.
                communicator.abort()
                raise
        return _CupyCommunicator(self._nccl, communicator, 1 - rank)


class _CupyCommunicator(Communicator):
    def __init__(self, nccl: Any, communicator: Any, peer: int) -> None:
        self._nccl, self._communicator, self._peer = nccl, communicator, peer
        self._aborted = False

    def send(self, messages: Sequence[Message], lane: Lane) -> None:
        self._group(self._communicator.send, messages, lane)

    def receive(self, messages: Sequence[Message], lane: Lane) -> None:
        self._group(self._communicator.recv, messages, lane)

    def _group(self, call: Callable[..., None], messages: Sequence[Message], lane: Lane) -> None:
        nccl, stream = self._nccl, lane.pointer

        def hand_over() -> None:
            for address, nbytes in messages:
                call(address, nbytes, nccl.NCCL_UINT8, self._peer, stream)

        with lane.current():
            _called(nccl, "no group can be begun", nccl.groupStart)
            try:
                _called(nccl, "a message was not taken", hand_over)
            finally:
                # A group is its thread's: one that is left open would swallow the next.
                _called(nccl, "a group was not taken", nccl.groupEnd)

    def ready(self) -> bool:
        if self._aborted:
            raise CommunicatorError("the communicator was aborted")
        return _called(self._nccl, "it failed", self._communicator.check_async_error) is not _BUSY

    def abort(self) -> None:
        # An idle one is aborted too: NCCL's destroy waits for what is under way, and so for a peer that may be dead.
        if not self._aborted:
            self._aborted = True
            self._communicator.abort()


_BUSY = object()


def _called(nccl: Any, what: str, call: Callable[[], Any]) -> Any:
    """What ``call`` returns; `_BUSY` where it goes on in the background.

    Raises:
        CommunicatorError: it failed; the message begins with ``what``.
    """
    try:
        return call()
    except KeyError as error:
        if error.args == (_IN_PROGRESS,):
            return _BUSY
        raise CommunicatorError(f"{what}: NCCL answered {error}") from error
    except nccl.NcclError as error:
        if error.status == _IN_PROGRESS:
            return _BUSY
        raise CommunicatorError(f"{what}: {error}") from error


def configuration(nccl: Any) -> Any:
    """An ``NcclConfig`` of communicators that do not block. Raises `OptionalDependencyError` where cupy's is laid out in another way."""
    config = nccl.NcclConfig()
    begin, end = object.__basicsize__, type(config).__basicsize__
    for offset in range(begin, end - ctypes.sizeof(_Config) + 1, ctypes.alignment(_Config)):
        fields = _Config.from_address(id(config) + offset)
        if fields.magic == _CONFIG_MAGIC and fields.size == end - offset and fields.blocking == fields.max_ctas == _UNDEFINED:
            fields.blocking, fields.max_ctas = 0, MAX_CTAS
            return config
    raise OptionalDependencyError(
        f"this cupy's NcclConfig, made for NCCL {nccl.get_build_version()}, cannot be set to not blocking; with cupy 14 it can:"
        f" {install_cupy()}"
    )


def load_nccl() -> Any:
    """cupy's module ``nccl``. Raises `OptionalDependencyError` with the install line."""
    try:
        from cupy.cuda import nccl

        nccl.get_version()
    except Exception as error:  # cupy raises whatever its libraries do
        raise OptionalDependencyError(f"there is no NCCL, as cupy with it cannot be imported ({error}): {install_cupy()}") from error
    return nccl
