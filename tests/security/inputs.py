"""Every place where bytes that another process wrote are read: a right value for it, and what reads it as the product does."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import msgspec

from etha_ray.config import AgentPaths
from etha_ray.kvstore import KVStore, MemoryStore, gcs
from etha_ray.kvstore.gcs import GcsStore
from etha_ray.kvstore.lease_records import _MARK, _Record
from etha_ray.layout import Layout
from etha_ray.memory.handles import SharedHandle, decode_handle, encode_handle
from etha_ray.net import channel, handshake
from etha_ray.net.connection import Connection, prefix
from etha_ray.tensor_bus import ray_lookup, ways
from etha_ray.tensor_bus.commands import Announce, Hello, InitPair, RegisteredTensor, RegisterTensors
from etha_ray.tensor_bus.history import PastTransfer, Totals
from etha_ray.tensor_bus.inspection import SeenAgent, decode_seen, encode_seen, inspect_agent
from etha_ray.tensor_bus.journal import JoinedPair, Journal
from etha_ray.tensor_bus.manifests import Manifests
from etha_ray.tensor_bus.members import gone_among, members_of, raise_if_refused, release
from etha_ray.tensor_bus.messages import decode_command, encode_command
from etha_ray.tensor_bus.network import _pool_secret
from etha_ray.tensor_bus.queue_entry import _AFTER_CHECKSUM, _CHECKSUM, pack_entry, unpack_entry
from etha_ray.tensor_bus.ray_lookup import PoolEntry, PoolSettings
from etha_ray.tensor_bus.records import (
    SECRET_KEY,
    AgentRecord,
    BatchRecord,
    Differences,
    Manifest,
    MemberRecord,
    NoticeRecord,
    PlanInputs,
    ReplicaRecord,
    Standing,
    TensorSpec,
    Verdict,
    agent_key,
    decode,
    encode,
    fingerprint,
    manifest_key,
    notice_prefix,
    pair_prefix,
    replica_key,
    replica_prefix,
    verdict_key,
)
from etha_ray.tensor_bus.snapshot import AgentStatus, BatchStatus, PairStatus, TransferStatus
from etha_ray.tensor_bus.state_file import HISTORY, JOURNAL, STATUS, StateFile, handles_key
from etha_ray.tensor_bus.versions import Holding
from etha_ray.tensor_bus.watch import find_agent
from etha_ray.transport.network import wire
from etha_ray.weights import tables
from tests.tensor_bus.test_commands import COMMANDS


@dataclass(frozen=True)
class Input:
    """One of them.

    Attributes:
        value: a right one.
        read: reads bytes as the product does; raises errors of etha_ray at most.
        says: what becomes of bytes that are none: "raises" an error of etha_ray, or "logs" a line. "nothing" where it is shown as not there
            (the state file of an agent of another version), or other tests look at what is said.
    """

    value: bytes
    read: Callable[[bytes], object]
    says: str = "raises"


AGENT = AgentRecord(
    rank=3,
    incarnation="i" * 32,
    pid=77,
    start_time=1.5,
    hostname="far",
    host="boot:1:2",
    nonce_path="/dev/shm/etha_ray.x",
    nonce="n" * 32,
    command_queue_path="/tmp/q.lmdb",
    state_path="/tmp/s.lmdb",
    device="cpu",
    address="10.0.0.1:80",
    restarts=True,
    gpu="GPU-1",
)
MEMBER = MemberRecord("attempt", "a", "b", 2, Layout.whole(2).encode(), 0, "77-c", 77, 1.5, AGENT)
BATCH = BatchRecord("registration", "attempt", "manifest", "base", "differences", "agreed", "plan", Standing(3, 4, 5))
TABLE = tables.Table((tables.Holding((0,), "2: S0"),), (tables.Entry(("w",), (), "float32", (4,), True, 0),), ("w",), True)
SPEC = TensorSpec("float32", (2, 3), (4, 3), (0, 0), True)


def entry_of(body: bytes, name: bytes, command_id: int) -> bytes:
    """As it would stand in the queue, its checksums right."""
    start = _AFTER_CHECKSUM.pack(zlib.crc32(body), command_id, len(name)) + name
    return _CHECKSUM.pack(zlib.crc32(start)) + start + body


@contextlib.contextmanager
def all_inputs(folder: Path) -> Iterator[dict[str, Input]]:
    """By name. Files are in ``folder``."""
    state = StateFile(str(folder / "state.lmdb"), create=True)
    with mock.patch.object(gcs, "in_local_mode", return_value=True):
        try:
            yield {**_queue(), **_store(MemoryStore()), **_leases(), **_pool(), **_state_file(state), **_network(), **_tensors()}
        finally:
            state.close(destroy=True)


def _queue() -> dict[str, Input]:
    number = itertools.count()
    found = {
        f"queue: {type(command).__name__} {next(number)}": Input(
            encode_command(command), lambda data: unpack_entry(0, entry_of(data, b"/s", 1)), "nothing"
        )
        for command in COMMANDS
    }
    return {**found, "queue: entry": Input(pack_entry(COMMANDS[0]), lambda data: unpack_entry(0, data), "nothing")}


def _store(store: KVStore) -> dict[str, Input]:
    def at(key: str, value: msgspec.Struct, read: Callable[[], object]) -> Input:
        def put_and_read(data: bytes) -> object:
            store.set_bytes(key, data)
            try:
                return read()
            finally:
                store.delete_prefix("")

        return Input(encode(value), put_and_read)

    def records(prefix: str, kind: type[Any]) -> list[Any]:
        return [decode(value, kind, key) for key, value in store.list(prefix).items()]

    def secret(data: bytes) -> object:
        store.set_bytes(SECRET_KEY, data)
        try:
            return handshake.check_secret(_pool_secret(store))
        finally:
            store.delete_prefix("")

    notice = NoticeRecord("attempt", "77-c", 77, 1.5, AGENT, b"data")
    slot = notice_prefix("topic") + "slot"
    return {
        **_bodies(store),
        "store: AgentRecord": at(agent_key(3), AGENT, lambda: gone_among(store, [MEMBER])),
        "store: MemberRecord": at(pair_prefix("p", "a") + "0", MEMBER, lambda: members_of(store, "p", "a")),
        "store: MemberRecord, one's own place": at("place", MEMBER, lambda: release(store, "place", MEMBER)),
        "store: NoticeRecord": at(slot, notice, lambda: gone_among(store, records(notice_prefix("topic"), NoticeRecord))),
        "store: ReplicaRecord": at(
            replica_key("p", "a", "x", 0),
            ReplicaRecord(MEMBER, 0, 2, 5),
            lambda: gone_among(store, (record.member for record in records(replica_prefix("p"), ReplicaRecord))),
        ),
        "store: BatchRecord": at("batch/x/p/a/attempt", BATCH, lambda: records("batch/x/p/a/", BatchRecord)),
        "store: Verdict": at(verdict_key("attempt"), Verdict("PairError", "why", ("x",)), lambda: raise_if_refused(store, "attempt")),
        "store: secret": Input(bytes(handshake.SECRET_BYTES), secret, "nothing"),
        "store: weights' table": Input(msgspec.msgpack.encode(TABLE), lambda data: tables.decode_table(zlib.compress(data))),
        "store: weights' notice": Input(tables.encode_notice(tables.Notice("token", 2, "digest")), tables.decode_notice),
    }


def _bodies(store: KVStore) -> dict[str, Input]:
    """What is stored under its digest."""

    def by_digest(value: Manifest | Differences | PlanInputs) -> Input:
        def put_and_read(data: bytes) -> object:
            digest = fingerprint(data)
            store.set_bytes(manifest_key(digest), data)
            try:
                return Manifests(store).find(digest, type(value))
            finally:
                store.delete_prefix("")

        return Input(encode(value), put_and_read)

    def differing(data: bytes) -> object:
        """A manifest that is said by where it differs from another one."""
        base, digest = Manifest((SPEC, SPEC)), fingerprint(data)
        manifests = Manifests(store)
        first = manifests.say(BatchRecord("r", "a", manifests.add(base)))
        store.set_bytes(manifest_key(digest), data)
        try:
            return Manifests(store).read(BatchRecord("r", "a", "made", base=first.manifest, differences=digest))
        finally:
            store.delete_prefix("")

    return {
        "store: Manifest": by_digest(Manifest((SPEC, TensorSpec("int8", (3,))))),
        "store: Differences": by_digest(Differences({1: SPEC})),
        "store: Differences, applied": Input(encode(Differences({1: SPEC})), differing),
        "store: PlanInputs": by_digest(PlanInputs(("planner",), ("tensor",))),
    }


def _leases() -> dict[str, Input]:
    """A lease's record, in a backend that has none."""
    number = itertools.count()

    def read(data: bytes) -> object:
        store, lease = GcsStore(namespace=f"leases{next(number)}"), os.urandom(16)
        store._set(store._record_key(lease), data)
        store._set(store._full("x", None), _MARK + lease + b"value")
        try:
            return store.get("x"), store.list(), store.compare_and_set("x", b"value", b"other")
        finally:
            store.close()

    return {"store: a lease's record": Input(msgspec.msgpack.encode(_Record(5.0, 1e9)), read)}


def _pool() -> dict[str, Input]:
    """What is said of a pool in Ray's GCS."""
    entries, settings = [PoolEntry(0, "node", "cpu", "/q", "/s")], PoolSettings(True, "gcs://", 1 << 20, "auto", "auto", False)

    def reader(key: str, read: Callable[[str], object]) -> Callable[[bytes], object]:
        def put_and_read(data: bytes) -> object:
            with ray_lookup._opened("pool") as store:
                store.set_bytes(key, data)
            return read("pool")

        return put_and_read

    seen = SeenAgent(3, "running", 1.5, ("/q", "/s"), 0.5, AGENT, STATUS_VALUE, (PAST,))
    return {
        "GCS: pool": Input(
            msgspec.msgpack.encode(entries),
            reader(ray_lookup._TABLE, lambda pool: ray_lookup.pool_entries(pool, ray_lookup.stored_pool(pool)[0])),
        ),
        "GCS: settings": Input(
            msgspec.msgpack.encode(settings),
            reader(ray_lookup._SETTINGS, lambda pool: ray_lookup.pool_settings(pool, ray_lookup.stored_pool(pool)[1] or b"")),
        ),
        "Ray: what an agent shows": Input(encode_seen(seen), _bare(decode_seen), "nothing"),
    }


PAST = PastTransfer("x", "send", "77-c", 1e9, 0.5, None, "PeerLostError", "gone")
STATUS_VALUE = AgentStatus(
    AGENT,
    1e9,
    {"workers": 1},
    Totals(1, 2, 3, 4, 5, {"PairError": 1}),
    (77,),
    (PairStatus("p", "a", "b", "77-c", "matched", 0, "2: R"),),
    (BatchStatus("x", "77-c", "ready", 1, 2, "", TransferStatus("send", "announced", 1e9)),),
)


def _state_file(state: StateFile) -> dict[str, Input]:
    def at(key: bytes, value: bytes, read: Callable[[], object], says: str = "nothing") -> Input:
        def put_and_read(data: bytes) -> object:
            state.put(key, data)
            try:
                return read()
            finally:
                state.delete(list(state.under(b"")))

        return Input(value, put_and_read, says)

    def alive(read: Callable[[], object]) -> Callable[[], object]:
        def with_record() -> object:
            for key, value in ((b"agent:record", msgspec.msgpack.encode(AGENT)), (b"agent:heartbeat", b"1.5")):
                if state.get(key) is None:
                    state.put(key, value)
            return read()

        return with_record

    def find() -> object:
        with contextlib.closing(find_agent(3, state.path, "/tmp/q.lmdb", 0.0)[0]):
            return "found"

    def journal(kind: str, value: bytes) -> Input:
        def put_and_read(data: bytes) -> object:
            hello = {} if kind == "hello" else {JOURNAL + b"77-c:hello": encode_command(HELLO)}
            state.put_all({**hello, JOURNAL + b"77-c:" + kind.encode(): data})
            try:
                return Journal(state).clients()
            finally:
                state.delete(list(state.under(b"")))

        return Input(value, put_and_read, "logs")

    paths = AgentPaths(command_queue="/tmp/q.lmdb", state=state.path)
    handle = encode_handle(HANDLE)
    member = msgspec.structs.replace(MEMBER, agent=msgspec.structs.replace(AGENT, state_path=state.path))
    part = cast(Any, SimpleNamespace(batch_id="x", pair_name="p"))
    pair = JoinedPair(encode_command(InitPair("p", "a", 1, "b", client_id="77-c")), "00000000")
    return {
        "state: record": at(b"agent:record", msgspec.msgpack.encode(AGENT), alive(find)),
        "state: record, inspected": at(b"agent:record", msgspec.msgpack.encode(AGENT), lambda: inspect_agent(3, paths)),
        "state: heartbeat": at(b"agent:heartbeat", b"1700000000.5", alive(find)),
        "state: heartbeat, inspected": at(b"agent:heartbeat", b"1700000000.5", alive(lambda: inspect_agent(3, paths))),
        "state: claimed": at(b"agent:claimed", b"1700000000.5", state.claimed),
        "state: first": at(b"agent:first", b"12", state.first),
        "state: status": at(STATUS, msgspec.msgpack.encode(STATUS_VALUE), alive(lambda: inspect_agent(3, paths))),
        "state: history": at(HISTORY + b"0000", msgspec.msgpack.encode(PAST), alive(lambda: inspect_agent(3, paths))),
        "state: handles": at(
            handles_key("r"), msgspec.msgpack.encode({"p": [handle]}), lambda: ways._mapped(member, "r", part, [0], None), "raises"
        ),
        "state: what a batch holds": Input(Holding(1, 2, ("t",), (0,), "why").encode(), lambda data: Holding.decode(data, "x")),
        "state: journal of a client": journal("hello", encode_command(HELLO)),
        "state: journal of a pair": journal("pair", msgspec.msgpack.encode(pair)),
        "state: journal of a batch": journal("batch", encode_command(RegisterTensors("x", [("p", b"t")], client_id="77-c"))),
        "state: journal of a notice": journal("notice", encode_command(Announce("t", "s", b"d", client_id="77-c"))),
    }


HELLO = Hello(pid=77, start_time=1.5, pid_namespace=1, client_id="77-c")
REGISTERED = RegisteredTensor(b"h", (3, 4), (0, 0), True)
HANDLE = SharedHandle(77, 1.5, 0, 24, "float32", (2, 3), (3, 1), 0, "/proc/77/fd/3", 1, 2)


def _network() -> dict[str, Input]:
    nonce = bytes(32)

    def frame(decoder: Any) -> Callable[[bytes], object]:
        def send_and_receive(data: bytes) -> object:
            with _ends() as (far, near):
                data = data[:0xFFFF]  # longer ones have no frame
                far.sendall(prefix(data) + data)
                near.receive_within(30.0)
                return near.receive(decoder)

        return send_and_receive

    def header(value: msgspec.Struct, decoder: Any) -> Input:
        return Input(msgspec.msgpack.encode(value), frame(decoder))

    def message(value: bytes, decoder: Any) -> Input:
        return Input(value, _bare(decoder.decode), "nothing")

    return {
        "network: challenge": header(handshake.Challenge(3, nonce), handshake._challenges),
        "network: proof": header(handshake.Proof("messages", b"hello", nonce, nonce), handshake._proofs),
        "network: welcome": header(handshake.Welcome(nonce), handshake._answers),
        "network: refusal": header(handshake.Refused("why"), handshake._answers),
        "network: channel": header(channel._Message(), channel._decoder),
        "network: fetch": header(wire.Fetch(1, 2), wire.fetches),
        "network: data": header(wire.Data(8, 1), wire.answers),
        "network: no data": header(wire.Failed("PeerLostError", "why"), wire.answers),
        "network: release": message(wire.encode(wire.Release(1)), wire.from_reader),
        "network: rejected": message(wire.encode(wire.Rejected(1, "PeerLostError", "why")), wire.from_owner),
        "network: an agent's message": Input(encode_command(COMMANDS[-1]), _bare(decode_command), "nothing"),
    }


def _tensors() -> dict[str, Input]:
    return {
        "memory: handle": Input(encode_handle(HANDLE), decode_handle),
        "memory: registered tensor": Input(
            RegisteredTensor(b"h", (3, 4), (0, 0), True).encode(), _bare(RegisteredTensor.decode), "nothing"
        ),
    }


def _bare(decode: Callable[[bytes], object]) -> Callable[[bytes], object]:
    """Of a function that says that it raises `msgspec.DecodeError`; who calls it makes an error of etha_ray, or a line, of that."""

    def read(data: bytes) -> object:
        with contextlib.suppress(msgspec.DecodeError):
            return decode(data)
        return None

    return read


@contextlib.contextmanager
def _ends() -> Iterator[tuple[socket.socket, Connection]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        far = socket.create_connection(server.getsockname())
        near = Connection(server.accept()[0], "peer")
    try:
        yield far, near
    finally:
        far.close()
        near.close()
