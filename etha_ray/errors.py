"""Every error etha_ray raises, in one tree.

Each class also inherits the builtin a caller would catch without knowing etha_ray, so ``except TimeoutError`` or
``except ConnectionError`` work as they look. Messages name the thing, the cause and the remedy, in that order.

::

    EthaRayError
    ├── ConfigError                 ValueError        a setting or argument out of range
    ├── OptionalDependencyError     ImportError       an extra is not installed
    ├── LayoutError                 ValueError        mesh, placements and shape do not fit together
    │   └── TensorMismatchError     ValueError        the two sides disagree on a tensor's shape, dtype or count
    │       └── NamesMismatchError  ValueError        one side publishes names that the other does not pull, or the reverse
    ├── MemoryHandleError           RuntimeError
    │   ├── NotShareableError       ValueError        this tensor's memory cannot be shared
    │   ├── WrongDeviceError        ValueError        the tensor is on a device this agent does not have
    │   ├── SharedMemoryFullError   MemoryError       /dev/shm has no room for it
    │   └── HandleExpiredError      LookupError       the process that owned the memory is gone
    ├── PairError                   RuntimeError
    │   ├── UnknownPairError        LookupError       no init_pair for this name here
    │   ├── PairMismatchError       ValueError        the two sides describe the pair differently
    │   ├── CoordinateTakenError    ValueError        another worker already holds this mesh coordinate
    │   ├── PairTimeoutError        TimeoutError      the pair was not complete in time
    │   └── NoTransportError        ConnectionError   two agents of the pair have no way to reach one another
    ├── BatchError                  RuntimeError
    │   ├── UnknownBatchError       LookupError       no register_tensors for this id here
    │   ├── BatchExistsError        ValueError        this id is registered already
    │   ├── BatchClosedError        RuntimeError      closed here, or by the other side
    │   ├── BatchUnmatchedError     TimeoutError      registered on one side only
    │   └── BatchTornError          RuntimeError      a receive ended midway; the target holds mixed bytes
    ├── VersionError                RuntimeError
    │   ├── VersionMismatchError    ValueError        the senders of a batch do not send the same version
    │   └── VersionTimeoutError     TimeoutError      a version did not come in time
    ├── TransferError               RuntimeError
    │   ├── TransferInProgressError RuntimeError      this batch is already being transferred
    │   ├── TransferTimeoutError    TimeoutError      the other side did not arrive in time
    │   ├── TransferCancelledError  RuntimeError      closed or shut down while under way
    │   ├── IntegrityError          RuntimeError      what arrived is not what was sent
    │   ├── CommunicatorError       ConnectionError   NCCL failed between two agents that both live
    │   └── PeerLostError           ConnectionError   a process on the other side died
    ├── AgentError                  RuntimeError
    │   ├── AgentNotFoundError      ConnectionError   no agent answers at this path
    │   ├── AgentDiedError          ConnectionError   the agent died while a command was under way
    │   ├── AgentBusyError          ValueError        another live agent already serves this rank
    │   └── AgentFailedError        RuntimeError      the agent met an error it did not expect
    ├── QueueError                  RuntimeError
    │   ├── QueueFullError          RuntimeError      no room in the command queue
    │   ├── QueueHeldError          RuntimeError      a process is stopped in the midst of a write to it
    │   ├── QueueClosedError        RuntimeError      used after close
    │   └── UnsafePathError         PermissionError   the path belongs to someone else, or is a symlink
    └── StoreError                  RuntimeError
        ├── StoreUnavailableError   ConnectionError   the store cannot be reached
        ├── StoreTimeoutError       TimeoutError      a key did not appear in time
        ├── StoreClosedError        RuntimeError      used after close
        ├── LeaseExpiredError       RuntimeError      not renewed in time: its keys are gone
        └── ValueTooLargeError      ValueError        over the backend's limit
"""

from __future__ import annotations


class EthaRayError(Exception):
    """Base of every error etha_ray raises."""

    def __str__(self) -> str:
        # KeyError and LookupError print their argument's repr; a message with a remedy in it must stay readable.
        return self.args[0] if len(self.args) == 1 and isinstance(self.args[0], str) else super().__str__()


class ConfigError(EthaRayError, ValueError):
    """A setting or an argument is out of range."""


class OptionalDependencyError(EthaRayError, ImportError):
    """An optional package is missing; the message has the install line."""


class LayoutError(EthaRayError, ValueError):
    """A mesh, its placements and a shape do not fit together."""


class TensorMismatchError(LayoutError):
    """The two sides of a pair disagree on a tensor's shape, dtype, or on how many tensors there are."""


class NamesMismatchError(TensorMismatchError):
    """One side of a model has tensors by names that the other side has not; the message lists them for both sides."""


class MemoryHandleError(EthaRayError, RuntimeError):
    """A tensor's memory cannot be exported or opened."""


class NotShareableError(MemoryHandleError, ValueError):
    """This tensor has no memory that another process could open (sparse, meta, mapped from a file, ...)."""


class WrongDeviceError(MemoryHandleError, ValueError):
    """The tensor is on a device that this agent is not pinned to."""


class SharedMemoryFullError(MemoryHandleError, MemoryError):
    """/dev/shm has no room for the tensors."""


class HandleExpiredError(MemoryHandleError, LookupError):
    """The process that owned the memory is gone, or has freed it."""


class PairError(EthaRayError, RuntimeError):
    """A pair cannot be made or used."""


class UnknownPairError(PairError, LookupError):
    """No init_pair has been made for this name on this agent by this worker."""


class PairMismatchError(PairError, ValueError):
    """The members of a pair describe it differently (world size, mesh, placements, names)."""


class CoordinateTakenError(PairError, ValueError):
    """Another worker already holds this mesh coordinate in the pair."""


class PairTimeoutError(PairError, TimeoutError):
    """The pair was not complete in time; the message says who is missing."""


class NoTransportError(PairError, ConnectionError):
    """Two agents of the pair have no transport in common."""


class BatchError(EthaRayError, RuntimeError):
    """A batch cannot be made or used."""


class UnknownBatchError(BatchError, LookupError):
    """No register_tensors has been made for this batch id on this agent by this worker."""


class BatchExistsError(BatchError, ValueError):
    """This worker has registered this batch id already and not closed it."""


class BatchClosedError(BatchError):
    """The batch was closed, here or by the other side."""


class BatchUnmatchedError(BatchError, TimeoutError):
    """The batch is registered on one side only; the message says who is missing."""


class BatchTornError(BatchError):
    """A receive ended midway: the target holds bytes of two versions until the next receive completes."""


class VersionError(EthaRayError, RuntimeError):
    """The version of a batch is not what it should be."""


class VersionMismatchError(VersionError, ValueError):
    """The senders of a batch do not send the same version; nothing was received."""


class VersionTimeoutError(VersionError, TimeoutError):
    """A version did not come in time; the message says which one is there, and who has not sent."""


class TransferError(EthaRayError, RuntimeError):
    """A transfer did not complete."""


class TransferInProgressError(TransferError):
    """This batch is already being transferred by this worker."""


class TransferTimeoutError(TransferError, TimeoutError):
    """The other side did not arrive in time; the message says who is missing."""


class TransferCancelledError(TransferError):
    """The batch was closed or the agent shut down while the transfer was under way."""


class IntegrityError(TransferError):
    """What arrived is not what was sent; the message names the tensors and both ends.

    In place the tensors are torn then, as after `BatchTornError`; an atomic receive has left them alone.
    """


class CommunicatorError(TransferError, ConnectionError):
    """NCCL failed between two agents: the message names both, says it in NCCL's words, and what to look at."""


class PeerLostError(TransferError, ConnectionError):
    """A process on the other side died; the message says which."""


class AgentError(EthaRayError, RuntimeError):
    """The agent cannot be reached or failed."""


class AgentNotFoundError(AgentError, ConnectionError):
    """No agent answers at this path."""


class AgentDiedError(AgentError, ConnectionError):
    """The agent died, or stopped answering, while a command was under way."""


class AgentBusyError(AgentError, ValueError):
    """Another live agent already serves this rank and path."""


class AgentFailedError(AgentError):
    """The agent met an error it did not expect; the message carries its traceback."""


class QueueError(EthaRayError, RuntimeError):
    """The command queue cannot be used."""


class QueueFullError(QueueError):
    """The command queue has no room; raised when not blocking, or when the timeout is over."""


class QueueHeldError(QueueError):
    """A process that is stopped, or stuck, in the midst of a write to the queue holds up all who use it; the message says which."""


class QueueClosedError(QueueError):
    """The command queue was closed."""


class UnsafePathError(QueueError, PermissionError):
    """The path belongs to another user, is a symlink, or others may write to it."""


class StoreError(EthaRayError, RuntimeError):
    """The key-value store cannot be used."""


class StoreUnavailableError(StoreError, ConnectionError):
    """The store cannot be reached."""


class StoreTimeoutError(StoreError, TimeoutError):
    """What was waited for did not appear in the store in time."""


class StoreClosedError(StoreError):
    """The store was closed."""


class LeaseExpiredError(StoreError):
    """A lease was not renewed in time, or was closed: its keys are gone."""


class ValueTooLargeError(StoreError, ValueError):
    """The value is over what the backend takes; the message says the limit."""


def error_class(kind: str) -> type[EthaRayError]:
    """The class named ``kind`` in this module, or `AgentFailedError` if there is none.

    An agent answers a failed command with the class's name; the client raises the same class with this.
    """
    found = globals().get(kind)
    if isinstance(found, type) and issubclass(found, EthaRayError):
        return found
    return AgentFailedError
