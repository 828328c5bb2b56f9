"""The client's part of notices: what workers let one another know before they are a pair; see `notices`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

from etha_ray.tensor_bus.client import TensorBusClient
from etha_ray.tensor_bus.commands import Announce, ReadBody, ReadNotices, Withdraw


class Board:
    """Announces and reads, as the worker of ``client``. May be used by several threads."""

    def __init__(self, client: TensorBusClient, topic: str) -> None:
        self._call: Callable[..., Any] = client._connection.call
        self._topic = topic

    def announce(self, slot: str, data: bytes, body: bytes = b"", timeout: float = 30.0) -> None:
        """Let readers know ``data`` in ``slot``, until it is withdrawn, or this worker's client closed or dead; again replaces it.

        ``body`` is what ``data`` refers to by its digest (`records.fingerprint`), stored once however many announce the same.

        Raises `CoordinateTakenError` while another worker has that slot, and `ValueTooLargeError` above the store's limit.
        """
        self._call(Announce(topic=self._topic, slot=slot, data=data, body=body), "announce", self._topic, timeout)

    def withdraw(self, slot: str, timeout: float = 30.0) -> None:
        """Take back what was announced in ``slot``."""
        self._call(Withdraw(topic=self._topic, slot=slot), "withdraw", self._topic, timeout)

    def read(self, timeout: float = 30.0) -> dict[str, bytes]:
        """What living workers have announced, by slot."""
        found = self._call(ReadNotices(topic=self._topic), "read_notices", self._topic, timeout, dict[str, bytes])
        return {unquote(slot): data for slot, data in found.items()}

    def body(self, digest: str, timeout: float = 30.0) -> bytes:
        """The body with this digest. Raises `StoreError` where there is none."""
        return bytes(self._call(ReadBody(digest=digest), "read_body", digest, timeout, bytes))
