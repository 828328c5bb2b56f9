"""Ray's GCS as the store of agents, made to stand still."""

from __future__ import annotations

import pytest

from tests.standstill import gcs_pid, standing_still
from tests.tensor_bus.silence import meeting, what_needs_it_says_so_and_transfers_go_on


@pytest.mark.usefixtures("ray_cluster")
def test_a_gcs_that_stands_still(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with meeting("gcs://") as at:
        what_needs_it_says_so_and_transfers_go_on(at, standing_still(gcs_pid()), monkeypatch, caplog)
