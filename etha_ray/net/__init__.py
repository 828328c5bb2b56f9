"""Connections between agents of different hosts: authenticated, framed, and never silent for long without being noticed.

`Server` listens and hands each connection that proves the secret to a service by name; `dial` opens one. `Channel` (by
`connect`, or `accept_channels` as a service) carries messages in order both ways and notices the other end's death.
"""

from __future__ import annotations

from etha_ray.net.address import Address, no_listener
from etha_ray.net.channel import MAX_MESSAGE, Channel, accept_channels, connect
from etha_ray.net.connection import Connection
from etha_ray.net.handshake import SECRET_BYTES
from etha_ray.net.server import Server, Service, dial

__all__ = [
    "MAX_MESSAGE",
    "SECRET_BYTES",
    "Address",
    "Channel",
    "Connection",
    "Server",
    "Service",
    "accept_channels",
    "connect",
    "dial",
    "no_listener",
]
