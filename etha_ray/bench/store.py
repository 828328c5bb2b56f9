"""``bench store``: what the key-value stores cost: a put, a get, and how long after a put another process's wait is over."""

from __future__ import annotations

import random
import shutil
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count

from etha_ray.bench.figures import BenchResult, Figure, describe_machine, interleaved, median, percentile, progress
from etha_ray.bench.processes import Workers
from etha_ray.bench.ray_baseline import open_ray
from etha_ray.bench.store_roles import HOST, await_puts
from etha_ray.errors import ConfigError, OptionalDependencyError
from etha_ray.kvstore import KVStore, MemoryStore, create_store
from etha_ray.kvstore.tcp import TorchTCPStore

_ROUNDS = 10
_WAKE_SHARE = 20
"""Puts to one put that somebody waits for."""
_KEYS = 16
_VALUE = bytes(64)
_PAUSE = (0.05, 0.15)
"""Seconds that a wait is under way before its key is put. One that polls pauses for a 32nd of that, and after 0.3 s always for 10 ms."""


@dataclass(frozen=True)
class _Bench:
    """One store: this process puts and gets, ``start_waiting(first, count)`` has another wait, and what it returns says when it woke."""

    name: str
    store: KVStore
    start_waiting: Callable[[int, int], Callable[[], list[float]]]
    numbers: count[int]
    where: str = "another process"

    def puts(self, times: int) -> list[float]:
        """Seconds of each of ``times`` puts of 64 bytes."""
        return _timed(times, lambda n: self.store.set_bytes(f"put/{n % _KEYS}", _VALUE))

    def gets(self, times: int) -> list[float]:
        """Seconds of each of ``times`` gets of 64 bytes."""
        return _timed(times, lambda n: self.store.get(f"put/{n % _KEYS}"))

    def wakes(self, times: int) -> list[float]:
        """Seconds of each of ``times`` puts, from its call to the return of the wait for its key."""
        numbers = [next(self.numbers) for _ in range(times)]
        moments, put = self.start_waiting(numbers[0], times), []
        for n in numbers:
            self.store.wait_for_key(f"ready/{n}", 60.0)
            time.sleep(random.uniform(*_PAUSE))
            put.append(time.monotonic())
            self.store.set_bytes(f"wake/{n}", _VALUE)
        return [woken - moment for woken, moment in zip(moments(), put, strict=True)]


def _timed(times: int, work: Callable[[int], object]) -> list[float]:
    clock, seconds = time.perf_counter, []
    for n in range(times):
        start = clock()
        work(n)
        seconds.append(clock() - start)
    return seconds


def run_store(puts: int = 2000, etcd: str | None = None) -> BenchResult:
    """Measure ``puts`` puts, as many gets, and a twentieth as many wakes of every store that is there, in turns.

    ``etcd``, ``HOST:PORT``, is one that serves; without it one is started here, where the program is installed. What is left out is
    named, with the reason, on stderr and in the result's ``machine`` under ``left_out``.

    Raises `ConfigError` for fewer than 200 puts, `BenchError` when another process fails, and what opening a store raises.
    """
    if puts < _ROUNDS * _WAKE_SHARE:
        raise ConfigError(f"{puts} puts are too few for percentiles: give at least {_ROUNDS * _WAKE_SHARE}")
    with ExitStack() as stack:
        benches, left_out = _open_all(stack, etcd)
        for bench in benches:
            bench.puts(_KEYS)
            bench.wakes(2)
        samples = interleaved(
            _ROUNDS,
            {
                f"{bench.name} {what}": partial(measure, times)
                for bench in benches
                for what, measure, times in (
                    ("put", bench.puts, puts // _ROUNDS),
                    ("get", bench.gets, puts // _ROUNDS),
                    ("wake", bench.wakes, puts // _ROUNDS // _WAKE_SHARE),
                )
            },
        )
    figures = [figure for bench in benches for figure in _figures(bench, samples)]
    figures.append(Figure("puts_count", len(samples[f"{benches[0].name} put"]), "puts of each store, and gets"))
    figures.append(Figure("wakes_count", len(samples[f"{benches[0].name} wake"]), "puts of each store that somebody waited for"))
    return BenchResult("store", figures, ratios=[], machine={**describe_machine(), "left_out": "; ".join(left_out)})


def _figures(bench: _Bench, samples: dict[str, list[float]]) -> list[Figure]:
    figures = []
    for what, text in (
        ("put", "put of 64 bytes"),
        ("get", "get of 64 bytes"),
        ("wake", f"put, call to the return of a wait of 50 to 150 ms in {bench.where}"),
    ):
        seconds = samples[f"{bench.name} {what}"]
        figures.append(Figure(f"{bench.name}_{what}_p50_us", median(seconds) * 1e6, f"{bench.name}: {text}"))
        figures.append(Figure(f"{bench.name}_{what}_p99_us", percentile(seconds, 99) * 1e6, "the same, 99th percentile"))
    return figures


class _Opening:
    """Opens the stores, all in one new namespace; ``stack`` closes them."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._workers = stack.enter_context(Workers())
        self._namespace = f"bench-{uuid.uuid4().hex[:12]}"

    def memory(self) -> _Bench:
        """Put and waited for by threads, as there is nothing else."""
        store, waiter = self._closed_later(MemoryStore(self._namespace)), MemoryStore(self._namespace)
        thread = self._stack.enter_context(ThreadPoolExecutor(1))

        def start_waiting(first: int, times: int) -> Callable[[], list[float]]:
            return thread.submit(await_puts, waiter, first, times).result

        return _Bench("memory", store, start_waiting, count(), "another thread")

    def tcp(self) -> _Bench:
        """Served by this process, on a thread of torch's."""
        store = TorchTCPStore(HOST, 0, None, True, namespace=self._namespace)
        return self._between_processes("tcp", self._closed_later(store), f"tcp://{HOST}:{store.port}")

    def gcs(self) -> _Bench:
        """The GCS of a Ray of this run's own, unless this process has one. Raises `_NotHere` without Ray."""
        try:
            import ray
        except ImportError:
            raise _NotHere('Ray is not installed: pip install "ray[default]"') from None
        self._stack.enter_context(open_ray(1))
        store = create_store("gcs://", namespace=self._namespace)
        return self._between_processes("gcs", self._closed_later(store), "gcs://", ray.get_runtime_context().gcs_address)

    def etcd(self, address: str | None) -> _Bench:
        """The etcd that serves at ``address``, or one that is started here. Raises `_NotHere` if there is none, or no client."""
        if address is None:
            program = shutil.which("etcd")
            if program is None:
                raise _NotHere("etcd is not installed, and no address of one was given")
            progress("starting etcd")
            address = self._workers.start("etcd", "etcd").call("start", program=program)
        url = f"etcd://{address}"
        try:
            store = create_store(url, namespace=self._namespace)
        except OptionalDependencyError as error:
            raise _NotHere(str(error)) from error
        return self._between_processes("etcd", self._closed_later(store), url)

    def _closed_later(self, store: KVStore) -> KVStore:
        self._stack.callback(store.close)
        return store

    def _between_processes(self, name: str, store: KVStore, url: str, ray_address: str | None = None) -> _Bench:
        waiter = self._workers.start("waiter", f"{name} waiter")
        waiter.call("open", url=url, namespace=self._namespace, ray_address=ray_address)

        def start_waiting(first: int, times: int) -> Callable[[], list[float]]:
            waiter.ask("wait", first=first, count=times)
            return waiter.answer

        return _Bench(name, store, start_waiting, count())


class _NotHere(Exception):
    """A store that this machine does not have."""


def _open_all(stack: ExitStack, etcd: str | None) -> tuple[list[_Bench], list[str]]:
    """Every store that is there; what is not, and why."""
    opening, benches, left_out = _Opening(stack), [], []
    for name, open_one in (
        ("memory", opening.memory),
        ("tcp", opening.tcp),
        ("gcs", opening.gcs),
        ("etcd", partial(opening.etcd, etcd)),
    ):
        try:
            benches.append(open_one())
        except _NotHere as error:
            left_out.append(f"{name}: {error}")
            progress(f"left out: {name}: {error}")
    return benches, left_out
