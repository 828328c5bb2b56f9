"""The short form of `make chaos`: no call hangs, no success is wrong, nothing is left behind, whatever dies."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.__main__ import play


@pytest.mark.timeout(400)
def test_a_dozen_kills(tmp_path: Path) -> None:
    result = play(kills=12, seed=20261126, folder=tmp_path)
    assert result["bad"] == []
    assert result["kills"] >= 12
    assert result["outcomes"]["recv"]["ok"] > 12
