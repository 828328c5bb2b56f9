"""A network namespace joined to this one by a cable that can be cut: another host, as far as TCP knows."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest


@dataclass(frozen=True)
class End:
    """One end of a cable: a device here, or in a namespace; and the routes through it, which the kernel forgets while it is down."""

    namespace: str | None
    device: str
    routes: list[tuple[str, ...]] = field(default_factory=list)

    def cut(self) -> None:
        """Take it out: from now on packets vanish."""
        self._set("link", "set", self.device, "down")

    def mend(self) -> None:
        """Put it in again."""
        self._set("link", "set", self.device, "up")
        for route in self.routes:
            self._set("route", "replace", *route)

    def lead(self, *route: str) -> None:
        """From now on this way leads through it."""
        self.routes.append((*route, "dev", self.device))
        self._set("route", "replace", *self.routes[-1])

    def _set(self, *what: str) -> None:
        _ip(*([] if self.namespace is None else ["-n", self.namespace]), *what)


@dataclass(frozen=True)
class Cable:
    """Run a program ``over_there`` by prefixing its command; reach it at ``host``, and this side from there at ``here``."""

    namespace: str
    host: str
    here: str
    near: End
    far: End

    @property
    def over_there(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.namespace)

    def cut(self, side: str) -> None:
        """Take one end of the cable out, "near" or "far": from now on packets vanish."""
        (self.near if side == "near" else self.far).cut()

    def mend(self, side: str) -> None:
        """Put it in again."""
        (self.near if side == "near" else self.far).mend()

    def drop_packets_to(self, port: int) -> None:
        """From now on what is sent from over there to this port vanishes, as by a firewall that forgot the connection."""
        match = ["u32", "match", "ip", "dport", str(port), "0xffff"]
        away = ["action", "mirred", "egress", "redirect", "dev", "lo"]  # which is down; a plain drop is not in every kernel
        self._tc("qdisc", "add", "dev", "far", "clsact")
        self._tc("filter", "add", "dev", "far", "egress", "protocol", "ip", *match, *away)

    def slow_down(self, megabits: int, device: str = "far") -> None:
        """Have what comes from over there arrive at this rate: here, or where the cable on another ``device`` leads (see `join`).

        It may be called again for another rate.
        """
        self._tc("qdisc", "replace", "dev", device, "root", "tbf", "rate", f"{megabits}mbit", "burst", "64kb", "latency", "50ms")

    def sent_here(self) -> int:
        """Bytes that went from this side to the other since the cable was laid."""
        shown = subprocess.run(["ip", "-s", "-j", "link", "show", self.near.device], check=True, capture_output=True, timeout=30).stdout
        return int(json.loads(shown)[0]["stats64"]["tx"]["bytes"])

    def _tc(self, *arguments: str) -> None:
        done = subprocess.run([*self.over_there, "tc", *arguments], capture_output=True, text=True, timeout=30)
        if done.returncode:
            pytest.skip(f"traffic control is not to be had here: {done.stderr.strip()}")


def join(cables: list[Cable]) -> dict[tuple[int, int], tuple[End, End]]:
    """Lay a cable between each two of these namespaces, and have all reach this one at any of its addresses.

    Returns the ends of each cable, by the indices of the namespaces that it joins.
    """
    for cable in cables:
        cable.far.lead("default", "via", cable.here)
    laid: dict[tuple[int, int], tuple[End, End]] = {}
    for number, (first, second) in enumerate(itertools.combinations(range(len(cables)), 2)):
        one, other = cables[first], cables[second]
        ends = End(one.namespace, f"x{number}a"), End(other.namespace, f"x{number}b")  # x0a: the first's to the second
        _ip("-n", one.namespace, "link", "add", ends[0].device, "type", "veth", "peer", "name", ends[1].device, "netns", other.namespace)
        for end in ends:
            end.mend()
        ends[0].lead(other.host, "src", one.host)
        ends[1].lead(one.host, "src", other.host)
        laid[first, second] = ends
    return laid


_numbers = itertools.count()


@contextlib.contextmanager
def cable() -> Iterator[Cable]:
    """Lay one; skips the test where that is not allowed."""
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed")
    # Of the block that RFC 2544 sets apart for measuring between hosts: no real address. Told apart by the process.
    number = next(_numbers)  # what was deleted goes a moment later, so no name is used twice
    index = (os.getpid() * 64 + number) % 16384
    near, far = (f"198.{18 + index // 8192}.{index // 32 % 256}.{index % 32 * 8 + last}" for last in (1, 2))
    namespace, device = f"etha-ray-{os.getpid()}-{number}", f"er{os.getpid()}n{number}"
    try:
        _ip("netns", "add", namespace)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.decode().strip()}")
    try:
        try:
            _ip("link", "add", device, "type", "veth", "peer", "name", "far", "netns", namespace)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"virtual cables cannot be made here: {error.stderr.decode().strip()}")
        _ip("addr", "add", f"{near}/30", "dev", device)
        _ip("link", "set", device, "up")
        _ip("-n", namespace, "addr", "add", f"{far}/30", "dev", "far")
        _ip("-n", namespace, "link", "set", "far", "up")
        _ip("-n", namespace, "link", "set", "lo", "up")
        yield Cable(namespace, far, near, End(None, device), End(namespace, "far"))
    finally:
        # Connections that nobody closed would keep the namespace, and it the cable, for minutes.
        subprocess.run(["ip", "link", "del", device], capture_output=True, timeout=30)
        _ip("netns", "del", namespace)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)
