"""What Ray does by itself: an actor call, and a sync through its object store. The only file here that imports Ray."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np

from etha_ray.bench.bus import check_arrived
from etha_ray.bench.figures import progress
from etha_ray.bench.workload import Shards, Workload, bits_of, numpy_copies

_SPARE_BYTES = 256 << 20
_WARM_UP = 3
"""Syncs until the store has touched the memory that it uses in turns."""


@contextlib.contextmanager
def open_ray(actors: int, object_bytes: int = 0) -> Iterator[None]:
    """A Ray of this run's own, with room for so many actors and object bytes; shut down when the block is left.

    Where this process has a Ray already, that one is used and stays.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    progress("starting Ray for the baseline")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init(
        address="local",
        num_cpus=actors,
        object_store_memory=object_bytes + _SPARE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own ends the process where it stands, and nothing is cleaned up
        yield
    finally:
        ray.shutdown()


class RayCalls:
    """Calls of an actor's method that does nothing."""

    def __init__(self) -> None:
        import ray

        actor: Any = ray.remote(num_cpus=1)(_Noop)
        self._actor = actor.remote()
        ray.get(self._actor.noop.remote())

    def call(self, count: int) -> list[float]:
        """Seconds of each of ``count`` calls, each waited for."""
        import ray

        get, noop, clock, seconds = ray.get, self._actor.noop, time.perf_counter, []
        for _ in range(count):
            start = clock()
            get(noop.remote())
            seconds.append(clock() - start)
        return seconds


class RayObjects:
    """A workload's sync through the object store: every source puts its shards as one object, every target gets all
    objects, slices what it needs and copies that into its tensors."""

    def __init__(self, workload: Workload) -> None:
        import ray

        data = msgspec.msgpack.encode(workload)
        source, target = ray.remote(num_cpus=1)(_Source), ray.remote(num_cpus=1)(_Target)
        self._sources: list[Any] = [source.remote(data, index) for index in range(workload.src)]
        self._targets: list[Any] = [target.remote(data, index) for index in range(workload.dst)]
        for _ in range(_WARM_UP):
            self.sync()
        check_arrived("Ray's object store", ray.get([actor.wrong.remote() for actor in self._targets]))

    def sync(self, count: int = 1, *, as_tensors: bool = False) -> list[float]:
        """``count`` syncs; of each, the seconds from the first call to the last completion.

        The shards are put as NumPy arrays, which cross the store without being pickled, so that a get copies nothing: the
        best that can be done with Ray. Or ``as_tensors``, as one would write it first.
        """
        import ray

        seconds = []
        for _ in range(count):
            start = time.monotonic()
            boxes = [actor.put.remote(as_tensors) for actor in self._sources]
            ray.get([actor.pull.remote(*boxes) for actor in self._targets])
            seconds.append(time.monotonic() - start)
        return seconds


class _Noop:
    def noop(self) -> None:
        """Do nothing."""


class _Source:
    def __init__(self, data: bytes, index: int) -> None:
        workload = msgspec.msgpack.decode(data, type=Workload)
        self._shards = Shards(workload, "src", index)
        self._shards.fill(1)
        names = [spec.name for spec in workload.tensors]
        self._tensors = dict(zip(names, self._shards.tensors, strict=True))
        self._arrays = {name: bits_of(tensor).numpy() for name, tensor in self._tensors.items()}

    def put(self, as_tensors: bool) -> list[Any]:
        """Put all shards as one object and return its reference in a list, which keeps Ray from fetching it."""
        import ray

        return [ray.put(self._tensors if as_tensors else self._arrays)]


class _Target:
    def __init__(self, data: bytes, index: int) -> None:
        workload = msgspec.msgpack.decode(data, type=Workload)
        self._names = [spec.name for spec in workload.tensors]
        self._shards = Shards(workload, "dst", index)
        self._copies = numpy_copies(workload, self._shards, index)

    def pull(self, *boxes: list[Any]) -> None:
        """Fill the tensors from what the sources have put."""
        import ray

        sources = ray.get([box[0] for box in boxes])
        for source, position, part, target in self._copies:
            shard = sources[source][self._names[position]]
            array = shard if isinstance(shard, np.ndarray) else bits_of(shard).numpy()
            np.copyto(target, array[part])

    def wrong(self) -> list[str]:
        """See `Shards.wrong`."""
        return self._shards.wrong(1)
