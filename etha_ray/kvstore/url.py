"""A store from a URL, for settings and command lines."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import SplitResult, parse_qsl, urlsplit

from etha_ray.errors import ConfigError
from etha_ray.kvstore.base import KVStore
from etha_ray.kvstore.memory import MemoryStore

if TYPE_CHECKING:
    from etha_ray.kvstore.tcp import TorchTCPStore

_ACCEPTED = (
    "accepted are gcs:// (Ray's GCS), tcp://HOST:PORT?master=1&world_size=N&wait_for_workers=0 (torch's TCPStore; each option may be "
    "left out) and memory:// (the threads of this process)"
)
_TCP_OPTIONS = ("master", "world_size", "wait_for_workers")
_SWITCH = {"0": False, "1": True}


def create_store(url: str, *, namespace: str = "default", component: str = "tensorbus", timeout: float = 3600.0) -> KVStore:
    """The store that ``url`` names.

    - ``gcs://``: Ray's GCS; Ray must be initialised.
    - ``tcp://HOST:PORT``: torch's TCPStore. ``master=1`` in the one process that serves (default 0); ``world_size=N`` and, with it,
      ``wait_for_workers=0`` not to wait until all N are there. ``timeout`` bounds connecting.
    - ``memory://``: this process only; all stores of one namespace share their keys.

    Raises `ConfigError` naming what is accepted for any other URL, and what the store's class raises.
    """
    parts = _split(url)
    if parts.scheme in ("gcs", "memory"):
        if parts.netloc or parts.path.strip("/") or parts.query or parts.fragment:
            raise ConfigError(f"store URL {url!r} has more than {parts.scheme}://, which takes nothing after it; {_ACCEPTED}")
        if parts.scheme == "memory":
            return MemoryStore(namespace, component)
        from etha_ray.kvstore.gcs import GcsStore

        return GcsStore(namespace, component, timeout)
    if parts.scheme == "tcp":
        return _tcp(url, parts, namespace, component, timeout)
    raise ConfigError(f"store URL {url!r} names no known store; {_ACCEPTED}")


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port  # reading it is what checks it
    except ValueError as error:
        raise ConfigError(f"store URL {url!r}: {error}; {_ACCEPTED}") from None
    return parts


def _tcp(url: str, parts: SplitResult, namespace: str, component: str, timeout: float) -> TorchTCPStore:
    from etha_ray.kvstore.tcp import TorchTCPStore

    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(options.keys() - set(_TCP_OPTIONS))
    if unknown or not parts.hostname or parts.port is None or parts.path.strip("/") or parts.username or parts.fragment:
        cause = f"unknown option {', '.join(unknown)}" if unknown else "it needs a host and a port, and takes options only after them"
        raise ConfigError(f"store URL {url!r}: {cause}; {_ACCEPTED}")
    for name in ("master", "wait_for_workers"):
        if options.get(name, "0") not in _SWITCH:
            raise ConfigError(f"store URL {url!r}: {name} must be 0 or 1, not {options[name]!r}; {_ACCEPTED}")
    world_size = options.get("world_size")
    if world_size is not None and not (world_size.isascii() and world_size.isdigit()):
        raise ConfigError(f"store URL {url!r}: world_size must be a number, not {world_size!r}; {_ACCEPTED}")
    return TorchTCPStore(
        parts.hostname,
        parts.port,
        None if world_size is None else int(world_size),
        _SWITCH[options.get("master", "0")],
        timeout,
        _SWITCH[options.get("wait_for_workers", "1")],
        namespace,
        component,
    )
