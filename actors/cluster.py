"""How an application here comes to a Ray, and how it leaves when it is told to."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import ray

# Tensors cross in shared memory of their own: the object store need not take /dev/shm from them.
_OBJECT_STORE_BYTES = 100 * 2**20


class Terminated(SystemExit):
    """SIGTERM came: unwinds like an interrupt, and the process ends with the status that a shell expects."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@contextmanager
def ray_cluster() -> Iterator[str]:
    """The cluster at RAY_ADDRESS (`ray job submit` sets it), or an embedded Ray of this process; gives its address.

    In here SIGTERM raises `Terminated`, so that everything is closed in order. Raises ConnectionError when RAY_ADDRESS
    leads nowhere.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address:
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except ValueError as error:
            raise ConnectionError(f"RAY_ADDRESS={address} is not the address of a Ray cluster: {error}") from error
    else:
        ray.init(
            "local",
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    before = signal.signal(signal.SIGTERM, _terminate)  # after ray.init, which sets a handler of its own
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
