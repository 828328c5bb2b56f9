"""What is nearly right, wherever bytes of another process are read: it is read, or refused by an error of etha_ray or a line in the log."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from etha_ray.decoding import Decoder
from etha_ray.errors import EthaRayError
from tests.security.inputs import Input, all_inputs
from tests.security.mutations import mutated
from tests.security.test_fuzz import COUNT

_whole = Decoder(msgspec.Raw)
"""Takes all that can be told apart, whatever it says: so are fields passed over that a struct does not have."""


def is_whole(data: bytes) -> bool:
    """Whether it is msgpack at all."""
    try:
        _whole.decode(data)
    except msgspec.DecodeError:
        return False
    return True


def check(name: str, each: Input, data: bytes, lines: list[logging.LogRecord]) -> None:
    """Read it; what is not even msgpack is none for certain, and is not passed over in silence."""
    lines.clear()
    refused = False
    try:
        each.read(data)
    except EthaRayError:
        refused = True
    if each.says == "logs":
        refused |= any(line.levelno >= logging.WARNING for line in lines)
    if each.says != "nothing" and not is_whole(data):
        assert refused, f"{name}: {data[:200]!r} was taken for one"


@pytest.mark.parametrize("group", ["queue", "store", "GCS", "Ray", "state", "network", "memory"])
def test_what_is_nearly_right(group: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with all_inputs(tmp_path) as inputs:
        own = {name: each for name, each in inputs.items() if name.startswith(f"{group}: ")}
        assert own

        @settings(max_examples=COUNT // 5, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(name=st.sampled_from(sorted(own)), seed=st.integers(0, 2**32))
        def run(name: str, seed: int) -> None:
            check(name, own[name], mutated(own[name].value, random.Random(seed)), caplog.records)

        run()


def test_what_is_right_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Else nothing above would be about what is nearly right."""
    not_there = {"store: Verdict", "store: Differences, applied", "state: record", "state: heartbeat", "state: handles"}
    with all_inputs(tmp_path) as inputs:
        assert not_there < inputs.keys()
        for name, each in inputs.items():
            caplog.clear()
            if name in not_there:  # what it says is an error, or is about processes and files that are not there
                with pytest.raises(EthaRayError):
                    each.read(each.value)
            else:
                each.read(each.value)
            assert not caplog.records
