"""What all tests of the bus have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from etha_ray.tensor_bus import connection
from tests.tensor_bus.cluster import LONG


@pytest.fixture(autouse=True)
def agents_have_the_last_word() -> Iterator[None]:
    """Agents that are threads of a busy process may answer late that a time is up. They say who was missing, which tests are about;
    a client of this process that gave up before would not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "_GRACE", LONG)
        yield
