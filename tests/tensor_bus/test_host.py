"""Who shares memory is checked by a nonce that lies there, for this user alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from etha_ray.tensor_bus.host import HostNonce, host_identity, shares_memory
from etha_ray.tensor_bus.records import AgentRecord


@pytest.fixture
def nonce() -> Iterator[HostNonce]:
    nonce = HostNonce()
    yield nonce
    nonce.close()


def record(nonce: HostNonce) -> AgentRecord:
    return AgentRecord(0, "incarnation", 1, 0.0, "here", host_identity(), nonce.path, nonce.value, "", "", "cpu")


def test_it_is_for_this_user_alone_and_goes_with_its_owner(nonce: HostNonce) -> None:
    assert stat.S_IMODE(os.stat(nonce.path).st_mode) == 0o600
    assert shares_memory(record(nonce))
    nonce.close()
    nonce.close()
    assert not Path(nonce.path).exists()
    assert not shares_memory(record(nonce))


def test_who_only_says_so_shares_none(nonce: HostNonce, tmp_path: Path) -> None:
    own = record(nonce)
    elsewhere = tmp_path / "nonce"
    elsewhere.write_text(nonce.value)
    for lie in ({"nonce": "guessed"}, {"host": "another"}, {"nonce_path": str(elsewhere)}, {"nonce_path": f"{nonce.path}x"}):
        assert not shares_memory(msgspec.structs.replace(own, **lie)), lie
