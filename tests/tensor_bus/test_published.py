"""What a registration has published of itself: what others find of it, and what is left of it where taking it back is disturbed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from etha_ray.errors import NotShareableError, StoreUnavailableError
from etha_ray.kvstore import MemoryStore
from etha_ray.memory import export_tensors
from etha_ray.tensor_bus.commands import RegisteredTensor
from etha_ray.tensor_bus.manifests import Manifests
from etha_ray.tensor_bus.pair import Match
from etha_ray.tensor_bus.published import Published
from etha_ray.tensor_bus.records import AgentRecord, BatchRecord, MemberRecord, Standing, TensorSpec, batch_prefix, decode
from etha_ray.tensor_bus.state_file import StateFile, handles_key


class Store(MemoryStore):
    away = False

    def delete(self, key: str, *, component: str | None = None) -> bool:
        if self.away:
            raise StoreUnavailableError("it is away")
        return super().delete(key, component=component)


class Network:
    """Keeps what is exported; takes only float32."""

    def __init__(self) -> None:
        self.exported: dict[str, Sequence[torch.Tensor]] = {}

    def export(self, name: str, tensors: Sequence[torch.Tensor]) -> Any:
        if any(tensor.dtype != torch.float32 for tensor in tensors):
            raise NotShareableError("not this one")
        self.exported[name] = tensors
        return _Export(self, name)


class _Export:
    def __init__(self, network: Network, name: str) -> None:
        self._network, self._name = network, name

    def close(self) -> None:
        self._network.exported.pop(self._name, None)


class Member:
    """Rank ``index`` of side "a", of two, and what it publishes of batch "x" in pair "pair"."""

    def __init__(self, store: Store, state: StateFile, index: int) -> None:
        agent = AgentRecord(0, "agent", 1, 0.0, "host", "host", "", "", "", "", "cpu")
        sides = [
            [MemberRecord(f"{peer}{rank}", peer, "", 2, "2: S0", rank, "client", 1, 0.0, agent) for rank in range(2)] for peer in ("a", "b")
        ]
        self.match = Match(tuple(sides[0]), tuple(sides[1]), index)
        self.network: Any = Network()
        self.manifests = Manifests(store)
        self.store = store
        self.it = Published(store, state, self.network, self.manifests, "x", f"registration {index}")

    def publish(self, *shapes: tuple[int, ...], whole: tuple[int, ...], standing: Standing | None = None) -> None:
        entries = [RegisteredTensor(b"", whole) for _ in shapes]
        self.it.publish("pair", self.match, entries, [torch.zeros(shape) for shape in shapes], standing)

    def record(self) -> BatchRecord | None:
        """As others find it."""
        data = self.store.get_bytes(batch_prefix("x", "pair", "a") + self.match.local[self.match.index].attempt)
        return None if data is None else decode(data, BatchRecord, "")


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store("published")
    yield store
    store.close()


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateFile]:
    state = StateFile(str(tmp_path / "state.lmdb"), create=True)
    yield state
    state.close(destroy=True)


def test_the_first_says_what_it_holds_and_others_where_they_differ(store: Store, state: StateFile) -> None:
    first, other = Member(store, state, 0), Member(store, state, 1)
    standing = Standing(last=3)
    first.publish((2, 4), whole=(3, 4), standing=standing)
    other.publish((2, 4), whole=(3, 4))  # the layout has it that rank 1 holds one row
    said, silent = first.record(), other.record()
    assert said is not None
    assert silent is not None
    assert (said.registration, said.attempt, said.standing) == ("registration 0", "a0", standing)
    assert Manifests(store).read(said).tensors == (TensorSpec("float32", None, (3, 4)),)
    assert not silent.base
    assert not first.it.differ("pair", said)
    assert other.it.differ("pair", said)
    assert not other.it.differ("pair", said), "it has said so"
    told = other.record()
    assert told is not None
    assert Manifests(store).read(told).tensors == (TensorSpec("float32", (2, 4), (3, 4)),)


def test_what_it_agrees_to_is_said_and_taken_back(store: Store, state: StateFile) -> None:
    member = Member(store, state, 0)
    assert member.it.agreed == ()
    member.publish((2,), whole=(3,))
    assert member.it.agreed == ("",)
    member.it.agree({"pair": "set"}, {"pair": "plan"})
    found = member.record()
    assert found is not None
    assert (found.agreed, found.plan, member.it.agreed) == ("set", "plan", ("set",))
    member.it.agree({}, {})
    found = member.record()
    assert found is not None
    assert (found.agreed, found.plan, member.it.agreed) == ("", "", ("",))
    store.delete(batch_prefix("x", "pair", "a") + "a0")  # by one that took it for dead
    member.it.repeat("pair")
    assert member.record() == found


@pytest.mark.parametrize("away", [False, True])
def test_it_is_taken_back_and_where_the_store_is_away_its_memory_is_at_once(store: Store, state: StateFile, away: bool) -> None:
    member = Member(store, state, 0)
    tensor = torch.ones(2)
    handles = export_tensors([tensor]).handles
    member.it.show({"pair": handles}, {"pair": [tensor]})
    member.publish((2,), whole=(3,))
    found = state.get(handles_key("registration 0"))
    assert found is not None
    assert b"shm" in found
    assert list(member.network.exported) == ["registration 0/pair"]
    if away:
        store.away = True
        with pytest.raises(StoreUnavailableError):
            member.it.withdraw()
        assert member.record() is not None
        assert state.get(handles_key("registration 0")) is None
        assert member.network.exported == {}
        store.away = False
    for _ in range(2):
        member.it.withdraw()
        assert member.record() is None
        assert state.get(handles_key("registration 0")) is None
        assert member.network.exported == {}


def test_what_was_shown_before_a_tensor_that_cannot_be_is_taken_back(store: Store, state: StateFile) -> None:
    member = Member(store, state, 0)
    with pytest.raises(NotShareableError):
        member.it.show({"one": [], "two": []}, {"one": [torch.ones(2)], "two": [torch.ones(2, dtype=torch.int8)]})
    assert list(member.network.exported) == ["registration 0/one"]
    member.it.withdraw()
    assert member.network.exported == {}
