"""What agents publish in the kvstore and in their state files: plain structs, encoded with msgspec.

The kvstore holds these for rendezvous, under ``{namespace}/tensorbus/``:

===========================================  =======================================================================
``agent/{rank}``                             `AgentRecord` of the agent that serves this rank, under a lease of its
``secret``                                   what agents of this pool prove to one another across hosts
``pair/{pair}/{peer}/{slot}``                `MemberRecord` of one worker on one side of a pair
``batch/{batch}/{pair}/{peer}/{attempt}``    `BatchRecord` of one worker's registration
``manifest/{digest}``                        `Manifest`, `Differences`, `PlanInputs`, or the body of notices, once however many share it
``replica/{pair}/{peer}/{batch}/{index}``    `ReplicaRecord`: which version one worker has received
``notice/{topic}/{slot}``                    `NoticeRecord`: what one worker lets others know before they are a pair
``verdict/{attempt or registration}``        `Verdict`: why it cannot be matched; its addressee removes it
===========================================  =======================================================================
"""

from __future__ import annotations

import hashlib
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec

from etha_ray.decoding import Decoder
from etha_ray.errors import StoreError

T = TypeVar("T")

AGENTS = "agent/"
"""What the keys of all agents' records begin with."""

MANIFESTS = "manifest/"
"""What the keys of all descriptions begin with."""

VERDICTS = "verdict/"
"""What the keys of all verdicts begin with."""

SECRET_KEY = "secret"
"""Where the pool's secret is."""


class AgentRecord(msgspec.Struct, frozen=True):
    """Who an agent is and where it can be reached on its host.

    ``incarnation`` differs after each start. ``host`` groups agents that may share memory; ``nonce_path`` and ``nonce`` let
    another agent check that they really do. ``address`` is where agents of other hosts connect to; empty if they cannot.
    ``restarts``: somebody starts it again if it dies. ``gpu`` is the UUID of its GPU; empty if it has none, or cannot use the one
    that ``device`` is, and ``trouble`` says why.
    """

    rank: int
    incarnation: str
    pid: int
    start_time: float
    hostname: str
    host: str
    nonce_path: str
    nonce: str
    command_queue_path: str
    state_path: str
    device: str
    address: str = ""
    restarts: bool = False
    gpu: str = ""
    trouble: str = ""


class MemberRecord(msgspec.Struct, frozen=True):
    """One worker's place on its side of a pair.

    ``attempt`` differs for each init_pair; a refusal is addressed to it. ``layout`` is `Layout.encode()`, None when the
    worker gave no mesh.
    """

    attempt: str
    peer: str
    remote: str
    world_size: int
    layout: str | None
    index: int | None
    client_id: str
    worker_pid: int
    worker_start_time: float
    agent: AgentRecord


class NoticeRecord(msgspec.Struct, frozen=True):
    """What one worker announced. ``attempt`` differs for each announcement."""

    attempt: str
    client_id: str
    worker_pid: int
    worker_start_time: float
    agent: AgentRecord
    data: bytes


class ReplicaRecord(msgspec.Struct, frozen=True):
    """Which version one worker's tensors of a batch hold, received. ``index`` of ``size``: its place on its side of the pair."""

    member: MemberRecord
    index: int
    size: int
    version: int


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """A registered tensor as others need to know it.

    ``local`` is this rank's own shape, None for a DTensor, whose layout gives it. ``whole`` is the global shape where it is
    stated: by a DTensor, or by an explicit piece, which also has its ``offsets`` there. ``lossy``: whether a cast into it may
    lose what values are.
    """

    dtype: str
    local: tuple[int, ...] | None = None
    whole: tuple[int, ...] | None = None
    offsets: tuple[int, ...] | None = None
    lossy: bool = False


class Manifest(msgspec.Struct, frozen=True):
    """The tensors that one worker registered for one pair in one batch, in order."""

    tensors: tuple[TensorSpec, ...]


class Differences(msgspec.Struct, frozen=True):
    """A manifest said by where it differs from another one of as many tensors: those at these positions."""

    tensors: dict[int, TensorSpec]


class PlanInputs(msgspec.Struct, frozen=True):
    """What one member made its plan from, as text: of the planner itself and both sides, and of each tensor."""

    common: tuple[str, ...]
    tensors: tuple[str, ...]


class Standing(msgspec.Struct, frozen=True, omit_defaults=True):
    """The versions that a member knows when it registers a batch again.

    ``last`` is that of its last transfer that completed, ``used`` the highest number it has sent under, ``pending`` that of a send
    which was announced to members that were lost since, and is announced again to those in their place.
    """

    last: int = 0
    used: int = 0
    pending: int = 0


class BatchRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One worker's registration of a batch for one pair.

    ``attempt`` is that of the worker's `MemberRecord`. ``manifest`` is the digest of this worker's manifest. Where to read it:
    under ``base`` with ``differences`` applied, if there are any; while ``base`` is empty it is known only where it equals
    that of the side's first member.

    ``agreed`` is the digest of all members' registrations and manifests, ``plan`` that of what the plan was made from; both
    are empty until this member has made its plan. Members go on only once all of them have published the same.

    ``standing`` is what this member did with the batch before it registered again, if it did anything.
    """

    registration: str
    attempt: str
    manifest: str
    base: str = ""
    differences: str = ""
    agreed: str = ""
    plan: str = ""
    standing: Standing | None = None


class Verdict(msgspec.Struct, frozen=True):
    """Why an init_pair or a registration was refused: an error's class name and message, and who knows it."""

    kind: str
    message: str
    told: tuple[str, ...] = ()


# Made here, by the thread that imports: msgspec builds what it knows of a type when it first meets it, and crashes where two
# threads do that at once.
_decoders: dict[type[Any], Decoder[Any]] = {
    kind: Decoder(kind)
    for kind in (AgentRecord, MemberRecord, NoticeRecord, ReplicaRecord, Manifest, Differences, PlanInputs, BatchRecord, Verdict)
}


def encode(record: msgspec.Struct) -> bytes:
    """The bytes stored for ``record``."""
    return msgspec.msgpack.encode(record)


def decode(data: bytes, kind: type[T], key: str) -> T:
    """Decode what was stored under ``key``. Raises `StoreError` when it is not a ``kind``."""
    try:
        record: T = _decoders[kind].decode(data)
        return record
    except msgspec.DecodeError as error:
        raise StoreError(
            f"store key {key!r} does not hold a {kind.__name__} ({error}): another program, or another version of etha_ray,"
            " writes to this namespace; give each its own namespace"
        ) from error


def fingerprint(*parts: Any) -> str:
    """A short digest of ``parts`` (strings, bytes, numbers, None, tuples of these)."""
    return hashlib.sha256(msgspec.msgpack.encode(parts)).hexdigest()[:32]


def part(name: str) -> str:
    """``name`` as one part of a store key, whatever characters it has."""
    return quote(name, safe="")


def agent_key(rank: int) -> str:
    """Where an agent's record is."""
    return f"{AGENTS}{rank}"


def pair_prefix(pair: str, peer: str) -> str:
    """Where the members of one side of a pair are."""
    return f"pair/{part(pair)}/{part(peer)}/"


def batch_prefix(batch: str, pair: str, peer: str) -> str:
    """Where the registrations of one side of a batch are, for one pair."""
    return f"batch/{part(batch)}/{part(pair)}/{part(peer)}/"


def replica_prefix(pair: str) -> str:
    """Where it stands what members of a pair have received."""
    return f"replica/{part(pair)}/"


def replica_key(pair: str, peer: str, batch: str, index: int) -> str:
    """Where it stands what one member of a pair has received of a batch."""
    return f"{replica_prefix(pair)}{part(peer)}/{part(batch)}/{index:08d}"


def manifest_key(digest: str) -> str:
    """Where the manifest, the differences or the plan's inputs with this digest are."""
    return f"{MANIFESTS}{digest}"


def notice_prefix(topic: str) -> str:
    """Where the notices of one topic are."""
    return f"notice/{part(topic)}/"


def verdict_key(addressee: str) -> str:
    """Where the refusal of an attempt or registration is, if it was refused."""
    return f"{VERDICTS}{addressee}"
