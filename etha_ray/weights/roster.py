"""Which replicas a push goes to, said by the sender's rank 0 to its other ranks.

Replicas come and go, and each rank sees that at another moment: were each to decide by itself, one would wait for a replica that
another sends nothing. So rank 0 decides. What it decided crosses to the others like weights do, in a batch of one small tensor:
a push asks the store for nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import msgspec
import torch

from etha_ray.decoding import Decoder
from etha_ray.errors import ConfigError, TransferError
from etha_ray.layout import Layout, MeshSpec
from etha_ray.weights.layouts import Seat
from etha_ray.weights.link import Link
from etha_ray.weights.parties import Parties
from etha_ray.weights.session import AgentAddress, Part, SeatInPair, Session

_SIZE = 1 << 16


class Call(msgspec.Struct, frozen=True, array_like=True):
    """One push: its version, and the replicas it goes to with the `Parties.id` of each."""

    version: int
    replicas: dict[str, str]


_encoder = msgspec.msgpack.Encoder()
_decoder = Decoder(Call)


class Roster:
    """This rank's end of it. For senders with more than one rank.

    Args:
        name: of the weights.
        seat: this rank.
        address: its agent.
        changed: see `Link`.
    """

    def __init__(self, name: str, seat: Seat, address: AgentAddress, changed: threading.Condition) -> None:
        self._seat = seat
        self._address = address
        self._batch_id = f"{name}/roster"
        self._said = torch.zeros(_SIZE, dtype=torch.uint8)
        late = "not all ranks have called push in time"
        if seat.rank != 0:
            late = "rank 0 has not called push in time, or waits for replicas itself"
        self.link = Link(f"the other ranks of the sender of {name!r}", late, self._connect, changed)

    def say(self, session: Session, call: Call, timeout: float | None) -> None:
        """Tell the others; returns when all have heard. On rank 0."""
        data = _encoder.encode(call)
        if len(data) > _SIZE - 4:
            raise ConfigError(f"{self._batch_id}: {len(call.replicas)} replicas are more than a push can go to")
        whole = len(data).to_bytes(4, "little") + data
        self._said[: len(whole)] = torch.frombuffer(bytearray(whole), dtype=torch.uint8)
        self.link.transfer(session, timeout)

    def hear(self, session: Session, timeout: float | None) -> Call:
        """Wait for what rank 0 says. On the others."""
        self.link.transfer(session, timeout)
        data = bytes(self._said.tolist())
        try:
            return _decoder.decode(data[4 : 4 + int.from_bytes(data[:4], "little")])
        except msgspec.DecodeError as error:
            raise TransferError(
                f"{self._batch_id}: what rank 0 says of its push cannot be read ({error}): run the same version of etha_ray on all ranks"
            ) from error

    def _connect(self, parties: Parties) -> Session:
        leads = self._seat.rank == 0
        size, index = (1, 0) if leads else (self._seat.size - 1, self._seat.rank - 1)
        pair = SeatInPair(f"{self._batch_id}/{parties.id}", MeshSpec((size,), (index,)), Layout.whole(size).placements)
        return Session(self._address, Part("send" if leads else "recv", self._batch_id, (pair,), ((self._said, pair.name),)))


def replica_ids(links: Mapping[str, Link]) -> dict[str, str]:
    """The replicas that are connected, with their ids."""
    return {replica: link.id for replica, link in links.items() if link.ready is not None}
