"""A whole model through the bus: `publish` on the side that has the weights, `pull` on the side that takes them.

How each side holds its tensors is read from DTensors, or said with ``placements=``; pairs and batches are made underneath.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from etha_ray.config import check_timeout
from etha_ray.errors import LayoutError
from etha_ray.layout import MeshSpec
from etha_ray.tensor_bus.client import TensorBusClient
from etha_ray.weights.layouts import PlacementsOf
from etha_ray.weights.member import Given, deadline_in
from etha_ray.weights.names import PRESETS, Rename, Source
from etha_ray.weights.publisher import Publisher
from etha_ray.weights.puller import Receiver
from etha_ray.weights.reports import PushReport

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["PRESETS", "Publisher", "PushReport", "Receiver", "publish", "pull"]


def publish(
    source: Source,
    name: str,
    *,
    rename: Rename = None,
    only: str | Iterable[str] | None = None,
    strict: bool = True,
    buffers: bool = False,
    placements: PlacementsOf = None,
    mesh: DeviceMesh | MeshSpec | None = None,
    world_size: int | None = None,
    rank: int | None = None,
    min_replicas: int = 1,
    client: TensorBusClient | None = None,
) -> Publisher:
    """Offer a model's weights to all who `pull` them by ``name``. Each rank of the sender calls it; it does not wait for anybody.

    The tensors are moved to shared memory in place; write to them in place from then on. Receivers join and leave at any time.

    Args:
        source: a module, whose parameters (tied ones once) are sent, or a dict of tensors by name.
        name: 1 to 64 letters, digits, '.', '_' or '-'.
        rename: how the module's own names become those that both sides use: a function from name to name, a dict of names or ends of
            names, or a preset, "llama" or "qwen". Where it gives several names, the tensor is a fused one, of these parts along
            dimension 0; the other side holds them one by one, and its sizes say where each lies. None leaves a tensor out.
        only: pattern or patterns, such as ``"*.lora_*"``, of the names that both sides use: nothing else crosses. Enough on one side.
        strict: with False, on either side, what only one side has stays where it is.
        buffers: a module's persistent buffers, too.
        placements: how plain tensors (no DTensors) lie in ``mesh``: one placement or a list of them for all, a dict of these by patterns
            of own names, in which ``*`` is any text and the first that fits a whole name counts, or a function of own name and tensor.
            A plain tensor without is whole on each rank that has it.
        mesh: a torch ``DeviceMesh`` or a `MeshSpec`; by default the ranks of this side in a row.
        world_size: how many ranks this side has. By default as the mesh says, or the DTensors' meshes, or torch.distributed if it is
            initialised, or WORLD_SIZE; else this process is alone.
        rank: which of them this is, with ``world_size``; by default found where that is, or RANK.
        min_replicas: how many receivers a push waits for, if fewer have joined; with 0 it does not fail if nobody gets it.
        client: of which agent; by default `bootstrap_client` finds it.

    Raises:
        ConfigError, LayoutError: (ValueErrors) names, ranks or placements do not fit together.
        CoordinateTakenError: (a ValueError) another process publishes as this rank, by this name.
        NotShareableError, WrongDeviceError, SharedMemoryFullError: a tensor's memory cannot be shared with the agent.
        ValueError, AgentNotFoundError: there is no agent for this process; see `bootstrap_client`.
    """
    given = Given(source, name, rename, only, strict, buffers, placements, mesh, world_size, rank, client)
    return Publisher(given, min_replicas)


def pull(
    source: Source,
    name: str,
    *,
    replica: str = "0",
    rename: Rename = None,
    only: str | Iterable[str] | None = None,
    strict: bool = True,
    buffers: bool = False,
    placements: PlacementsOf = None,
    mesh: DeviceMesh | MeshSpec | None = None,
    world_size: int | None = None,
    rank: int | None = None,
    client: TensorBusClient | None = None,
    blocking: bool = True,
    timeout: float | None = 300.0,
) -> Receiver:
    """Take the weights that are published as ``name`` into a model, in place, each time `Receiver.update` is called.

    Each rank of the receiver calls it. Most arguments are those of `publish`, said of this side.

    Args:
        source: the module, or dict of tensors by name, that the weights are written to.
        replica: tells receivers of one publisher apart; the same on all ranks of one receiver. Named like weights.
        rename: as in `publish`: ``{"qkv_proj.weight": ["q_proj.weight", "k_proj.weight", "v_proj.weight"]}`` fills the rows of this
            side's fused tensor; with ``placements=`` ``Shard(0)`` each rank's rows of q, k and v, as vLLM holds them.
        blocking: wait until all ranks of both sides are connected. Without (where one thread plays several ranks), `Receiver.update`
            waits, and raises what goes wrong.
        timeout: seconds for all of it; None for as long as it takes, and then 30 s for a store that is away.

    Raises:
        NamesMismatchError, TensorMismatchError: (ValueErrors) the sides do not hold the same; names are listed for both.
        BatchUnmatchedError: (a TimeoutError) not all ranks of both sides came in time; says who is missing.
        EthaRayError: what `publish` raises.
    """
    deadline = deadline_in(check_timeout(timeout)) if blocking else None
    receiver = Receiver(Given(source, name, rename, only, strict, buffers, placements, mesh, world_size, rank, client), replica, deadline)
    if blocking:
        try:
            receiver.connect(deadline, timeout)
        except LayoutError:
            receiver.let_see()
            receiver.close()
            raise
        except BaseException:
            receiver.close()
            raise
    return receiver
