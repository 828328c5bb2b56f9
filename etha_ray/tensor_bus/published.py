"""What one member lets the others know of its registration, and takes back: its records in the store, its memory on this host and beyond.

Who finds a record finds the memory that it speaks of, unless at the very moment of its being withdrawn: memory is shown before the
record is published, and taken back after it. Each record says three things, one after the other: what was registered; where that
differs from what the side's first member registered, once that one has spoken; what its member agreed to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import torch

from etha_ray.kvstore import KVStore
from etha_ray.layout import Layout
from etha_ray.memory import TensorHandle, encode_handle
from etha_ray.tensor_bus.commands import RegisteredTensor
from etha_ray.tensor_bus.manifests import Manifests, needs_saying
from etha_ray.tensor_bus.pair import Match
from etha_ray.tensor_bus.records import BatchRecord, Manifest, Standing, TensorSpec, batch_prefix, encode
from etha_ray.tensor_bus.registered import export_name
from etha_ray.tensor_bus.state_file import StateFile, handles_key
from etha_ray.transport.network import Export, NetworkTransport


@dataclass
class Published:
    """What ``registration`` has published, by pair. Used by one thread; `agreed` is for any.

    ``store`` and ``state`` are the agent's, ``network`` too if it has one; ``manifests`` are those that the registration knows.
    """

    store: KVStore
    state: StateFile
    network: NetworkTransport | None
    manifests: Manifests
    batch_id: str
    registration: str
    _keys: dict[str, str] = field(default_factory=dict)
    _records: dict[str, BatchRecord] = field(default_factory=dict)
    _exports: list[Export] = field(default_factory=list)

    def show(self, handles: Mapping[str, Sequence[TensorHandle]], tensors: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Let others read these tensors: by their handles where memory is shared, over the network elsewhere. Raises as `export`."""
        table = {name: [encode_handle(handle) for handle in given] for name, given in handles.items()}
        self.state.put(handles_key(self.registration), msgspec.msgpack.encode(table))
        if self.network is not None:
            for name, given in tensors.items():
                self._exports.append(self.network.export(export_name(self.registration, name), given))

    def publish(
        self,
        pair_name: str,
        match: Match,
        entries: Sequence[RegisteredTensor],
        tensors: Sequence[torch.Tensor],
        standing: Standing | None,
    ) -> None:
        """Say what was registered for a pair; ``standing``: what this worker did with the batch before."""
        member = match.local[match.index]
        layout = None if member.layout is None else Layout.decode(member.layout)
        specs = (_spec(entry, tensor, layout, match.index) for entry, tensor in zip(entries, tensors, strict=True))
        digest = self.manifests.add(Manifest(tuple(specs)))
        record = BatchRecord(self.registration, member.attempt, digest, standing=standing)
        if match.index == 0 or match.paired:
            record = self.manifests.say(record)
        self._keys[pair_name] = batch_prefix(self.batch_id, pair_name, member.peer) + member.attempt
        self._put(pair_name, record)

    def differ(self, pair_name: str, first: BatchRecord) -> bool:
        """Say what others cannot know, given the record of this side's first member; whether there was anything."""
        mine = self._records[pair_name]
        if not needs_saying(mine, first):
            return False
        self._put(pair_name, self.manifests.say_differences(mine, first))
        return True

    def agree(self, digests: Mapping[str, str], plans: Mapping[str, str]) -> None:
        """Say what this member agrees to, and by which plans; of pairs that are not there it takes back what it said."""
        for name, record in self._records.items():
            agreed, plan = digests.get(name, ""), plans.get(name, "")
            if (record.agreed, record.plan) != (agreed, plan):
                self._put(name, msgspec.structs.replace(record, agreed=agreed, plan=plan))

    def repeat(self, pair_name: str) -> None:
        """Publish what another member removed, which found this agent away from the store, and took it for dead."""
        self._put(pair_name, self._records[pair_name])

    @property
    def agreed(self) -> tuple[str, ...]:
        """What this member agreed to, by pair; empty of pairs that it has not come so far with. From any thread."""
        return tuple(record.agreed for record in list(self._records.values()))

    def withdraw(self) -> None:
        """Take everything back. May be called more than once, also where the store was away before."""
        try:
            for name in list(self._keys):
                self.store.delete(self._keys[name])
                del self._keys[name]  # not before: a store that is away is asked again
        finally:  # memory goes in any case
            self.state.delete([handles_key(self.registration)])
            for export in self._exports:
                export.close()

    def _put(self, pair_name: str, record: BatchRecord) -> None:
        self._records[pair_name] = record
        self.store.set_bytes(self._keys[pair_name], encode(record))


def _spec(entry: RegisteredTensor, tensor: torch.Tensor, layout: Layout | None, index: int) -> TensorSpec:
    local, whole = tuple(tensor.shape), entry.global_shape
    stated = whole if entry.offsets is None else None
    as_laid_out = layout is not None and stated is not None and layout.region(index, stated).shape == local
    return TensorSpec(
        dtype=str(tensor.dtype).removeprefix("torch."),
        local=None if as_laid_out else local,
        whole=whole,
        offsets=entry.offsets,
        lossy=entry.lossy,
    )
