"""A store from a URL, for settings and command lines."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from etha_ray.errors import ConfigError
from etha_ray.kvstore.base import KVStore
from etha_ray.kvstore.memory import MemoryStore

_ACCEPTED = (
    "accepted are gcs:// (Ray's GCS), tcp://HOST:PORT?master=1&world_size=N&wait_for_workers=0 (torch's TCPStore), "
    "etcd://USER:PASSWORD@HOST:PORT,HOST:PORT?tls=1&ca=FILE&cert=FILE&key=FILE (etcd; user and password percent-encoded) and memory:// "
    "(the threads of this process); each option, and user and password, may be left out"
)
_TCP_OPTIONS = ("master", "world_size", "wait_for_workers")
_ETCD_OPTIONS = ("tls", "ca", "cert", "key")
_SWITCH = {"0": False, "1": True}


def create_store(url: str, *, namespace: str = "default", component: str = "tensorbus", timeout: float = 3600.0) -> KVStore:
    """The store that ``url`` names.

    - ``gcs://``: Ray's GCS; Ray must be initialised.
    - ``tcp://HOST:PORT``: torch's TCPStore. ``master=1`` in the one process that serves (default 0); ``world_size=N`` and, with it,
      ``wait_for_workers=0`` not to wait until all N are there. ``timeout`` bounds connecting.
    - ``etcd://HOST:PORT,HOST:PORT``: etcd; ``PORT`` is 2379 where it is left out. ``USER:PASSWORD@`` in front of the hosts, both
      percent-encoded (``%40`` for ``@``), where the cluster has authentication. ``ca=FILE``, ``cert=FILE`` and ``key=FILE`` as in
      `EtcdStore`; ``tls=1`` for encryption without them.
    - ``memory://``: this process only; all stores of one namespace share their keys.

    Raises `ConfigError` naming what is accepted for any other URL, and what the store's class raises. No message has the password.
    """
    return _maker(url)(namespace, component, timeout)


def check_store_url(url: str) -> str:
    """Return ``url`` if `create_store` takes it; raise `ConfigError`, naming what is accepted, otherwise. Connects to nothing."""
    _maker(url)
    return url


_Maker: TypeAlias = Callable[[str, str, float], KVStore]
"""Makes a store of a namespace, a component and a timeout."""


def _maker(url: str) -> _Maker:
    parts = _split(url)
    if parts.scheme in ("gcs", "memory"):
        if parts.netloc or parts.path.strip("/") or parts.query or parts.fragment:
            raise _refusal(url, f"{parts.scheme}:// takes nothing after it")
        return _gcs if parts.scheme == "gcs" else lambda namespace, component, _: MemoryStore(namespace, component)
    if parts.scheme == "etcd":
        return _etcd(url, parts)
    if parts.scheme == "tcp":
        return _tcp(url, parts)
    raise _refusal(url, "it names no known store")


def _gcs(namespace: str, component: str, timeout: float) -> KVStore:
    from etha_ray.kvstore.gcs import GcsStore

    return GcsStore(namespace, component, timeout)


def _refusal(url: str, cause: str) -> ConfigError:
    return ConfigError(f"store URL {re.sub('//.*@', '//***@', url, flags=re.DOTALL)!r}: {cause}; {_ACCEPTED}")


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
    except ValueError:
        raise _refusal(url, "it cannot be parsed") from None
    return parts


def _options(url: str, parts: SplitResult, known: tuple[str, ...], switches: tuple[str, ...]) -> dict[str, str]:
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(options.keys() - set(known))
    if unknown:
        raise _refusal(url, f"unknown option {', '.join(unknown)}")
    for name in switches:
        if options.get(name, "0") not in _SWITCH:
            raise _refusal(url, f"{name} must be 0 or 1, not {options[name]!r}")
    return options


def _tcp(url: str, parts: SplitResult) -> _Maker:
    options = _options(url, parts, _TCP_OPTIONS, ("master", "wait_for_workers"))
    place = host_and_port(parts.netloc)
    if place is None or place[1] is None or parts.path.strip("/") or parts.fragment:
        raise _refusal(url, "it needs a host and a port from 0 to 65535, and takes options only after them")
    host, port, world_size = place[0], place[1], options.get("world_size")
    if world_size is not None and not (world_size.isascii() and world_size.isdigit()):
        raise _refusal(url, f"world_size must be a number, not {world_size!r}")

    def make(namespace: str, component: str, timeout: float) -> KVStore:
        from etha_ray.kvstore.tcp import TorchTCPStore

        size = None if world_size is None else int(world_size)
        master, wait = _SWITCH[options.get("master", "0")], _SWITCH[options.get("wait_for_workers", "1")]
        return TorchTCPStore(host, port, size, master, timeout, wait, namespace, component)

    return make


def _etcd(url: str, parts: SplitResult) -> _Maker:
    options = _options(url, parts, _ETCD_OPTIONS, ("tls",))
    who, at, hosts = parts.netloc.rpartition("@")
    user, colon, password = who.partition(":")
    endpoints = hosts.split(",")
    if at and not (user and colon):
        raise _refusal(url, "it needs a user, a colon and a password before the @")
    if any((host_and_port(each) or ("", 0))[1] == 0 for each in endpoints) or parts.path.strip("/") or parts.fragment:
        raise _refusal(url, "it needs hosts, each with a port from 1 to 65535 or none, and takes options only after them")

    def make(namespace: str, component: str, timeout: float) -> KVStore:
        from etha_ray.kvstore.etcd import EtcdStore

        return EtcdStore(
            timeout=timeout,
            namespace=namespace,
            component=component,
            endpoints=endpoints,
            user=unquote(user) if at else None,
            password=unquote(password) if at else None,
            tls=_SWITCH[options.get("tls", "0")],
            ca=options.get("ca"),
            cert=options.get("cert"),
            key=options.get("key"),
        )

    return make


def host_and_port(text: str) -> tuple[str, int | None] | None:
    """Of ``HOST`` or ``HOST:PORT``, the host in brackets if it is an IPv6 address; None if the text is something else."""
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    return (host, port) if host and parts.netloc == text and "@" not in text else None
