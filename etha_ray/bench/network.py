"""``bench network``: a model's weights from one process to another over TCP, with checksums and without, against gloo and one socket.

Both ends are on this host, so the bytes take the way that they take between hosts, but for the wire and the network card. The
regions are those that the first target rank of ``bench sync`` gets, from all source ranks.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection as Pipe
from typing import Any, TypeAlias, cast

import torch
from torch.distributed import ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from etha_ray.bench.bus import check_arrived
from etha_ray.bench.figures import BenchResult, Figure, Ratio, interleaved, median, progress
from etha_ray.bench.giver import TIMEOUT, answer, open_giver
from etha_ray.bench.processes import BenchError
from etha_ray.bench.workload import Shards, Workload, model
from etha_ray.errors import ConfigError
from etha_ray.net import Address, Server
from etha_ray.plan import Side, routes_into
from etha_ray.transport.network import NetworkTransport, Read, RemoteRegion

_HOST = "127.0.0.1"
_EXPORT = "src{}"
_Box: TypeAlias = "tuple[int, ...]"


@dataclass(frozen=True)
class Piece:
    """A region: of which source rank's tensor, and where it lies in that and in the target's."""

    source: int
    tensor: int
    source_start: _Box
    target_start: _Box
    size: _Box


def run_network(shape: str = "qwen3-0.6b", src: int = 2, dst: int = 2, dtype: str = "bfloat16", steps: int = 15) -> BenchResult:
    """Measure ``steps`` transfers of what target rank 0 gets, in turns with the baselines. What arrives is compared bit for bit.

    Raises `ConfigError` for a shape, dtype or number that is not possible, `BenchError` when wrong bytes arrive or the other
    process fails.
    """
    if steps < 1:
        raise ConfigError(f"{steps} steps: give at least 1")
    workload = model(shape, src, dst, dtype)
    nbytes = workload.nbytes("dst", 0)
    with open_giver(_give, workload) as giver:
        progress(f"{nbytes / 1e9:.2f} GB to move in {len(pieces(workload))} regions")
        with _Taker(workload, giver) as taker:
            measures = {"tcp": taker.tcp, "unchecked": taker.unchecked, "gloo": taker.gloo, "raw": taker.raw}
            for name in ("tcp", "unchecked", "gloo"):
                taker.verified(name, measures[name])
            taker.raw()  # once unmeasured, as the others
            samples = interleaved(steps, {name: _timed(measure) for name, measure in measures.items()})
            staging = taker.staging_peak
    seconds = {name: median(values) for name, values in samples.items()}
    gigabytes = nbytes / 1e9
    return BenchResult(
        bench="network",
        figures=[
            Figure("tcp_gb_per_s", gigabytes / seconds["tcp"], "our network transport over loopback, with checksums, median"),
            Figure("tcp_max_gb_per_s", gigabytes / min(samples["tcp"]), "the fastest"),
            Figure("unchecked_gb_per_s", gigabytes / seconds["unchecked"], "the same without checksums, median"),
            Figure("unchecked_max_gb_per_s", gigabytes / min(samples["unchecked"]), "the fastest"),
            Figure("gloo_gb_per_s", gigabytes / seconds["gloo"], "the same regions by gloo's send and receive, median"),
            Figure("gloo_max_gb_per_s", gigabytes / min(samples["gloo"]), "the fastest"),
            Figure("raw_gb_per_s", gigabytes / seconds["raw"], "as many bytes of one buffer by sendall and recv_into of one socket"),
            Figure("raw_max_gb_per_s", gigabytes / min(samples["raw"]), "the fastest"),
            Figure("moved_gb", gigabytes, f"bytes that arrive, of {len(workload.tensors)} tensors of {shape}"),
            Figure("regions_count", len(pieces(workload)), "regions that they are"),
            Figure("staging_mib", staging / 2**20, "most staging memory of the reader"),
            Figure("steps_count", steps, "transfers measured"),
        ],
        ratios=[
            Ratio("gloo", seconds["gloo"] / seconds["tcp"], "gloo over our transport", reach=1.0),
            Ratio("unchecked", seconds["unchecked"] / seconds["tcp"], "our transport without checksums over it with them"),
            Ratio("raw", seconds["raw"] / seconds["tcp"], "one socket over our transport"),
        ],
    )


def _timed(measure: Callable[[], None]) -> Callable[[], list[float]]:
    def run() -> list[float]:
        start = time.monotonic()
        measure()
        return [time.monotonic() - start]

    return run


def pieces(workload: Workload) -> list[Piece]:
    """What target rank 0 gets, in one order on both ends."""
    found = []
    for position, spec in enumerate(workload.tensors):
        sides = [
            Side(layout, tuple(range(layout.ranks)), ("host",) * layout.ranks)
            for layout in (workload.layout(spec, "src"), workload.layout(spec, "dst"))
        ]
        for route in routes_into(sides[0], sides[1], spec.shape, 0):
            found += [Piece(route.source, position, box.source_start, box.target_start, box.size) for box in route.boxes]
    return found


def cut(tensor: torch.Tensor, start: _Box, size: _Box) -> torch.Tensor:
    """A box of it."""
    return tensor[tuple(slice(first, first + count) for first, count in zip(start, size, strict=True))]


def _gloo(store: TCPStore, rank: int) -> Any:
    """A process group of two, of its own: torch's stubs lack its send and recv."""
    return ProcessGroupGloo(store, rank, 2, timedelta(seconds=TIMEOUT))


# ---------------------------------------------------------------------------------------------------------- the taker


class _Taker:
    """This process's end: it reads, receives and compares."""

    def __init__(self, workload: Workload, giver: Pipe) -> None:
        self._giver = giver
        self._shards = Shards(workload, "dst", 0)
        self._pieces = pieces(workload)
        self._targets = [cut(self._shards.tensors[piece.tensor], piece.target_start, piece.size) for piece in self._pieces]
        self._version = 0
        self._stack = contextlib.ExitStack()
        self._raw = torch.empty(workload.nbytes("dst", 0), dtype=torch.uint8)

    def __enter__(self) -> _Taker:
        with self._stack:
            secret = os.urandom(32)
            self._giver.send_bytes(secret)
            address = Address(_HOST, int(answer(self._giver)))
            transports = [NetworkTransport(secret, checksums=checksums) for checksums in (True, False)]
            self._transports = transports
            for transport in transports:
                self._stack.callback(transport.close)
            reads = [
                Read(
                    RemoteRegion(address, _EXPORT.format(piece.source), piece.tensor, piece.source_start, piece.size, target.dtype), target
                )
                for piece, target in zip(self._pieces, self._targets, strict=True)
            ]
            self._checked, self._unchecked = (transport.prepare(reads) for transport in transports)
            store = TCPStore(_HOST, 0, 2, True, timedelta(seconds=TIMEOUT), wait_for_workers=False)
            listener = self._stack.enter_context(socket.create_server((_HOST, 0)))
            self._ask(f"connect {store.port} {listener.getsockname()[1]}")
            self._group = _gloo(store, 0)
            self._socket = self._stack.enter_context(listener.accept()[0])
            answer(self._giver)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def verified(self, name: str, measure: Callable[[], None]) -> None:
        """Have the giver write new data, move it, and compare all of it. Raises `BenchError`."""
        self._version += 1
        self._ask(f"fill {self._version}")
        answer(self._giver)
        measure()
        check_arrived(name, [self._shards.wrong(self._version)])

    def tcp(self) -> None:
        """Read all regions with our transport: the giver is not asked, its transport's threads answer."""
        self._checked.run()

    def unchecked(self) -> None:
        """The same, and nothing is compared with checksums."""
        self._unchecked.run()

    @property
    def staging_peak(self) -> int:
        """Most bytes of staging memory that a transport had."""
        return max(transport.staging_peak for transport in self._transports)

    def gloo(self) -> None:
        """Receive all regions by gloo."""
        self._ask("gloo")
        targets = [target if target.is_contiguous() else torch.empty(target.shape, dtype=target.dtype) for target in self._targets]
        for work in [self._group.recv([target], 1, tag) for tag, target in enumerate(targets)]:
            work.wait()
        for target, received in zip(self._targets, targets, strict=True):
            if received is not target:
                target.copy_(received)

    def raw(self) -> None:
        """Receive one buffer through one socket."""
        self._ask("raw")
        view, done = memoryview(cast(Any, self._raw.numpy())), 0
        while done < len(view):
            count = self._socket.recv_into(view[done:])
            if not count:
                raise BenchError("the giving process ended; see its log above")
            done += count

    def _ask(self, request: str) -> None:
        self._giver.send_bytes(request.encode())


# ---------------------------------------------------------------------------------------------------------- the giver


def _give(pipe: Pipe, workload: Workload) -> None:
    """The life of the other process: it holds all source ranks' shards, and sends when it is asked to."""
    shards = [Shards(workload, "src", index) for index in range(workload.src)]
    sources = [cut(shards[piece.source].tensors[piece.tensor], piece.source_start, piece.size) for piece in pieces(workload)]
    raw = memoryview(cast(Any, torch.ones(workload.nbytes("dst", 0), dtype=torch.uint8).numpy()))
    with contextlib.ExitStack() as stack, contextlib.suppress(EOFError):
        secret = pipe.recv_bytes()
        transport = NetworkTransport(secret)
        server = Server(secret, transport.services, _HOST)
        stack.callback(server.close)
        stack.callback(transport.close)
        for index, held in enumerate(shards):
            transport.export(_EXPORT.format(index), held.tensors)
        pipe.send_bytes(str(server.address.port).encode())
        _, store_port, raw_port = pipe.recv_bytes().split()
        group = _gloo(TCPStore(_HOST, int(store_port), 2, False, timedelta(seconds=TIMEOUT)), 1)
        sock = stack.enter_context(socket.create_connection((_HOST, int(raw_port))))
        pipe.send_bytes(b"connected")
        while True:
            request, *arguments = pipe.recv_bytes().split()
            if request == b"fill":
                for held in shards:
                    held.fill(int(arguments[0]))
                pipe.send_bytes(b"filled")
            elif request == b"raw":
                sock.sendall(raw)
            else:
                for work in [group.send([source.contiguous()], 0, tag) for tag, source in enumerate(sources)]:
                    work.wait()
