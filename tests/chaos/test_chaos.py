"""The short form of `make chaos`: no call hangs, no success is wrong, nothing is left behind, whatever dies."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.monkey import STEADY
from tests.chaos.play import play

BUSY = 20.0
"""Seconds after which a call counts as hanging here: it is given 8, and a machine that runs other tests may stand still for some."""


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("kills", "with_ray"), [pytest.param(9, False, id="hosts"), pytest.param(4, True, id="Ray's actors", marks=pytest.mark.slow)]
)
def test_a_few_kills(kills: int, with_ray: bool, tmp_path: Path) -> None:
    result = play(kills=kills, seed=20261126, folder=tmp_path, limit=BUSY, with_ray=with_ray)
    assert result["bad"] == []
    assert result["kills"] >= kills
    assert set(result["strikes"]) == set(result["kinds"])
    strikes = sum(row["strikes"] for row in result["strikes"].values())
    assert len(set(STEADY) & set(result["during"])) >= min(strikes, len(STEADY))
    assert result["outcomes"]["recv"]["ok"] > kills
    assert result["outcomes"]["update"]["ok"] > kills
    if not with_ray:  # there all share one host
        assert result["passed_on"] > kills
        assert any(row["relays"] for row in result["strikes"].values())
