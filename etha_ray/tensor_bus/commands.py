"""The commands and outcomes that clients and agents exchange, and their one wire format (msgpack, no pickle).

Every command is a tagged struct: the tag is the class name, so a reader learns the type from the bytes alone. Decoding is
strict: an unknown tag, an unknown or missing field, or a field of the wrong type raises `msgspec.ValidationError`, and bytes
that are no msgpack at all raise `msgspec.DecodeError` (its base class).

Encoders and decoders are shared and may be used from any thread.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from etha_ray.decoding import Decoder

HIGHEST_VERSION = (1 << 63) - 1
"""The highest version that a batch can have; 1 is the first."""

Version: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=HIGHEST_VERSION)]


Name = Annotated[str, msgspec.Meta(max_length=200)]
"""What clients make up themselves, and agents have in the keys of LMDB, which end at 511 bytes."""


class BaseCommand(msgspec.Struct, tag=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What every command carries; all of it is optional, and given by keyword.

    timestamp: seconds since the epoch at which the sender made the command.
    semaphore_name: POSIX semaphore to post once the outcome can be read; None if nobody waits.
    command_id: the sender's number for this command; its outcome repeats it.
    client_id: who sent it.
    timeout: seconds the sender is ready to wait for the outcome; None means no limit.
    """

    timestamp: float | None = None
    semaphore_name: Name | None = None
    command_id: int = 0
    client_id: Name = ""
    timeout: float | None = None


class RegisteredTensor(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What `RegisterTensors` carries of one tensor.

    handle: `etha_ray.memory.encode_handle` of this worker's local tensor. global_shape: known for a DTensor and an explicit
    piece, else None. offsets: where an explicit piece begins in the global tensor, None for what the pair's layout places.
    lossy: whether a cast into this tensor may lose what values are (`etha_ray.dtypes.cast_loss`).
    """

    handle: bytes
    global_shape: tuple[int, ...] | None = None
    offsets: tuple[int, ...] | None = None
    lossy: bool = False

    def encode(self) -> bytes:
        """As it stands in `RegisterTensors.tensors`."""
        return _encoder.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> RegisteredTensor:
        """Back from `encode`; raises `msgspec.DecodeError`."""
        return _registered_decoder.decode(data)


class Transfer(BaseCommand):
    """Run this side ("send" or "recv") of a registered batch.

    version: what a sender calls what it sends; None to count on. atomic: a receiver's tensors hold what they held until all is there.
    mark: what the worker's GPU has to come to before its tensors are read or written (`etha_ray.cuda.marks`); empty without one.
    """

    batch_id: str
    transfer_type: Literal["send", "recv"]
    version: Version | None = None
    atomic: bool = False
    mark: Annotated[bytes, msgspec.Meta(max_length=64)] = b""


class RegisterTensors(BaseCommand):
    """Make a batch out of tensors that the agent may read or write in place.

    tensors: (pair name, `RegisteredTensor.encode()`) each; no tensor bytes.
    bucket_size: bytes per bucket for transports that stage, or None for the agent's default.
    """

    batch_id: str
    tensors: list[tuple[str, bytes]]
    bucket_size: int | None = None


class InitPair(BaseCommand):
    """Join a pair of peers as one worker of the local peer.

    expected_world_size: number of workers of the local peer.
    mesh_shape_payload, placements_payload, coordinate_payload: msgpack of the mesh's sizes, of one placement token per mesh
    dimension (`etha_ray.layout.placement_tokens`), and of this worker's coordinate; None without a mesh.
    """

    pair_name: str
    local_name: str
    expected_world_size: int
    remote_name: str
    mesh_shape_payload: bytes | None = None
    placements_payload: bytes | None = None
    coordinate_payload: bytes | None = None


class Announce(BaseCommand):
    """Let the workers that read ``topic`` know ``data``, in ``slot``, for as long as this worker lives.

    body: what ``data`` refers to by its digest (`records.fingerprint`): stored once, however many workers announce the same.
    """

    topic: str
    slot: str
    data: bytes
    body: bytes = b""


class Withdraw(BaseCommand):
    """Take back what this worker announced in ``slot`` of ``topic``."""

    topic: str
    slot: str


class ReadNotices(BaseCommand):
    """Ask for what living workers have announced under ``topic``: ``data`` by slot."""

    topic: str


class ReadBody(BaseCommand):
    """Ask for the body with this digest, that of an `Announce`."""

    digest: str


class QueryStatus(BaseCommand):
    """Ask for one named state of a batch."""

    batch_id: str
    state_name: str


class WaitVersion(BaseCommand):
    """Answer with the version of a batch once it is ``version`` or a later one."""

    batch_id: str
    version: Version


class ReadyReplicas(BaseCommand):
    """Answer with the `etha_ray.replica.Replica`s of a pair that hold a version, of one batch or of all that they received."""

    pair_name: str
    version: Version
    batch_id: str | None = None


class MakeDigest(BaseCommand):
    """Answer with the digests of a batch's tensors, in order, once all ranks of the side have asked; see `digesting`."""

    batch_id: str


class WaitReady(BaseCommand):
    """Answer once all members of a batch are there."""

    batch_id: str


class CleanupBatch(BaseCommand):
    """Close a batch and drop what the agent holds for it."""

    batch_id: str


class CancelTransfer(BaseCommand):
    """Stop the command of this batch, a transfer or a wait for a version, that had this command's number."""

    batch_id: str


class Hello(BaseCommand):
    """A client introduces itself, so that the agent notices its death.

    start_time: `processes.process_start_time` of ``pid``, which tells it from a later process with the same pid.
    pid_namespace: `processes.pid_namespace` of the client; a pid means nothing outside its namespace.
    """

    pid: int
    start_time: float
    pid_namespace: int


class Goodbye(BaseCommand):
    """A client leaves; the agent drops everything it holds for it."""


class Ping(BaseCommand):
    """Do nothing, and answer."""


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
    upto: dict[str, int] = {}


class RelayRead(BaseCommand):
    """Receiver to receiver: the target has read from the relay, or will not; did what it read stand?"""

    batch_id: str
    relay: str
    target: str
    question: int


class DigestPart(BaseCommand):
    """Rank to rank of one side: what ``source`` added up for the digests of this round, by pair; empty if it takes that back.

    number: of the round, within the registrations. parts: see `digests.Sums`, for each tensor of the pair in order.
    """

    batch_id: str
    source: str
    target: str
    number: int
    parts: dict[str, bytes]


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


class Ok(msgspec.Struct, tag=True, omit_defaults=True, forbid_unknown_fields=True):
    """A command succeeded. ``value`` is made of what msgpack has: None, bool, numbers, str, bytes, lists, dicts."""

    value: Any = None
    command_id: int = 0


class Failed(msgspec.Struct, tag=True, omit_defaults=True, forbid_unknown_fields=True):
    """A command failed. ``kind`` names the error class, for `etha_ray.errors.error_class`."""

    kind: str
    message: str
    traceback: str = ""
    command_id: int = 0


Outcome: TypeAlias = Ok | Failed

_encoder = msgspec.msgpack.Encoder()
_command_decoder: Decoder[Message] = Decoder(Message)
_registered_decoder: Decoder[RegisteredTensor] = Decoder(RegisteredTensor)
_outcome_decoder: Decoder[Outcome] = Decoder(Outcome)


def encode_command(command: Message) -> bytes:
    """The command as msgpack. Field types are checked by the decoder, not here."""
    return _encoder.encode(command)


def decode_command(data: bytes | bytearray | memoryview) -> Message:
    """The command in ``data``; raises `msgspec.DecodeError` (`msgspec.ValidationError` for a wrong tag or field)."""
    return _command_decoder.decode(data)


def encode_outcome(outcome: Outcome) -> bytes:
    """The outcome as msgpack. Raises TypeError or OverflowError if ``Ok.value`` holds something msgpack does not have."""
    return _encoder.encode(outcome)


def decode_outcome(data: bytes | bytearray | memoryview) -> Outcome:
    """The outcome in ``data``; raises `msgspec.DecodeError` (`msgspec.ValidationError` for a wrong tag or field)."""
    return _outcome_decoder.decode(data)
