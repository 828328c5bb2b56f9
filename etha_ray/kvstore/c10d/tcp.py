"""A store with the behaviour of MindSpore's ``mint.distributed.TCPStore``, on torch's TCPStore."""

from __future__ import annotations

from datetime import timedelta

from etha_ray.kvstore.tcp import TorchTCPStore


class TCPStore:
    """Four methods, none of which waits for a key: a missing key reads as ``b""``.

    For the same reason it is no `torch.distributed.Store`: a process group waits in `get` for what another rank has yet to set. For that,
    give torch ``C10dStore(tcp_store.store)``, which is on the same keys.

    Every argument is honoured, those that MindSpore only accepts as well. Keys are taken up to 8 KiB and values up to 8 MiB; with
    ``use_libuv=False`` (on the master and all others) only memory bounds them, 1 GiB works. Above a limit a value is a
    `ValueTooLargeError` and a key a `ConfigError`, both ValueErrors. ``store`` is the `TorchTCPStore` below; ``host`` and ``port`` are
    where it is served. Safe for any number of threads.

    Errors: `TypeError` for an argument of another type, and `StoreUnavailableError` (a RuntimeError and a ConnectionError) when the
    master cannot be reached.
    """

    def __init__(
        self,
        host_name: str,
        port: int,
        world_size: int | None = None,
        is_master: bool = False,
        timeout: timedelta | float = 300,
        wait_for_workers: bool = True,
        multi_tenant: bool = False,
        master_listen_fd: int | None = None,
        use_libuv: bool = True,
    ) -> None:
        """Serves (master) or connects, and with a ``world_size`` and ``wait_for_workers`` waits until that many have done so.

        ``timeout`` (seconds, if a number) bounds that. ``world_size=None`` is any number of processes. ``multi_tenant`` lets several
        masters of one process share a port; ``master_listen_fd`` is a listening socket that the master serves on.

        Raises `ConfigError` (a ValueError) for a port, world size or timeout out of range.
        """
        _check("host_name", host_name, str)
        _check("port", port, int)
        _check("world_size", world_size, int, type(None))
        _check("is_master", is_master, bool)
        _check("timeout", timeout, timedelta, int, float)
        _check("wait_for_workers", wait_for_workers, bool)
        _check("multi_tenant", multi_tenant, bool)
        _check("master_listen_fd", master_listen_fd, int, type(None))
        _check("use_libuv", use_libuv, bool)
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
        self.store = TorchTCPStore(
            host_name,
            port,
            world_size,
            is_master,
            seconds,
            wait_for_workers,
            multi_tenant=multi_tenant,
            master_listen_fd=master_listen_fd,
            use_libuv=use_libuv,
        )
        self.host, self.port = self.store.host, self.store.port

    def __repr__(self) -> str:
        return f"<TCPStore on {self.store!r}>"

    def set(self, key: str, value: str | bytes) -> None:
        """Stores the value, text as UTF-8, replacing what was there."""
        _check("key", key, str)
        _check("value", value, str, bytes)
        self.store.set_bytes(key, value.encode() if isinstance(value, str) else value)

    def get(self, key: str) -> bytes:
        """The value; ``b""`` if the key is missing."""
        _check("key", key, str)
        return self.store.get(key) or b""

    def add(self, key: str, amount: int) -> int:
        """Adds to the decimal number in ``key``, which counts as 0 while it is missing; the sum. Atomic.

        Raises `StoreError` (a RuntimeError) if the value is not a decimal number, or the sum does not fit into 64 bits.
        """
        _check("key", key, str)
        _check("amount", amount, int)
        return self.store.add(key, amount)

    def delete_key(self, key: str) -> bool:
        """Removes the key; whether it was there."""
        _check("key", key, str)
        return self.store.delete(key)


def _check(name: str, value: object, *types: type) -> None:
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in types)
        raise TypeError(f"TCPStore takes {wanted} for {name}, not {type(value).__name__}: {value!r:.60}")
