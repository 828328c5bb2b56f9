"""The worker's side of the bus: hands commands to its agent and waits for their outcomes."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import msgspec
import posix_ipc
import torch

from etha_ray.config import FAILURE_TIMEOUT, agent_paths, check_timeout, worker_environment
from etha_ray.errors import (
    AgentDiedError,
    ConfigError,
    EthaRayError,
    UnknownPairError,
)
from etha_ray.layout import Layout, MeshSpec
from etha_ray.memory import ForAgent, encode_handle, export_tensors
from etha_ray.replica import Replica
from etha_ray.tensor_bus.batch_handler import BatchHandler
from etha_ray.tensor_bus.commands import (
    CancelTransfer,
    Goodbye,
    InitPair,
    Ping,
    QueryStatus,
    ReadyReplicas,
    RegisteredTensor,
    RegisterTensors,
    Transfer,
)
from etha_ray.tensor_bus.connection import Connection
from etha_ray.tensor_bus.own_batches import AT_ONCE, OwnBatches
from etha_ray.tensor_bus.reply import OutcomeSemaphore
from etha_ray.tensor_bus.semaphores import generate_semaphore_name
from etha_ray.tensor_bus.tensors import Piece, Registrable, check_label, describe, described
from etha_ray.tensor_bus.versions import check_version

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

logger = logging.getLogger(__name__)

_COPIED = 30.0
"""Seconds in which a copy that is under way when its client closes should be over."""

__all__ = ["BatchHandler", "TensorBusClient", "generate_semaphore_name"]


class TensorBusClient:
    """A worker's connection to its agent.

    Several threads may use one client. After a fork the child must make its own: using the parent's raises `QueueClosedError`.
    A client that is dropped without `close` leaves too.

    Args:
        agent_rank: the agent's rank.
        lmdb_command_queue_path: the agent's command queue. Default: TENSOR_BUS_COMMAND_QUEUE_PATH, else
            ``/tmp/agent_rank{N}_command.lmdb``.
        agent_state_lmdb_path: the agent's state file. Default: TENSOR_BUS_STATE_PATH, else
            ``/tmp/agent_rank{N}_state.lmdb``.
        connection_timeout: seconds to wait for the agent to answer.

    Raises:
        AgentNotFoundError: (a ConnectionError) no agent answers at these paths in time.
        ConfigError: (a ValueError) the rank or timeout is out of range.
        UnsafePathError: (a PermissionError) a path belongs to another user.
    """

    def __init__(
        self,
        agent_rank: int,
        lmdb_command_queue_path: str | None = None,
        agent_state_lmdb_path: str | None = None,
        connection_timeout: float = 30.0,
    ) -> None:
        timeout = check_timeout(connection_timeout)
        environment, paths = worker_environment(), agent_paths(agent_rank)
        self.agent_rank = agent_rank
        self.agent_state_lmdb_path: str = agent_state_lmdb_path or environment.state_path or paths.state
        queue_path = lmdb_command_queue_path or environment.command_queue_path or paths.command_queue
        self._pairs: dict[str, tuple[Layout | None, MeshSpec | None]] = {}

        self._connection = Connection(agent_rank, queue_path, self.agent_state_lmdb_path, timeout)
        self._batches = OwnBatches(self._connection)
        self.client_id = self._connection.client_id
        self.command_queue = self._connection.queue
        self.state_env, self.state_db = self._connection.state.env, self._connection.state.db
        record = self._connection.watch.record
        self.device, self.gpu = record.device, record.gpu
        self._finalizer = weakref.finalize(self, self._connection.leave)
        # A process that ends without `close` has not left by choice, and its agent will find it dead.
        self._finalizer.atexit = False
        weakref.finalize(self, self._connection.pool.close)

    # ------------------------------------------------------------------------------------------------- public

    def init_pair(
        self,
        pair_name: str,
        local_name: str,
        remote_name: str,
        expected_world_size: int,
        device_mesh: DeviceMesh | MeshSpec | None = None,
        placements: Sequence[Placement] | None = None,
        blocking: bool = True,
        timeout: float = 30.0,
    ) -> None:
        """Take this worker's place in a pair: two groups that will exchange tensors.

        Args:
            pair_name: names the pair on both sides.
            local_name: this worker's side, the other side's ``remote_name``.
            remote_name: the other side.
            expected_world_size: number of workers on this side.
            device_mesh: a torch ``DeviceMesh``, or a `MeshSpec` for workers without a process group. None on both sides
                pairs the ranks in order.
            placements: one per mesh dimension, ``Shard``, ``_StridedShard``, ``Replicate`` or ``Partial``: how this side holds
                every tensor of the pair but explicit pieces. A side with ``Partial`` can send only: its contributions are
                combined as DTensor would.
            blocking: wait until both sides are complete. Without, the agent waits as long as it takes, and `register_tensors`
                raises what goes wrong.
            timeout: seconds to wait.

        Raises:
            LayoutError: the placements do not fit the mesh, or one of the two is missing.
            CoordinateTakenError: another worker holds this mesh coordinate.
            PairMismatchError: workers of this pair describe it differently.
            PairTimeoutError: (a TimeoutError) not complete in time; says who is missing.
            AgentDiedError: (a ConnectionError) the agent died meanwhile.
        """
        check_timeout(timeout)
        for what, name in (("pair name", pair_name), ("local name", local_name), ("remote name", remote_name)):
            check_label(what, name)
        if local_name == remote_name:
            raise ConfigError(f"pair {pair_name!r}: both sides are called {local_name!r}: give each a name of its own")
        layout, spec = describe(pair_name, expected_world_size, device_mesh, placements)
        command = InitPair(
            pair_name=pair_name,
            local_name=local_name,
            remote_name=remote_name,
            expected_world_size=expected_world_size,
        )
        if layout is not None and spec is not None:
            command.mesh_shape_payload = msgspec.msgpack.encode(spec.shape)
            command.placements_payload = msgspec.msgpack.encode(layout.placements)
            command.coordinate_payload = msgspec.msgpack.encode(spec.coordinate)
        if blocking:
            self._connection.call(command, "init_pair", pair_name, timeout)
        else:
            self._connection.start(command, "init_pair", pair_name, None, timeout).abandon()
        self._pairs[pair_name] = layout, spec

    def register_tensors(
        self,
        batch_id: str,
        tensors: Sequence[tuple[Registrable, str]],
        bucket_size: int | None = None,
        timeout: float = 30.0,
        blocking: bool = True,
        allow_lossy: bool = False,
    ) -> BatchHandler:
        """Register tensors to be transferred together, in the same order on both sides.

        Their storages are moved to shared memory in place: views, parameters and optimizers that share them stay valid. The
        agents exchange what they hold, compare their plans and open the memory, so that a transfer only moves bytes.

        Args:
            batch_id: the same on both sides.
            tensors: (tensor, pair name). A DTensor stands for its local shard; a `Piece` says where it lies by itself. Views
                may be given, such as the rows of q, k and v in one fused weight.
            bucket_size: bytes per message on transports that stage; the shared-memory transport has no use for it.
            timeout: seconds to wait for the other side.
            blocking: wait until the other side has registered its part. With False (when one thread plays both sides)
                errors of the match are raised by `BatchHandler.wait_ready` and by transfers.
            allow_lossy: take into these tensors what their dtype cannot keep, such as floats into integers. Said by the side
                that receives, on all its ranks. Casts that round (float32 to bfloat16) need no permission; the table is in
                `etha_ray.dtypes`.

        The sides may hold a tensor in different dtypes: it is cast where it is written. A direction that is impossible (into a
        Partial, or a lossy cast that is not allowed) is refused when a transfer asks for it.

        Raises:
            UnknownPairError: no `init_pair` was made for a pair name.
            LayoutError, TensorMismatchError: (ValueErrors) a tensor does not fit its pair's layout, or the two sides disagree.
            NotShareableError, WrongDeviceError, SharedMemoryFullError: a tensor's memory cannot be shared with the agent.
            BatchExistsError: the id is in use by this worker.
            BatchUnmatchedError: (a TimeoutError) the other side did not register in time; says who is missing.
        """
        check_timeout(timeout)
        check_label("batch id", batch_id)
        if not tensors:
            raise ConfigError(f"batch {batch_id!r}: the list of tensors is empty; give at least one (tensor, pair name)")
        if bucket_size is not None and bucket_size <= 0:
            raise ConfigError(f"batch {batch_id!r}: bucket_size {bucket_size} is not a positive number of bytes")
        with self._batches.lock:
            self._batches.check_free(batch_id)
            labels = [f"tensor {position} of batch {batch_id!r}" for position in range(len(tensors))]
            parts = []
            for position, (label, entry) in enumerate(zip(labels, tensors, strict=True)):
                if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], torch.Tensor | Piece)):
                    raise ConfigError(
                        f"batch {batch_id!r}: entry {position} is a {type(entry).__name__}; give (tensor or Piece, pair name)"
                    )
                thing, pair_name = entry
                if pair_name not in self._pairs:
                    known = sorted(self._pairs) or "none"
                    raise UnknownPairError(f"{label}: pair {pair_name!r} is not known here; call init_pair first. Known pairs: {known}")
                parts.append(described(label, thing, pair_name, *self._pairs[pair_name]))
            exported = export_tensors([tensor for tensor, _, _ in parts], labels, self.for_agent)
            entries = [
                (pair_name, RegisteredTensor(encode_handle(handle), whole, offsets, allow_lossy).encode())
                for (_, pair_name), (_, whole, offsets), handle in zip(tensors, parts, exported.handles, strict=True)
            ]
            command = RegisterTensors(batch_id=batch_id, tensors=entries, bucket_size=bucket_size)
            reply = self._connection.start(command, "register_tensors", batch_id, timeout if blocking else None, timeout)
            self._batches.add(batch_id, exported, reply, timed=blocking)
        if blocking:
            self._batches.wait_registered(batch_id, timeout)
        pair_names = list(dict.fromkeys(pair_name for _, pair_name in tensors))
        return BatchHandler(client=self, batch_id=batch_id, pair_names=pair_names)

    def transfer(
        self,
        batch_id: str,
        transfer_type: Literal["send", "recv"],
        blocking: bool = False,
        timeout: float = 30.0,
        version: int | None = None,
        atomic: bool = False,
    ) -> posix_ipc.Semaphore:
        """Transfer all tensors of a batch; completes when both sides have called it and the bytes have moved.

        A "send" is over when every receiver has taken the data, and its tensors must not be written before; the tensors of
        a "recv" hold the new data when it is over. Of tensors on a GPU, what was launched on this thread's current stream before is
        done first, on either side, and this call does not wait for it.

        Args:
            batch_id: a registered batch.
            transfer_type: "send" or "recv".
            blocking: wait until it is over.
            timeout: with ``blocking``, seconds after which the transfer is cancelled. Without, the transfer waits for the
                other side as long as it takes; `OutcomeSemaphore.result` takes a timeout of its own.
            version: what this "send" is called, above all before it; the training step, say. All ranks of the side say the same, or
                none says any: then it is counted on, with a gap after a send that failed. One that failed under a version that was
                said here may be tried again under it. Ranks that only count and gave up different sends get one
                VersionMismatchError, and are together again with the next.
            atomic: for a "recv": read into memory of the agent first, and copy it from there once all of it is certain. Until then, and if
                the receive fails, the tensors hold what they held; who reads them during that copy may see some of each version. Takes
                as much memory again as the tensors do, until the batch is closed.

        Returns:
            A ``posix_ipc.Semaphore``, posted when it is over; ``.result(timeout)`` gives the `TransferReport` or raises.

        Raises:
            UnknownBatchError: the batch is not registered by this client.
            TransferInProgressError: (raised when waited for) the batch is being transferred already. What blocked and was
                given up (its time was up, Ctrl-C, its agent stood still) ends by this, or is waited for if it is in the midst of a copy.
            TransferTimeoutError: (a TimeoutError) the other side did not arrive; says who.
            PeerLostError: (a ConnectionError) a process on the other side died.
            LayoutError, TensorMismatchError: (ValueErrors) this side cannot send that way, or receive: a Partial, a lossy cast.
            ConfigError: (a ValueError) the version is not above the last one.
            VersionMismatchError: (a ValueError) the ranks of the sending side gave different versions; raised on both sides.
            BatchTornError: a receive ended midway, or what is to be sent without a version is torn; see `BatchHandler.torn`.
            BatchClosedError: closed here, or by the other side.
            AgentDiedError: (a ConnectionError) the agent died meanwhile.
        """
        check_timeout(timeout)
        if transfer_type not in ("send", "recv"):
            raise ConfigError(f'transfer type {transfer_type!r} is not known: give "send" or "recv"')
        if version is not None and transfer_type != "send":
            raise ConfigError(f'batch {batch_id!r}: version goes with "send": a "recv" gets the version that is sent')
        if atomic and transfer_type != "recv":
            raise ConfigError(f'batch {batch_id!r}: atomic goes with "recv": a "send" writes nothing')
        batch = self._batches.known(batch_id)
        self._batches.raise_if_failed(batch_id, timeout)
        command = Transfer(batch_id=batch_id, transfer_type=transfer_type, atomic=atomic, blocking=blocking)
        if batch.mark is not None:
            command.mark = batch.mark.set()
        if version is not None:
            command.version = check_version(version)
        reply = self._connection.prepare(command, "transfer", batch_id, timeout if blocking else None)
        semaphore = OutcomeSemaphore.of(reply)
        if transfer_type == "recv":
            batch.receive = reply
        if blocking:
            self._connection.exchange(reply, command, timeout, CancelTransfer(batch_id=batch_id))
            reply.value()
        else:
            self._connection.send(reply, command, timeout)
        return semaphore

    def query_transfer_signal(self, batch_id: str, blocking: bool = True, timeout: float = 30.0) -> bool:
        """Whether the sender's data for this batch is ready, or sent, and not yet received.

        True on a receiver once all its senders have called ``transfer("send")``, until it has received; True on a sender
        from its ``transfer("send")`` until every receiver has taken the data.

        Args:
            batch_id: a registered batch.
            blocking: wait ``timeout`` seconds for the agent's answer. Without, 0.1 s at most, and no answer counts as False.
            timeout: seconds to wait for the agent.

        Raises:
            UnknownBatchError: the batch is not registered by this client.
            TimeoutError, AgentDiedError: the agent does not answer.
        """
        check_timeout(timeout)
        self._batches.known(batch_id)
        command = QueryStatus(batch_id=batch_id, state_name="transfer_signal")
        if blocking:
            return bool(self._connection.call(command, "query", batch_id, timeout, bool))
        reply = self._connection.start(command, "query", batch_id, None, AT_ONCE)
        if reply.wait(AT_ONCE):
            return bool(reply.value(bool))
        reply.abandon()
        return False

    def ready_replicas(self, pair_name: str, version: int, batch_id: str | None = None, timeout: float = 30.0) -> list[Replica]:
        """Who holds a version of what was sent in a pair, for a router that must not ask an engine before it has its weights.

        Any client may ask that meets its agents in the same store; it need not be in the pair. Lists the members that have received
        ``version`` or a later one: of ``batch_id``, or of each batch of that pair of which they have received anything. Who sends is
        not listed. What is said here is a few hundredths of a second old: a member is taken off the list soon after its tensors begin
        to be written in place, or are torn, or its batch is closed, and one that died is not on it.

        Raises:
            ConfigError: (a ValueError) the version is no version.
            StoreError: the agent cannot read the store.
            TimeoutError, AgentDiedError: the agent does not answer.
        """
        check_timeout(timeout)
        command = ReadyReplicas(pair_name=pair_name, version=check_version(version), batch_id=batch_id)
        return list(self._connection.call(command, "ready_replicas", pair_name, timeout, list[Replica]))

    def ping(self, timeout: float = 30.0) -> None:
        """Make one round trip to the agent. Raises TimeoutError or AgentDiedError."""
        self._connection.call(Ping(), "ping", "agent", timeout)

    def close(self, because: str = "") -> None:
        """Leave: batches are closed, what is under way ends with `BatchClosedError` (with ``because``, `PeerLostError`), and the agent
        forgets this worker.

        May be called more than once, from any thread.

        Args:
            because: who is lost, where this worker leaves for that: other members get `PeerLostError` with these words, as they may
                hear of this before they hear who died.

        Raises, once all is closed here:
            AgentDiedError, TransferTimeoutError: a batch was being received, and the agent, which stands still or has not answered for
                30 s, may still write to its tensors. Where it is dead nothing is raised.
        """
        connection = self._connection
        with self._batches.lock:
            if connection.closed or os.getpid() != connection.pid:
                return
            connection.closed = True
            batches = self._batches.take_all()
            written = self._batches.being_written(batches)
            try:
                goodbye = connection.start(Goodbye(because=because), "goodbye", "agent", FAILURE_TIMEOUT, closing=True)
                connection.finish(goodbye, _COPIED if written else FAILURE_TIMEOUT)
            except AgentDiedError as error:
                connection.say_goodbye(because)  # again, to the next agent there: the dead one may have taken it, and not come to it
                self._batches.check_written(written, error)
            except (EthaRayError, TimeoutError) as error:  # a stuck agent finds it in its queue
                self._batches.check_written(written, error)
            finally:
                for batch in batches.values():
                    batch.exported.close()
                self._finalizer.detach()
                connection.release()

    def __repr__(self) -> str:
        state = "closed" if self._connection.closed else f"batches={self._batches.ids}"
        return f"TensorBusClient(agent_rank={self.agent_rank}, {state})"

    @property
    def for_agent(self) -> ForAgent:
        """Who opens this worker's memory, as `export_tensors` wants to know it."""
        record = self._connection.watch.record
        return ForAgent(record.device, record.gpu, record.trouble)

    @property
    def agent_pid(self) -> int:
        """Process id of the agent that serves now."""
        return self._connection.watch.record.pid
