"""By which way a member's tensors come here: mapped from this host's memory, or over the network.

The agent that receives chooses, for each agent that it reads from. ``"auto"`` maps what shares memory with it, and has the rest
brought over the network, by NCCL where both ends are on GPUs that have it, else by TCP. So is memory of this host that turns out
not to be mappable here: of a GPU that this agent's cannot reach, or in a container that hides it. The other choices force one way,
to measure it, or to test it on one host.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec

from etha_ray.decoding import Decoder
from etha_ray.errors import HandleExpiredError, MemoryHandleError, NoTransportError
from etha_ray.memory import OpenedTensors, decode_handle, open_tensors
from etha_ray.net import Address
from etha_ray.tensor_bus.executor import Part
from etha_ray.tensor_bus.host import no_address, shares_memory
from etha_ray.tensor_bus.records import AgentRecord, MemberRecord
from etha_ray.tensor_bus.state_file import StateFile, handles_key
from etha_ray.transport.base import OneSidedTransport
from etha_ray.transport.joint import Source
from etha_ray.transport.network import NetworkTransport, RemoteRegion

logger = logging.getLogger(__name__)

_tables: Decoder[dict[str, list[bytes]]] = Decoder(dict[str, list[bytes]])


@dataclass(frozen=True)
class Ways:
    """What moves bytes to the agent of this ``incarnation``: on this host, and between hosts if it has an address there.

    ``choice``: see `config.TRANSPORTS`. ``gpu``: which GPU of this process memory of GPUs is mapped for, if it has one.
    """

    incarnation: str
    mapped: OneSidedTransport
    network: NetworkTransport | None
    choice: str = "auto"
    gpu: int | None = None
    _unmapped: set[str] = field(default_factory=set)

    def afresh(self) -> Ways:
        """The same, for a registration of its own: what could not be mapped in another may be in this one."""
        return replace(self, _unmapped=set())

    def is_mapped(self, agent: AgentRecord) -> bool:
        """Whether what ``agent`` serves is mapped here; else it comes over the network, if it comes."""
        if agent.incarnation == self.incarnation:
            return True  # what both sides of a pair have at this agent is here, whatever was chosen
        return self.choice in ("auto", "mapped") and agent.incarnation not in self._unmapped and shares_memory(agent)

    def open(self, member: MemberRecord, registration: str, part: Part, positions: Sequence[int]) -> OpenedTensors | None:
        """The member's tensors, mapped; None if they are to come over the network.

        Raises:
            HandleExpiredError: it has closed the batch, or its memory is gone.
            MemoryHandleError: they cannot be mapped, and the network does not lead there, or is not to be used.
        """
        if not self.is_mapped(member.agent):
            return None
        try:
            return _mapped(member, registration, part, positions, self.gpu)
        except HandleExpiredError:
            raise
        except MemoryHandleError as error:
            if not self.can_reach(member.agent):
                raise
            logger.warning("what agent %d serves cannot be mapped, and comes over the network: %s", member.agent.rank, error)
            self._unmapped.add(member.agent.incarnation)
            return None

    def can_reach(self, agent: AgentRecord) -> bool:
        """Whether there is a network between this agent and ``agent``."""
        return self.choice != "mapped" and self.network is not None and bool(agent.address)

    def check_source(self, part: Part, member: MemberRecord) -> None:
        """Raise `NoTransportError` unless what the member sends can come over the network."""
        if self.can_reach(member.agent):
            return
        where, own = _where(part), part.match.local[part.match.index].agent
        if self.choice == "auto":
            raise NoTransportError(f"{where}: {no_address(own, member.agent)}")
        if self.choice == "mapped":
            cause = f"agent {member.agent.rank} ({member.agent.hostname}) shares no memory with it"
        else:
            silent = own if self.network is None else member.agent
            cause = f"agent {silent.rank} ({silent.hostname}) listens on no address (--host, or TensorBusAgent(..., host=...))"
        raise NoTransportError(f"{where}: agent {own.rank} was started with transport={self.choice!r}, and {cause}: start it with 'auto'")

    def check_target(self, part: Part, member: MemberRecord) -> None:
        """Raise `NoTransportError` unless the member's agent can come by what this one sends; by which way is its own choice."""
        if not shares_memory(member.agent) and (self.network is None or not member.agent.address):
            own = part.match.local[part.match.index].agent
            raise NoTransportError(f"{_where(part)}: {no_address(own, member.agent)}")

    def regions(self, member: MemberRecord, export: str, part: Part, positions: Sequence[int], *, local: bool = False) -> list[Source]:
        """The member's tensors, to be read over the network; ``local``: it is of this side. Only boxes of them are read, each with a
        place and size of its own."""
        address = Address.parse(member.agent.address)
        held = [part.agreed[position].local if local else part.agreed[position].remote for position in positions]
        return [RemoteRegion(address, export, position, (), (), each.dtype) for position, each in zip(positions, held, strict=True)]


def _where(part: Part) -> str:
    return f"batch {part.batch_id!r}, pair {part.pair_name!r}"


def _mapped(member: MemberRecord, registration: str, part: Part, positions: Sequence[int], gpu: int | None) -> OpenedTensors:
    """Its agent's state file has their handles."""
    try:
        state = StateFile(member.agent.state_path)
    except FileNotFoundError:
        data = None
    else:
        try:
            data = state.get(handles_key(registration))
        finally:
            state.close()
    if data is None:
        raise HandleExpiredError(
            f"batch {part.batch_id!r}: agent {member.agent.rank} has no handles of {member.peer!r} (pid {member.worker_pid})"
            " any more: that side has closed the batch; register it again on both sides"
        )
    try:
        table = _tables.decode(data)[part.pair_name]
        handles = [decode_handle(table[position]) for position in positions]
    except (msgspec.DecodeError, KeyError, IndexError) as error:
        raise MemoryHandleError(
            f"batch {part.batch_id!r}: agent {member.agent.rank} does not say where the tensors of {member.peer!r} are ({error!r}):"
            " another program, or another version of etha_ray, writes to its state file"
        ) from error
    labels = [f"tensor {position} of batch {part.batch_id!r} from {member.peer!r}" for position in positions]
    return open_tensors(handles, labels=labels, gpu=gpu)
