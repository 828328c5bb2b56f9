"""Where a server listens: a host and a port, as they stand in records and messages."""

from __future__ import annotations

import socket

import msgspec

from etha_ray.errors import ConfigError

_KNOCK_TIMEOUT = 5.0


class Address(msgspec.Struct, frozen=True):
    """A name or IP address (version 4 or 6, without brackets) and a TCP port. Prints as ``10.0.0.1:80`` or ``[::1]:80``."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """What `str` made of an address. Raises `ConfigError` when ``text`` is none."""
        host, _, port = text.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not bare or (":" in bare) != (bare != host) or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 2**16:
            raise ConfigError(f"address {text!r} cannot be used: give HOST:PORT, or [HOST]:PORT for IPv6")
        return cls(bare, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def no_listener(address: str) -> str:
    """Why nobody can be reached at HOST:PORT, with a scheme before it or without; "" where somebody can, or ``address`` is none such."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_TIMEOUT).close()
        except (OSError, OverflowError, UnicodeError) as error:
            return str(error)
    return ""
