from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etha_ray.transport import Copy, MappedTransport, OneSidedTransport
from tests.contracts.transport import OneSidedTransportContract, bits, random_tensor


class TestMappedOneThread(OneSidedTransportContract):
    @pytest.fixture
    def transport(self) -> Iterator[OneSidedTransport]:
        transport = MappedTransport(threads=1)
        yield transport
        transport.close()


class TestMappedThreeThreads(OneSidedTransportContract):
    @pytest.fixture
    def transport(self) -> Iterator[OneSidedTransport]:
        transport = MappedTransport(threads=3)
        yield transport
        transport.close()


@st.composite
def layouts(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A source and a target of one shape, each a random slice of a random permutation of its own memory."""
    dtype = draw(st.sampled_from([torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex128]))
    shape = draw(st.lists(st.integers(0, 12), max_size=4))
    sides = []
    for seed in (0, 1):
        margins = [draw(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 3))) for _ in shape]
        order = draw(st.permutations(range(len(shape))))
        held = [before + size * step + after for size, (before, after, step) in zip(shape, margins, strict=True)]
        memory = random_tensor(tuple(held[dim] for dim in order), dtype, seed)
        tensor = memory.permute([order.index(dim) for dim in range(len(shape))])
        for dim, (size, (before, _, step)) in enumerate(zip(shape, margins, strict=True)):
            tensor = tensor.narrow(dim, before, size * step)[(slice(None),) * dim + (slice(None, None, step),)]
        sides.append(tensor)
    return sides[0], sides[1]


@settings(max_examples=200, deadline=None)
@given(layouts())
def test_any_layouts(sides: tuple[torch.Tensor, torch.Tensor]) -> None:
    source, target = sides
    assert source.shape == target.shape
    MappedTransport(threads=1).prepare([Copy((source,), target)]).run()
    assert bits(source) == bits(target)


def test_thread_count_is_checked() -> None:
    with pytest.raises(ValueError, match="threads is 0"):
        MappedTransport(threads=0)


def test_small_copies_share_a_step() -> None:
    transport = MappedTransport(threads=1)
    small = [Copy((torch.ones(1024),), torch.zeros(1024)) for _ in range(1000)]
    assert repr(transport.prepare(small)) == "MappedProgram(4096000 bytes in 0 pieces, 0 combined and 4 groups of small ones)"
    big = torch.ones(4 << 20, dtype=torch.uint8)
    assert "8 pieces, 0 combined and 0 groups" in repr(transport.prepare([Copy((big,), torch.zeros_like(big))]))


def test_torch_threads_are_left_alone() -> None:
    before = torch.get_num_threads()
    with_threads = MappedTransport(threads=4)
    with_threads.prepare([Copy((torch.ones(1 << 20),), torch.zeros(1 << 20))]).run()
    with_threads.close()
    assert torch.get_num_threads() == before


def test_close_while_running() -> None:
    """A run that has begun ends whole, even when the transport is closed under it."""
    transport = MappedTransport(threads=2)
    source, target = torch.ones(16 << 20), torch.zeros(16 << 20)
    program = transport.prepare([Copy((source,), target)])
    moved: list[int] = []
    thread = threading.Thread(target=lambda: moved.append(program.run()))
    thread.start()
    while not target[0]:
        pass
    transport.close()
    thread.join()
    assert moved == [source.nbytes]
    assert torch.equal(source, target)


PEAK = """
import torch
from etha_ray.transport import Copy, MappedTransport
def private_peak_kib():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {name: int(lines[name].split()[0]) for name in ("VmHWM", "RssAnon", "Threads")}
source = torch.ones(4 << 10, 8 << 10, dtype=torch.bfloat16)
other = torch.ones_like(source)
target = torch.zeros(4 << 10, 8 << 10, dtype=DTYPE)
transport = MappedTransport(threads=2)
program = transport.prepare(COPIES)
before = private_peak_kib()
for _ in range(2):
    program.run()
after = private_peak_kib()
assert torch.equal(target, torch.full_like(target, EXPECTED))
assert after["Threads"] <= before["Threads"] + 1, (before, after)
print(max(after[name] - before[name] for name in ("VmHWM", "RssAnon")))
"""


@pytest.mark.parametrize(
    ("dtype", "copies", "expected"),
    [
        ("torch.bfloat16", "[Copy((source[:, :5000],), target[:, :5000]), Copy((source[:, 5000:],), target[:, 5000:])]", 1),
        ("torch.float32", "[Copy((source,), target)]", 1),
        ("torch.float16", "[Copy((source, other), target, 'sum')]", 2),
    ],
    ids=["copy", "cast", "combine"],
)
def test_no_memory_beside_the_tensors_and_no_threads_beside_its_own(dtype: str, copies: str, expected: int) -> None:
    code = PEAK.replace("DTYPE", dtype).replace("COPIES", copies).replace("EXPECTED", str(expected))
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250)
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) < 8 << 10  # KiB, for 128 MiB moved
