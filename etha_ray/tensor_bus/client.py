"""The worker's side of the bus: hands commands to its agent and waits for their outcomes."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import threading
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import posix_ipc
import torch

from etha_ray.config import FAILURE_TIMEOUT, agent_paths, check_timeout, worker_environment
from etha_ray.errors import (
    BatchClosedError,
    BatchExistsError,
    ConfigError,
    EthaRayError,
    LayoutError,
    TransferTimeoutError,
    UnknownBatchError,
    UnknownPairError,
)
from etha_ray.layout import Layout, MeshSpec
from etha_ray.memory import ExportedTensors, encode_handle, export_tensors
from etha_ray.processes import pid_namespace, process_start_time
from etha_ray.tensor_bus.command_queue import CommandQueue
from etha_ray.tensor_bus.commands import (
    CancelTransfer,
    CleanupBatch,
    Goodbye,
    Hello,
    InitPair,
    Message,
    Ping,
    QueryStatus,
    RegisteredTensor,
    RegisterTensors,
    Transfer,
)
from etha_ray.tensor_bus.reply import OutcomeSemaphore, Reply, ReplyPool
from etha_ray.tensor_bus.semaphores import generate_semaphore_name
from etha_ray.tensor_bus.state_file import StateFile
from etha_ray.tensor_bus.tensors import describe, dtensor_layout, global_shape
from etha_ray.tensor_bus.watch import find_agent

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

__all__ = ["BatchHandler", "TensorBusClient", "generate_semaphore_name"]

_GRACE = 0.5
"""Seconds that a client waits beyond a command's own timeout, for the agent to say who was missing."""


class BatchHandler:
    """The tensors of one `TensorBusClient.register_tensors`, ready to be transferred any number of times.

    Holds its client by a weak reference. Not closed when it is dropped: the batch lives until `close`, or until its client
    is closed.
    """

    def __init__(self, client: TensorBusClient, batch_id: str, pair_names: list[str]) -> None:
        self._client_ref = weakref.ref(client)
        self.batch_id = batch_id
        self.pair_names = pair_names

    @property
    def client(self) -> TensorBusClient:
        """The client that made this handler. Raises RuntimeError once it is gone."""
        client = self._client_ref()
        if client is None:
            raise RuntimeError(
                f"the TensorBusClient of batch {self.batch_id!r} has been garbage collected: keep a reference to it as long"
                " as its batches are in use"
            )
        return client

    def wait_ready(self, timeout: float = 30.0) -> None:
        """Wait until the other side has registered this batch too; only needed after ``register_tensors(blocking=False)``.

        Raises what `TensorBusClient.register_tensors` raises.
        """
        self.client._wait_registered(self.batch_id, timeout)

    def transfer(self, transfer_type: Literal["send", "recv"], blocking: bool = False, timeout: float = 30.0) -> posix_ipc.Semaphore:
        """Transfer all tensors of this batch; see `TensorBusClient.transfer`."""
        return self.client.transfer(self.batch_id, transfer_type, blocking=blocking, timeout=timeout)

    def query_transfer_signal(self, blocking: bool = True, timeout: float = 30.0) -> bool:
        """Whether the sender's data is ready or sent and not yet received; see `TensorBusClient.query_transfer_signal`."""
        return self.client.query_transfer_signal(self.batch_id, blocking=blocking, timeout=timeout)

    def close(self, blocking: bool = True, timeout: float = 30.0) -> None:
        """Release the batch in the agent: a transfer under way is cancelled, the other side is told.

        May be called more than once. Raises TimeoutError if ``blocking`` and the agent does not answer in time.
        """
        self.client._close_batch(self.batch_id, blocking=blocking, timeout=timeout)

    def __repr__(self) -> str:
        client = self._client_ref()
        where = "client gone" if client is None else f"agent {client.agent_rank}"
        return f"BatchHandler({self.batch_id!r}, pairs={self.pair_names}, {where})"


class _Batch:
    """What the client keeps of a registered batch: the memory it exported, and the registration's reply until it is read."""

    def __init__(self, exported: ExportedTensors, registration: Reply) -> None:
        self.exported = exported
        self.registration: Reply | None = registration


class TensorBusClient:
    """A worker's connection to its agent.

    Several threads may use one client. After a fork the child must make its own.

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
        self._closed = True
        timeout = check_timeout(connection_timeout)
        environment, paths = worker_environment(), agent_paths(agent_rank)
        self.agent_rank = agent_rank
        self.agent_state_lmdb_path: str = agent_state_lmdb_path or environment.state_path or paths.state
        queue_path = lmdb_command_queue_path or environment.command_queue_path or paths.command_queue
        self.client_id = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._command_ids = itertools.count(1)
        self._batches: dict[str, _Batch] = {}
        self._pair_layouts: dict[str, Layout | None] = {}
        self._lock = threading.RLock()

        self._state, watch = find_agent(agent_rank, self.agent_state_lmdb_path, queue_path, timeout)
        self.state_env, self.state_db = self._state.env, self._state.db
        self.device = watch.record.device
        self.command_queue = CommandQueue(queue_path)
        self._pool = ReplyPool(self._state, watch)
        self._finalizer = weakref.finalize(self, _release, self._pool, self.command_queue, self._state)
        self._closed = False
        start_time = process_start_time(os.getpid()) or 0.0
        hello = Hello(pid=os.getpid(), start_time=start_time, pid_namespace=pid_namespace())
        self._call(hello, "hello", str(agent_rank), max(connection_timeout, FAILURE_TIMEOUT))

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
            placements: one ``Shard`` or ``Replicate`` per mesh dimension: how this side holds every tensor of the pair.
            blocking: wait until both sides are complete.
            timeout: seconds to wait.

        Raises:
            LayoutError: the placements do not fit the mesh, or one of the two is missing.
            CoordinateTakenError: another worker holds this mesh coordinate.
            PairMismatchError: workers of this pair describe it differently.
            PairTimeoutError: (a TimeoutError) not complete in time; says who is missing.
            AgentDiedError: (a ConnectionError) the agent died meanwhile.
        """
        check_timeout(timeout)
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
        self._pair_layouts[pair_name] = layout
        if blocking:
            self._call(command, "init_pair", pair_name, timeout)
        else:
            self._start(command, "init_pair", pair_name, None).abandon()

    def register_tensors(
        self,
        batch_id: str,
        tensors: list[tuple[torch.Tensor, str]],
        bucket_size: int | None = None,
        timeout: float = 30.0,
        blocking: bool = True,
    ) -> BatchHandler:
        """Register tensors to be transferred together, in the same order on both sides.

        Their storages are moved to shared memory in place: views, parameters and optimizers that share them stay valid. The
        agents exchange what they hold, compare their plans and open the memory, so that a transfer only moves bytes.

        Args:
            batch_id: the same on both sides.
            tensors: (tensor, pair name); a DTensor stands for its local shard.
            bucket_size: bytes per message on transports that stage; the shared-memory transport has no use for it.
            timeout: seconds to wait for the other side.
            blocking: wait until the other side has registered its part. With False (when one thread plays both sides)
                errors of the match are raised by `BatchHandler.wait_ready` and by transfers.

        Raises:
            UnknownPairError: no `init_pair` was made for a pair name.
            LayoutError, TensorMismatchError: (ValueErrors) a tensor does not fit its pair's layout, or the two sides disagree.
            NotShareableError, WrongDeviceError, SharedMemoryFullError: a tensor's memory cannot be shared with the agent.
            BatchExistsError: the id is in use by this worker.
            BatchUnmatchedError: (a TimeoutError) the other side did not register in time; says who is missing.
        """
        check_timeout(timeout)
        if not tensors:
            raise ConfigError(f"batch {batch_id!r}: the list of tensors is empty; give at least one (tensor, pair name)")
        if bucket_size is not None and bucket_size <= 0:
            raise ConfigError(f"batch {batch_id!r}: bucket_size {bucket_size} is not a positive number of bytes")
        with self._lock:
            if batch_id in self._batches:
                raise BatchExistsError(f"batch {batch_id!r} is registered already: close its handler first, or use another id")
            labels = [f"tensor {position} of batch {batch_id!r}" for position in range(len(tensors))]
            for label, (tensor, pair_name) in zip(labels, tensors, strict=True):
                self._check_dtensor(label, tensor, pair_name)
            exported = export_tensors([tensor for tensor, _ in tensors], labels=labels)
            entries = [
                (pair_name, RegisteredTensor(encode_handle(handle), global_shape(tensor)).encode())
                for (tensor, pair_name), handle in zip(tensors, exported.handles, strict=True)
            ]
            command = RegisterTensors(batch_id=batch_id, tensors=entries, bucket_size=bucket_size)
            reply = self._start(command, "register_tensors", batch_id, timeout if blocking else None)
            self._batches[batch_id] = _Batch(exported, reply)
        if blocking:
            self._wait_registered(batch_id, timeout)
        pair_names = list(dict.fromkeys(pair_name for _, pair_name in tensors))
        return BatchHandler(client=self, batch_id=batch_id, pair_names=pair_names)

    def transfer(
        self,
        batch_id: str,
        transfer_type: Literal["send", "recv"],
        blocking: bool = False,
        timeout: float = 30.0,
    ) -> posix_ipc.Semaphore:
        """Transfer all tensors of a batch; completes when both sides have called it and the bytes have moved.

        A "send" is over when every receiver has taken the data, and its tensors must not be written before; the tensors of
        a "recv" hold the new data when it is over.

        Args:
            batch_id: a registered batch.
            transfer_type: "send" or "recv".
            blocking: wait until it is over.
            timeout: with ``blocking``, seconds after which the transfer is cancelled. Without, the transfer waits for the
                other side as long as it takes; `OutcomeSemaphore.result` takes a timeout of its own.

        Returns:
            A ``posix_ipc.Semaphore``, posted when it is over; ``.result(timeout)`` gives the `TransferReport` or raises.

        Raises:
            UnknownBatchError: the batch is not registered by this client.
            TransferInProgressError: (raised when waited for) the batch is being transferred already.
            TransferTimeoutError: (a TimeoutError) the other side did not arrive; says who.
            PeerLostError: (a ConnectionError) a process on the other side died.
            BatchClosedError: closed here, or by the other side.
            AgentDiedError: (a ConnectionError) the agent died meanwhile.
        """
        check_timeout(timeout)
        if transfer_type not in ("send", "recv"):
            raise ConfigError(f'transfer type {transfer_type!r} is not known: give "send" or "recv"')
        self._known(batch_id)
        command = Transfer(batch_id=batch_id, transfer_type=transfer_type)
        reply = self._start(command, "transfer", batch_id, timeout if blocking else None)
        if blocking:
            self._finish(reply, timeout, cancel=CancelTransfer(batch_id=batch_id))
        return OutcomeSemaphore.of(reply)

    def query_transfer_signal(self, batch_id: str, blocking: bool = True, timeout: float = 30.0) -> bool:
        """Whether the sender's data for this batch is ready, or sent, and not yet received.

        True on a receiver once all its senders have called ``transfer("send")``, until it has received; True on a sender
        from its ``transfer("send")`` until every receiver has taken the data.

        Args:
            batch_id: a registered batch.
            blocking: wait for the agent's answer; without, the answer is that of the state at the last blocking query or
                transfer that this client made, False before.
            timeout: seconds to wait for the agent.

        Raises:
            UnknownBatchError: the batch is not registered by this client.
            TimeoutError, AgentDiedError: the agent does not answer.
        """
        check_timeout(timeout)
        self._known(batch_id)
        command = QueryStatus(batch_id=batch_id, state_name="transfer_signal")
        return bool(self._call(command, "query", batch_id, timeout if blocking else min(timeout, 1.0)))

    def ping(self, timeout: float = 30.0) -> None:
        """Make one round trip to the agent. Raises TimeoutError or AgentDiedError."""
        self._call(Ping(), "ping", "agent", timeout)

    def close(self) -> None:
        """Leave: batches are closed, the agent forgets this worker. May be called more than once."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            batches, self._batches = self._batches, {}
            # A dead or stuck agent has nothing left to forget; its successor starts without this worker.
            with contextlib.suppress(EthaRayError, TimeoutError):
                self._finish(self._start(Goodbye(), "goodbye", "agent", FAILURE_TIMEOUT, closing=True), FAILURE_TIMEOUT)
            for batch in batches.values():
                batch.exported.close()
            self._finalizer()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"batches={sorted(self._batches)}"
        return f"TensorBusClient(agent_rank={self.agent_rank}, {state})"

    # ----------------------------------------------------------------------------------------------- commands

    def _start(self, command: Message, command_type: str, context: str, timeout: float | None, *, closing: bool = False) -> Reply:
        if self._closed and not closing:
            raise BatchClosedError(f"the client of agent {self.agent_rank} is closed: make a new one")
        reply = self._pool.take(command_type, context, next(self._command_ids))
        command.semaphore_name = reply.name
        command.command_id = reply.command_id
        command.client_id = self.client_id
        command.timestamp = time.time()
        command.timeout = timeout
        try:
            self.command_queue.enqueue(command, timeout=timeout)
        except EthaRayError:
            reply.abandon()
            self._pool.watch.check()
            raise
        return reply

    def _finish(self, reply: Reply, timeout: float | None, *, cancel: CancelTransfer | None = None) -> Any:
        """Wait for a command that carries its own timeout: the agent answers it with who was missing, and a client that
        still hears nothing gives up by itself."""
        try:
            answered = reply.wait(None if timeout is None else timeout + _GRACE)
        except BaseException:
            self._give_up(reply, cancel)
            raise
        if not answered:
            self._give_up(reply, cancel)
            raise TransferTimeoutError(
                f"{reply.what}: agent {self.agent_rank} gave no answer within {timeout} s: it is overloaded or stuck"
            )
        return reply.value()

    def _give_up(self, reply: Reply, cancel: CancelTransfer | None) -> None:
        reply.abandon()
        if cancel is not None and not self._closed:
            cancel.client_id = self.client_id
            cancel.command_id = reply.command_id
            self.command_queue.enqueue(cancel, timeout=1.0)

    def _call(self, command: Message, command_type: str, context: str, timeout: float) -> Any:
        return self._finish(self._start(command, command_type, context, timeout), timeout)

    # ------------------------------------------------------------------------------------------------ batches

    def _wait_registered(self, batch_id: str, timeout: float) -> None:
        batch = self._known(batch_id)
        reply = batch.registration
        if reply is None:
            return
        try:
            self._finish(reply, timeout)
        except BaseException:
            with self._lock:
                dropped = self._batches.pop(batch_id, None)
            if dropped is not None:
                dropped.exported.close()
            raise
        batch.registration = None

    def _close_batch(self, batch_id: str, *, blocking: bool, timeout: float) -> None:
        check_timeout(timeout)
        with self._lock:
            batch = self._batches.pop(batch_id, None)
        if batch is None or self._closed:
            return
        if batch.registration is not None and not batch.registration.done:
            batch.registration.abandon()
        reply = self._start(CleanupBatch(batch_id=batch_id), "cleanup_batch", batch_id, timeout)
        if blocking:
            self._finish(reply, timeout)
        else:
            reply.abandon()
        batch.exported.close()

    def _known(self, batch_id: str) -> _Batch:
        if self._closed:
            raise BatchClosedError(f"batch {batch_id!r}: the client of agent {self.agent_rank} is closed: make a new one")
        batch = self._batches.get(batch_id)
        if batch is None:
            raise UnknownBatchError(
                f"batch {batch_id!r} is not registered here: it was never registered, or has been closed."
                f" Known batches: {sorted(self._batches) or 'none'}"
            )
        return batch

    def _check_dtensor(self, label: str, tensor: torch.Tensor, pair_name: str) -> None:
        if pair_name not in self._pair_layouts:
            known = sorted(self._pair_layouts) or "none"
            raise UnknownPairError(f"{label}: pair {pair_name!r} is not known here; call init_pair first. Known pairs: {known}")
        found = dtensor_layout(tensor)
        wanted = self._pair_layouts[pair_name]
        if found is None:
            return
        ndim = tensor.ndim
        if wanted is None or wanted.resolve(ndim) != found.resolve(ndim):
            described = "no mesh" if wanted is None else wanted.encode()
            raise LayoutError(
                f"{label} is a DTensor laid out as {found.encode()} with shape {tuple(tensor.shape)}, and pair {pair_name!r} was"
                f" initialised with {described}: redistribute the tensor, or register it on a pair of its own layout"
            )


def _release(pool: ReplyPool, queue: CommandQueue, state: StateFile) -> None:
    pool.close()
    queue.close(destroy=False)
    state.close()
