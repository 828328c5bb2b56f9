"""What `register_tensors` hands out: the tensors of one batch, ready to be transferred."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Literal

import posix_ipc

from etha_ray.errors import EthaRayError
from etha_ray.tensor_bus.versions import Holding, check_version

if TYPE_CHECKING:
    from etha_ray.tensor_bus.client import TensorBusClient


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
        """Wait until all members of both sides are there: after ``register_tensors(blocking=False)``, and after one was lost.

        A batch that lost a member goes on by itself once that one, or another in its place, has registered it again; also with another
        number of ranks on the other side.

        Raises what `TensorBusClient.register_tensors` raises. After `BatchUnmatchedError` (a TimeoutError) the registration goes
        on: wait again, or close.
        """
        self.client._batches.wait_ready(self.batch_id, timeout)

    def transfer(
        self,
        transfer_type: Literal["send", "recv"],
        blocking: bool = False,
        timeout: float = 30.0,
        version: int | None = None,
        atomic: bool = False,
    ) -> posix_ipc.Semaphore:
        """Transfer all tensors of this batch; see `TensorBusClient.transfer`."""
        return self.client.transfer(self.batch_id, transfer_type, blocking=blocking, timeout=timeout, version=version, atomic=atomic)

    @property
    def version(self) -> int:
        """The version that this worker's tensors hold: that of the last transfer which completed here, "send" or "recv".

        0 until there was one since the batch was registered, while one is being received, and while the batch is `torn`. Asks nobody,
        so it is there even if the agent is not. Raises `UnknownBatchError` or `BatchClosedError` once this handler or its client is closed.
        """
        return self._holding().version

    @property
    def torn(self) -> tuple[int, ...]:
        """The positions, in `register_tensors`, of the tensors that may hold bytes of two versions; empty if all are whole.

        So it is while tensors are being received in place, and after a receive that ended midway, or whose agent was killed, until the
        next one that completes. Raises as `version`.
        """
        return self._holding().torn

    def wait_version(self, version: int, timeout: float | None = 30.0) -> int:
        """Wait until this worker's tensors hold ``version`` or a later one, and return which.

        For another thread than the one that transfers, say. ``timeout``: seconds; None for as long as it takes.

        Raises:
            VersionTimeoutError: (a TimeoutError) it did not come in time; says which version is there and who has not sent.
            PeerLostError, BatchClosedError: no version will come any more.
            AgentDiedError: (a ConnectionError) the agent died meanwhile.
        """
        return self.client._batches.wait_version(self.batch_id, check_version(version), timeout)

    def digest(self, timeout: float | None = 60.0) -> list[str]:
        """A digest of each tensor of the batch, in the order of `register_tensors`: of the global tensor, however ranks hold it.

        All ranks of this side call it, as they do a transfer, and get the same; the other side need not. Both sides can compare theirs
        after a transfer: digests are equal where dtype, shape and all bits are, so not where the transfer casts. Nobody may
        write the tensors meanwhile. No cryptographic hash; see `etha_ray.digests`.
        Where a side has no mesh, each rank's digests are of its own tensors. ``timeout``: seconds; None for as long as it takes.

        Raises:
            TransferTimeoutError: (a TimeoutError) a rank of this side did not call it in time; says which.
            LayoutError: (a ValueError) a tensor is Partial on this side, or its explicit pieces do not cover it.
            TransferInProgressError: tensors are being received, or a digest is being made.
            BatchUnmatchedError, PeerLostError, BatchClosedError: not all members are there (any more).
            AgentDiedError: (a ConnectionError) the agent died meanwhile.
        """
        return self.client._batches.digest(self.batch_id, timeout)

    def query_transfer_signal(self, blocking: bool = True, timeout: float = 30.0) -> bool:
        """Whether the sender's data is ready or sent and not yet received; see `TensorBusClient.query_transfer_signal`."""
        return self.client.query_transfer_signal(self.batch_id, blocking=blocking, timeout=timeout)

    def close(self, blocking: bool = True, timeout: float = 30.0) -> None:
        """Release the batch in the agent: a transfer under way is cancelled, the other side is told.

        May be called more than once; nothing is left to do once the agent is gone. Raises TimeoutError if ``blocking`` and the
        agent does not answer in time, and `AgentDiedError` if it stands still: the batch is closed here then, but one that was being
        received may still be written to. Raises RuntimeError if the client is gone.
        """
        self.client._batches.close(self.batch_id, blocking=blocking, timeout=timeout)

    def __repr__(self) -> str:
        client = self._client_ref()
        where = "client gone" if client is None else f"agent {client.agent_rank}"
        return f"BatchHandler({self.batch_id!r}, pairs={self.pair_names}, {where}, {self._shown()})"

    def _holding(self) -> Holding:
        return self.client._batches.holding(self.batch_id)

    def _shown(self) -> str:
        try:
            holding = self._holding()
        except (EthaRayError, RuntimeError):
            return "closed"
        if holding.torn:
            return f"torn: {holding.why}"
        return f"version {holding.version}" if holding.version else "version 0: nothing sent or received yet"
