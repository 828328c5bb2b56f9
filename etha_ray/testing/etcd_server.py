"""Real etcd servers: on loopback, each with a folder and ports of its own, to be killed and started again."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from etha_ray.config import etcd_for_tests
from etha_ray.testing.calls import PATIENCE

HOST = "127.0.0.1"
INSTALL = "etcd is not installed: apt-get install etcd-server etcd-client"
READY = b"ready to serve client requests"


@dataclass(frozen=True)
class EtcdAddress:
    """Where an etcd listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """What `create_store` takes."""
        return f"etcd://{self.host}:{self.port}"


def address_from_environment() -> EtcdAddress | None:
    """The etcd that was started for the tests, if ETHA_RAY_TEST_ETCD names one."""
    found = etcd_for_tests()
    return None if found is None else EtcdAddress(*found)


def require(program: str = "etcd") -> str:
    """The path of a program of etcd; skips the test where it is missing, and fails it where ETHA_RAY_TEST_ETCD says that there is etcd."""
    found = shutil.which(program)
    if found is None:
        if etcd_for_tests() is not None:
            pytest.fail(INSTALL)
        pytest.skip(INSTALL)
    return found


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different, and of those that the system gives nobody by itself before they are used."""
    listening: list[socket.socket] = []
    while len(listening) < count:
        with contextlib.suppress(OSError):
            listening.append(socket.create_server((HOST, random.randrange(20000, 32768))))
    ports = [int(each.getsockname()[1]) for each in listening]
    for each in listening:
        each.close()
    return ports


@dataclass
class EtcdServer:
    """One etcd process. ``arguments`` are further ones of its command line; ``scheme`` is "https" where they say how TLS is done.

    Its data and its log are in ``folder``, and stay when it is killed.
    """

    folder: Path
    arguments: Sequence[str] = ()
    scheme: str = "http"
    host: str = HOST
    name: str = "one"
    port: int = 0
    peer_port: int = 0
    cluster: str = ""
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _log_start: int = 0

    def __post_init__(self) -> None:
        if not self.port:
            self.port, self.peer_port = free_ports(2)

    @property
    def url(self) -> str:
        """What `create_store` takes, without user and certificates."""
        return f"etcd://{self.host}:{self.port}"

    @property
    def peer(self) -> str:
        """This server in the list of a cluster's members."""
        return f"{self.name}=http://{HOST}:{self.peer_port}"

    @property
    def pid(self) -> int:
        """The process's id while it runs."""
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> Path:
        """All that the server has printed, of all its runs."""
        return self.folder / f"{self.name}.log"

    def start(self) -> None:
        """Starts the process; `wait_ready` says when it serves."""
        assert self._process is None
        client, peer = f"{self.scheme}://{HOST}:{self.port}", f"http://{HOST}:{self.peer_port}"
        command = [
            require(),
            "--name",
            self.name,
            "--data-dir",
            str(self.folder / self.name),
            "--initial-cluster",
            self.cluster or self.peer,
        ]
        command += ["--listen-client-urls", client, "--advertise-client-urls", client]
        command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, *self.arguments]
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def wait_ready(self) -> None:
        """Returns when the server answers; in a cluster that takes a majority of its members."""
        assert self._process is not None
        deadline = time.monotonic() + PATIENCE
        while READY not in self.log.read_bytes()[self._log_start :]:
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"etcd {self.name} did not start: {self.log.read_text()[-2000:]}")
            time.sleep(0.02)

    def restart(self) -> None:
        """Starts the server again after `kill`, on the same ports and data, and waits until it serves."""
        self.start()
        self.wait_ready()

    def kill(self) -> None:
        """SIGKILL, if the server runs; also to one that is paused."""
        if self._process is not None:
            self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ends the server, if it runs, as an administrator would."""
        if self._process is not None:
            self._end(signal.SIGTERM)

    def pause(self) -> None:
        """SIGSTOP: connections stay open, and nobody answers. Returns when all its threads stand still."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def _end(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
