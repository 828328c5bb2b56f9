"""What an agent would have to be told again: kept in its state file, read by the agent that takes its place if it dies.

For each client its `Hello`, each `Announce` and `InitPair` that holds, and each `RegisterTensors` that was ready or has no time limit.
The commands themselves are kept, so that the next agent does what the first one was asked to do; nobody waits for an answer any more.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from etha_ray.decoding import Decoder
from etha_ray.errors import EthaRayError
from etha_ray.tensor_bus.commands import Announce, BaseCommand, Hello, InitPair, RegisterTensors
from etha_ray.tensor_bus.messages import decode_command, encode_command
from etha_ray.tensor_bus.records import fingerprint
from etha_ray.tensor_bus.state_file import JOURNAL, StateFile

logger = logging.getLogger(__name__)

C = TypeVar("C", bound=BaseCommand)


class JoinedPair(msgspec.Struct, frozen=True):
    """A pair that a client joined: the encoded `InitPair`, and the place it had."""

    command: bytes
    slot: str


@dataclass
class ServedClient:
    """What is remembered of one client."""

    hello: Hello
    pairs: list[tuple[InitPair, str]] = field(default_factory=list)
    """Each with the place that the client had in it."""
    batches: list[RegisterTensors] = field(default_factory=list)
    notices: list[Announce] = field(default_factory=list)


_pairs = Decoder(JoinedPair)


class Journal:
    """An agent's journal, in its state file. On the loop only."""

    def __init__(self, state: StateFile) -> None:
        self._state = state

    def met(self, hello: Hello) -> None:
        """A client introduced itself."""
        self._state.put(_key(hello.client_id, "hello"), _kept(hello))

    def joined(self, command: InitPair, slot: str) -> None:
        """A client takes this place in a pair."""
        entry = msgspec.msgpack.encode(JoinedPair(_kept(command), slot))
        self._state.put(_key(command.client_id, "pair", command.pair_name), entry)

    def left(self, client_id: str, pair_name: str) -> None:
        """A client is not in the pair any more, or was refused."""
        self._state.delete([_key(client_id, "pair", pair_name)])

    def registered(self, command: RegisterTensors) -> None:
        """A client's batch is ready."""
        self._state.put(_key(command.client_id, "batch", command.batch_id), _kept(command))

    def closed(self, client_id: str, batch_id: str) -> None:
        """A client's batch is closed."""
        self._state.delete([_key(client_id, "batch", batch_id)])

    def announced(self, command: Announce) -> None:
        """A client lets others know something."""
        self._state.put(_key(command.client_id, "notice", command.topic, command.slot), _kept(command))

    def withdrawn(self, client_id: str, topic: str, slot: str) -> None:
        """A client took that back."""
        self._state.delete([_key(client_id, "notice", topic, slot)])

    def gone(self, client_id: str) -> None:
        """A client left, or died."""
        self._state.delete(list(self._state.under(_key(client_id, ""))))

    def clients(self) -> list[ServedClient]:
        """What the agent before this one served. Entries that cannot be read are removed."""
        found: dict[str, ServedClient] = {}
        entries = self._state.under(JOURNAL)
        for key, value in sorted(entries.items(), key=lambda entry: b":hello" not in entry[0]):
            try:
                self._restore(key, value, found)
            except (msgspec.DecodeError, TypeError, KeyError, ValueError) as error:
                logger.error("journal entry %r cannot be read (%s): what it stood for must be registered again", key, error)
                self._state.delete([key])
        return list(found.values())

    def _restore(self, key: bytes, value: bytes, found: dict[str, ServedClient]) -> None:
        client_id, kind = key.decode().split(":")[1:3]
        if kind == "pair":
            entry = _pairs.decode(value)
            found[client_id].pairs.append((_command(entry.command, InitPair), entry.slot))
        elif kind == "batch":
            found[client_id].batches.append(_command(value, RegisterTensors))
        elif kind == "notice":
            found[client_id].notices.append(_command(value, Announce))
        else:
            hello = _command(value, Hello)
            if hello.client_id != client_id:
                raise ValueError(f"it is that of client {hello.client_id!r}")
            found[client_id] = ServedClient(hello)


@contextmanager
def restoring(what: str, name: str) -> Iterator[None]:
    """What is taken up in this block: where it was damaged, or does not fit any more, it is left, and keeps nothing else from it."""
    try:
        yield
    except (EthaRayError, ValueError) as error:
        logger.error("%s %r cannot be taken up again: %s", what, name, error)


def _kept(command: Announce | Hello | InitPair | RegisterTensors) -> bytes:
    return encode_command(msgspec.structs.replace(command, semaphore_name=None))


def _command(data: bytes, kind: type[C]) -> C:
    command = decode_command(data)
    if not isinstance(command, kind):
        raise TypeError(f"it holds a {type(command).__name__}")
    return command


def _key(client_id: str, kind: str, *names: str) -> bytes:
    # Names may be longer than LMDB's keys.
    return JOURNAL + f"{client_id}:{kind}{':' + fingerprint(*names) if names else ''}".encode()
