"""The other sides of ``bench store``: a process that waits for keys, and one that owns an etcd and takes it along when it ends."""

from __future__ import annotations

import logging
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from etha_ray.bench.processes import BenchError
from etha_ray.kvstore import KVStore, create_store

HOST = "127.0.0.1"
_READY = b"ready to serve client requests"
_START_TIMEOUT = 60.0
_LEAVE_TIMEOUT = 10.0


class WaiterRole:
    """A process that waits for keys which another puts."""

    def __init__(self) -> None:
        self._store: KVStore | None = None

    def open(self, url: str, namespace: str, ray_address: str | None) -> None:
        """Make the store; as a driver of the Ray cluster at ``ray_address`` where one is given."""
        if ray_address is not None:
            import ray

            ray.init(address=ray_address, log_to_driver=False, logging_level=logging.ERROR)
        self._store = create_store(url, namespace=namespace)

    def wait(self, first: int, count: int) -> list[float]:
        """See `await_puts`."""
        assert self._store is not None, "open comes first"
        return await_puts(self._store, first, count)

    def close(self) -> None:
        """Leave the keys to the one that put them."""
        if self._store is not None:
            self._store.close(cleanup=False)


def await_puts(store: KVStore, first: int, count: int) -> list[float]:
    """Wait for ``wake/{n}`` from ``first`` on, one after the other, saying so in ``ready/{n}``; the moments (monotonic) of waking."""
    moments = []
    for n in range(first, first + count):
        store.set(f"ready/{n}", "1")
        store.wait_for_key(f"wake/{n}", 60.0)
        moments.append(time.monotonic())
    return moments


class EtcdRole:
    """An etcd of one member on this host, with its data in a folder of its own, as it is set up by default."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="etha_ray_bench_etcd_"))

    def start(self, program: str) -> str:
        """Start ``program``; ``HOST:PORT`` when it serves."""
        client, peer = (f"{HOST}:{port}" for port in _free_ports())
        command = [program, "--data-dir", str(self._folder / "data"), "--initial-cluster", f"default=http://{peer}"]
        for urls, address in (("client-urls", client), ("peer-urls", peer)):
            command += [f"--listen-{urls}", f"http://{address}"]
        command += ["--advertise-client-urls", f"http://{client}", "--initial-advertise-peer-urls", f"http://{peer}"]
        log = self._folder / "log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        deadline = time.monotonic() + _START_TIMEOUT
        while _READY not in log.read_bytes():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{program} does not serve after {_START_TIMEOUT:g} s, or has ended:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        return client

    def pid(self) -> int:
        """Its process."""
        assert self._process is not None, "start comes first"
        return self._process.pid

    def close(self) -> None:
        """End it and remove its data."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_LEAVE_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def _free_ports() -> list[int]:
    with socket.create_server((HOST, 0)) as first, socket.create_server((HOST, 0)) as second:
        return [int(each.getsockname()[1]) for each in (first, second)]
