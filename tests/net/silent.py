"""Addresses where nobody listens, for as long as a test needs one: a port that was only free before may be somebody's a moment later."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from etha_ray.net import Address


@contextlib.contextmanager
def unheard(host: str = "127.0.0.1") -> Iterator[Address]:
    """One: connections to it are refused within the block."""
    with socket.socket() as held:
        held.bind((host, 0))
        yield Address(*held.getsockname())
