"""What agents say to one another, and the one wire format of that and of clients' commands (msgpack, no pickle).

Every message is a tagged struct: the tag is the class name, so a reader learns the type from the bytes alone. Decoding is
strict: an unknown tag, an unknown or missing field, or a field of the wrong type raises `msgspec.ValidationError`, and bytes
that are no msgpack at all raise `msgspec.DecodeError` (its base class).

Encoders and decoders are shared and may be used from any thread.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import msgspec

from etha_ray.decoding import Decoder
from etha_ray.tensor_bus.commands import (
    Announce,
    BaseCommand,
    CancelTransfer,
    CleanupBatch,
    Goodbye,
    Hello,
    HurryTransfer,
    InitPair,
    MakeDigest,
    Ping,
    QueryStatus,
    ReadBody,
    ReadNotices,
    ReadyReplicas,
    RegisterTensors,
    Transfer,
    Version,
    WaitReady,
    WaitVersion,
    Withdraw,
)


class DataReady(BaseCommand):
    """Agent to agent: the sender's data of this batch may be read now.

    source, target: the sending and the receiving worker's registration of the batch. sequence: number of this send within
    the source's registration. version: what is sent. chosen: the source's worker said so itself, and did not only count on. send:
    what this send is called, also when it is announced again under other registrations.
    """

    batch_id: str
    source: str
    target: str
    sequence: int
    version: Version
    chosen: bool = False
    send: str = ""


class DataTaken(BaseCommand):
    """Agent to agent: the target has read the data that the `DataReady` with the same fields announced, as this version.

    seconds: in which its bytes moved.
    """

    batch_id: str
    source: str
    target: str
    sequence: int
    version: Version
    seconds: float = 0.0


class DataRefused(BaseCommand):
    """Agent to agent: the target will not read what the `DataReady` with the same fields announced, and why.

    kind, message: the error that the source's worker is to get, as in `Failed`. count: where it counts on, if it only counts.
    """

    batch_id: str
    source: str
    target: str
    sequence: int
    kind: str
    message: str
    count: int = 0


class DataRead(BaseCommand):
    """Agent to agent, across hosts: the target has read what the `DataReady` with the same fields announced; does it still stand?

    Bytes travel by other connections than messages: a `DataRevoked` may still be on its way when they are there. question: the
    target's number for this one, which the answer repeats.
    """

    batch_id: str
    source: str
    target: str
    sequence: int
    question: int


class DataStands(BaseCommand):
    """Agent to agent: when the `DataRead` with the same fields came, nothing had been taken back. Otherwise the answer is `DataRevoked`."""

    batch_id: str
    source: str
    target: str
    sequence: int
    question: int


class DataRevoked(BaseCommand):
    """Agent to agent: the data that the `DataReady` with the same fields announced must not be read any more."""

    batch_id: str
    source: str
    target: str
    sequence: int


class RelayWanted(BaseCommand):
    """Receiver to receiver: ``target`` wants what ``relay`` receives of these sends, too; see `relaying`.

    sends: the number of the last send, by the source's registration. question: the target's number for this receive.
    """

    batch_id: str
    relay: str
    target: str
    sends: dict[str, int]
    question: int


class RelayAnswer(BaseCommand):
    """Receiver to receiver, about the `RelayWanted` with this question.

    state: "coming", the relay receives it now, and can be read from as far as ``upto`` says; "ready", all of it can be read from the
    relay's tensors, which are kept for it; "stands", nothing had changed in them when the `RelayRead` came; "over", it is not there, or
    not any more.
    upto: the position in each pair (`Inflow.key`) up to which all is there; that is kept for the target, too.
    """

    batch_id: str
    relay: str
    target: str
    question: int
    state: Literal["coming", "ready", "stands", "over"]
    upto: dict[str, int] = msgspec.field(default_factory=dict)


class RelayRead(BaseCommand):
    """Receiver to receiver: the target has read from the relay, or will not; did what it read stand?"""

    batch_id: str
    relay: str
    target: str
    question: int


class DigestPart(BaseCommand):
    """Rank to rank of one side: what ``source`` added up for a digest.

    number: of this try of the source's, never used again. answers: the try of the target's that may use it; 0 for none so far.
    parts: by pair, see `digests.Sums`, for each tensor of the pair in order; None where the target has been told. Neither answer nor
    parts takes the try back.
    """

    batch_id: str
    source: str
    target: str
    number: int
    answers: int = 0
    parts: dict[str, bytes] | None = None


class RegistrationClosed(BaseCommand):
    """Agent to agent: the registration ``closed``, which ``target`` exchanges data with, is gone, and why.

    lost: its worker or agent died, rather than closed it. completed: how many transfers it had completed. returns: whether it comes
    back by itself, see `losses`. agreed: the sets of registrations, by their digests, of which it saw all members agree.
    """

    batch_id: str
    closed: str
    target: str
    reason: str
    lost: bool = False
    completed: int = 0
    returns: Literal["no", "perhaps", "soon"] = "no"
    agreed: tuple[str, ...] = ()


RelayMessage: TypeAlias = RelayWanted | RelayAnswer | RelayRead
SenderMessage: TypeAlias = DataReady | DataRead | DataStands | DataTaken | DataRefused | DataRevoked
DataMessage: TypeAlias = SenderMessage | RelayMessage | DigestPart
"""What agents say to one another of a registered batch."""

DATA_MESSAGES: tuple[type[BaseCommand], ...] = get_args(DataMessage)
"""All kinds of them."""

Message: TypeAlias = (
    Transfer
    | RegisterTensors
    | InitPair
    | Announce
    | Withdraw
    | ReadNotices
    | ReadBody
    | QueryStatus
    | WaitVersion
    | ReadyReplicas
    | MakeDigest
    | WaitReady
    | CleanupBatch
    | CancelTransfer
    | HurryTransfer
    | Hello
    | Goodbye
    | Ping
    | DataReady
    | DataRead
    | DataStands
    | DataTaken
    | DataRefused
    | DataRevoked
    | RelayWanted
    | RelayAnswer
    | RelayRead
    | DigestPart
    | RegistrationClosed
)

_encoder = msgspec.msgpack.Encoder()
_decoder: Decoder[Message] = Decoder(Message)


def encode_command(command: Message) -> bytes:
    """The command or message as msgpack. Field types are checked by the decoder, not here."""
    return _encoder.encode(command)


def decode_command(data: bytes | bytearray | memoryview) -> Message:
    """The command or message in ``data``; raises `msgspec.DecodeError` (`msgspec.ValidationError` for a wrong tag or field)."""
    return _decoder.decode(data)
