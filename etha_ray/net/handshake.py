"""How two ends prove to one another that they know the secret, without saying it.

A challenge and response with HMAC-SHA256 in both directions (the scheme of RFC 4422's CRAM family, made mutual)::

    server → client   Challenge(version, nonce)
    client → server   Proof(service, hello, nonce, mac)      mac over "client", both nonces, service and hello
    server → client   Welcome(mac)                           mac over "server", and the same

Each end chose one of the nonces, so no answer can be played back, nor one end's answer be used as the other's. It says who
is there when the connection opens. What is sent after is neither encrypted nor signed: on a network where others can change
packets, put a tunnel underneath (WireGuard, IPsec).
"""

from __future__ import annotations

import hmac
import os
from typing import Annotated, TypeAlias

import msgspec

from etha_ray.decoding import Decoder
from etha_ray.errors import ConfigError, NoTransportError
from etha_ray.net.connection import Connection

SECRET_BYTES = 32
"""Bytes of the secret that all agents of a pool share."""

MAX_HELLO = 1024
"""Bytes that the dialling end may say to the service when it opens a connection."""

_VERSION = 3
_NONCE_BYTES = 32
_Nonce: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=_NONCE_BYTES, max_length=_NONCE_BYTES)]
_Service: TypeAlias = Annotated[str, msgspec.Meta(max_length=64)]
_Hello: TypeAlias = Annotated[bytes, msgspec.Meta(max_length=MAX_HELLO)]


class Challenge(msgspec.Struct, frozen=True, tag=True):
    """The server's first word."""

    version: int
    nonce: _Nonce


class Proof(msgspec.Struct, frozen=True, tag=True):
    """The client's answer, with what it wants."""

    service: _Service
    hello: _Hello
    nonce: _Nonce
    mac: bytes


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """The server's proof; from here on the service speaks."""

    mac: bytes


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The server's last word."""

    reason: str


_challenges = Decoder(Challenge)
_proofs = Decoder(Proof)
_answers: Decoder[Welcome | Refused] = Decoder(Welcome | Refused)


def check_secret(secret: bytes) -> bytes:
    """Return ``secret`` if it is one; raise `ConfigError`, without showing it, otherwise."""
    if not isinstance(secret, bytes) or len(secret) != SECRET_BYTES:
        raise ConfigError(f"the secret cannot be used: give {SECRET_BYTES} bytes of os.urandom")
    return secret


def admit(connection: Connection, secret: bytes, services: frozenset[str]) -> tuple[str, bytes]:
    """The server's part: the service that the client wants, and its hello.

    Raises:
        NoTransportError: it does not know the secret, or wants a service that is not there; it was told.
        PeerLostError: it speaks something else, or too slowly, or went away.
    """
    mine = os.urandom(_NONCE_BYTES)
    connection.send(Challenge(_VERSION, mine))
    proof, _ = connection.receive(_proofs)
    if not hmac.compare_digest(proof.mac, _mac(secret, "client", mine, proof.nonce, proof.service, proof.hello)):
        raise _refuse(connection, "it does not know this pool's secret; agents of one pool must take it from one store")
    if proof.service not in services:
        raise _refuse(
            connection, f"it asked for {proof.service!r}, which is not served here; both sides must run the same etha_ray version"
        )
    connection.send(Welcome(_mac(secret, "server", mine, proof.nonce, proof.service, proof.hello)))
    return proof.service, proof.hello


def introduce(connection: Connection, secret: bytes, service: str, hello: bytes) -> None:
    """The client's part.

    Raises:
        NoTransportError: the server refused, does not know the secret, or is of another version.
        PeerLostError: it speaks something else, or too slowly, or went away.
    """
    challenge, _ = connection.receive(_challenges)
    if challenge.version != _VERSION:
        raise NoTransportError(
            f"{connection.peer} speaks version {challenge.version} of the protocol, this side {_VERSION}; run the same etha_ray on both"
        )
    mine = os.urandom(_NONCE_BYTES)
    connection.send(Proof(service, hello, mine, _mac(secret, "client", challenge.nonce, mine, service, hello)))
    answer, _ = connection.receive(_answers)
    if isinstance(answer, Refused):
        raise NoTransportError(f"{connection.peer} refused this agent: {answer.reason}")
    if not hmac.compare_digest(answer.mac, _mac(secret, "server", challenge.nonce, mine, service, hello)):
        raise NoTransportError(f"{connection.peer} does not know this pool's secret: it is not the agent that published this address")


def _refuse(connection: Connection, reason: str) -> NoTransportError:
    connection.send(Refused(reason))
    return NoTransportError(f"refused {connection.peer}: {reason}")


def _mac(secret: bytes, role: str, server_nonce: bytes, client_nonce: bytes, service: str, hello: bytes) -> bytes:
    # msgpack says where each part ends, so no two different sets of parts give the same bytes.
    return hmac.digest(secret, msgspec.msgpack.encode((role, server_nonce, client_nonce, service, hello)), "sha256")
