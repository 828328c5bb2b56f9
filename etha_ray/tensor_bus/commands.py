"""The commands of clients to their agent, and the outcomes that come back. What agents say to one another, and how all of it is put
into bytes, is in `messages`."""

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

    blocking: its worker waits for it until ``timeout`` and a while longer, and removes its semaphore when it gives up.
    version: what a sender calls what it sends; None to count on. atomic: a receiver's tensors hold what they held until all is there.
    mark: what the worker's GPU has to come to before its tensors are read or written (`etha_ray.cuda.marks`); empty without one.
    """

    batch_id: str
    transfer_type: Literal["send", "recv"]
    version: Version | None = None
    atomic: bool = False
    blocking: bool = False
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


class HurryTransfer(BaseCommand):
    """Have the transfer of this batch that is under way end as one whose time is up.

    only_if_lost: only one that waits for members that are gone, as they are gone for good.
    """

    batch_id: str
    only_if_lost: bool = False


class Hello(BaseCommand):
    """A client introduces itself, so that the agent notices its death.

    start_time: `processes.process_start_time` of ``pid``, which tells it from a later process with the same pid.
    pid_namespace: `processes.pid_namespace` of the client; a pid means nothing outside its namespace.
    """

    pid: int
    start_time: float
    pid_namespace: int


class Goodbye(BaseCommand):
    """A client leaves, ``because`` it lost somebody if it says so; the agent drops everything it holds for it."""

    because: str = ""


class Ping(BaseCommand):
    """Do nothing, and answer."""


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
_registered_decoder: Decoder[RegisteredTensor] = Decoder(RegisteredTensor)
_outcome_decoder: Decoder[Outcome] = Decoder(Outcome)


def encode_outcome(outcome: Outcome) -> bytes:
    """The outcome as msgpack. Raises TypeError or OverflowError if ``Ok.value`` holds something msgpack does not have."""
    return _encoder.encode(outcome)


def decode_outcome(data: bytes | bytearray | memoryview) -> Outcome:
    """The outcome in ``data``; raises `msgspec.DecodeError` (`msgspec.ValidationError` for a wrong tag or field)."""
    return _outcome_decoder.decode(data)
