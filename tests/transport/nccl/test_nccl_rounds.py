"""What goes by a communicator, in which groups and order, and in how much memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from etha_ray.accelerator import Accelerator
from etha_ray.errors import NoTransportError
from etha_ray.net import Server
from etha_ray.testing.calls import PATIENCE, eventually
from etha_ray.transport import Copy
from etha_ray.transport.kernels.source import COPY_REGIONS
from etha_ray.transport.kernels.transport import _TorchCall
from etha_ray.transport.network import NetworkTransport, Read, RemoteRegion
from etha_ray.transport.network.rounds import aligned, cut_into_rounds
from etha_ray.transport.network.slots import DEPTH, SLOTS
from tests.accelerator.lanes import QueuedAccelerator
from tests.contracts.transport import bits, numbers, random_tensor
from tests.net.pair import SECRET
from tests.transport.nccl.pair import DevicePair, Running, end
from tests.transport.nccl.recording import RecordingCommunicators


@pytest.fixture
def pair() -> Iterator[DevicePair]:
    with contextlib.closing(DevicePair()) as pair:
        yield pair


@given(st.lists(st.integers(1, 5000)), st.integers(1, 9000))
def test_rounds_are_consecutive_and_bounded(sizes: list[int], round_size: int) -> None:
    rounds = cut_into_rounds(sizes, round_size)
    assert [number for each in rounds for number in each] == list(range(len(sizes)))
    filled = [sum(aligned(sizes[number]) for number in each) for each in rounds]
    assert all(size <= round_size or len(each) == 1 for size, each in zip(filled, rounds, strict=True))
    joined = zip(filled, (aligned(sizes[each.start]) for each in rounds[1:]), strict=False)
    assert all(size + following > round_size for size, following in joined)  # none could have taken the next


@st.composite
def regions(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...], torch.Tensor]:
    """A source of any strides, a box of it (start, size), and a target of that size, any strides and perhaps another dtype."""
    dtypes = draw(
        st.sampled_from([(torch.bool,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
    )
    box = [draw(st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(0, 2))) for _ in range(draw(st.integers(0, 3)))]
    start, size = tuple(before for before, _, _ in box), tuple(count for _, count, _ in box)
    tensors = []
    for dtype, shape in zip(dtypes, (tuple(map(sum, box)), size), strict=True):
        order = draw(st.permutations(range(len(shape))))
        memory = numbers((*(shape[dim] for dim in order), draw(st.integers(1, 2))), dtype)
        tensors.append(memory[..., 0].permute([order.index(dim) for dim in range(len(shape))]))
    return tensors[0], start, size, tensors[1]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(regions(), max_size=6),
    st.sampled_from([4096, 65536]),
    st.sampled_from([8192, 1 << 15, 1 << 20]),
    st.sampled_from([8192, 1 << 20]),
)
def test_any_regions_budgets_and_bucket_sizes(
    sides: list[tuple[torch.Tensor, tuple[int, ...], tuple[int, ...], torch.Tensor]], bucket_size: int, owner: int, reader: int
) -> None:
    with contextlib.closing(DevicePair({"memory_budget": owner}, {"memory_budget": reader})) as pair:
        pair.owner.export("x", [source for source, *_ in sides])
        reads = [
            Read(RemoteRegion(pair.address, "x", index, start, size, source.dtype), target)
            for index, (source, start, size, target) in enumerate(sides)
        ]
        program = pair.reader.prepare(reads, min(bucket_size, owner // 2, reader // 2))
        for _ in range(2):
            for _, _, _, target in sides:
                target.zero_()
            assert program.run() == program.nbytes
            for source, start, size, target in sides:
                box = source[tuple(slice(first, first + count) for first, count in zip(start, size, strict=True))]
                assert bits(target) == bits(box.to(target.dtype))
        smaller = min(owner, reader) // 2 // SLOTS // DEPTH
        assert all(sum(map(aligned, group)) <= smaller for group in pair.groups)
        assert pair.owner.device_staging_peak <= owner
        assert pair.reader.device_staging_peak <= reader
        assert pair.owner.staging_peak == pair.reader.staging_peak == 0  # nothing passed through the hosts' memory


def test_the_communicator_is_warm_before_the_first_run_and_used_by_every_program(pair: DevicePair) -> None:
    source = random_tensor((5, 7))
    first = pair.prepare([source], [torch.zeros_like(source)])
    assert pair.groups == [[256]]  # no tensor's byte
    second = pair.reader.prepare(pair.reads([source], [torch.zeros_like(source)]))
    for program in (first, second, first):
        program.run()
    assert pair.groups == [[256], *[[70]] * 3]
    assert len(pair.sent.made) == len(pair.received.made) == 1


def test_the_next_round_is_packed_while_the_one_before_is_on_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = 0
    launch = QueuedAccelerator.launch

    def counted(accelerator: QueuedAccelerator, kernel: Any, *more: Any) -> None:
        nonlocal packed
        packed += kernel is COPY_REGIONS and accelerator is owner
        launch(accelerator, kernel, *more)

    budget = {"memory_budget": 2 * SLOTS * DEPTH * (1 << 16)}  # rounds of 64 KiB
    with contextlib.closing(DevicePair(budget, budget)) as pair:
        source, target = numbers((256, 512), torch.float32), torch.zeros(256, 512)
        program = pair.prepare([source.t()], [target.t()])
        assert pair.groups == [[256]]  # what has made it warm
        assert pair.owner._device is not None
        owner = pair.owner._device.accelerator
        monkeypatch.setattr(QueuedAccelerator, "launch", counted)
        pair.sent.stands_still.set()
        running = Running(program)
        eventually(lambda: len(pair.sent.groups[0]) == 1 + DEPTH)
        assert pair.sent.stood_still.wait(PATIENCE)
        assert packed == DEPTH, "as many rounds as are under way at a time"
        assert not target.any()
        pair.sent.stands_still.clear()
        assert running.outcome == source.nbytes
        assert torch.equal(source, target)
        assert packed == len(pair.groups) - 1 == source.nbytes >> 16


def test_what_torch_does_is_rehearsed_before_the_first_run(pair: DevicePair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers to wider ones are no kernel of ours, and amid messages torch's may be waited for in vain."""
    made: list[list[torch.dtype]] = []
    example = _TorchCall.example

    def watched(call: _TorchCall, accelerator: Accelerator) -> Copy:
        found = example(call, accelerator)
        made.append([tensor.dtype for tensor in (*found.sources, found.target)])
        return found

    monkeypatch.setattr(_TorchCall, "example", watched)
    source = numbers((30, 40), torch.int32)
    targets = [torch.zeros(30, 40, dtype=torch.int64) for _ in range(2)]
    pair.owner.export("x", [source])
    programs = [pair.reader.prepare(pair.reads([source], [target])) for target in targets]
    assert made == [[torch.int32, torch.int64]], "once, when the first was prepared"
    for program, target in zip(programs, targets, strict=True):
        program.run()
        assert torch.equal(target, source.long())
    assert len(made) == 1


def test_what_is_contiguous_is_not_staged(pair: DevicePair) -> None:
    sources = [random_tensor((300, 500)), random_tensor((70, 90))]
    targets = [torch.zeros_like(source) for source in sources]
    pair.prepare([sources[0]], [targets[0]]).run()
    assert pair.owner.device_staging_peak == pair.reader.device_staging_peak == 0
    view = random_tensor((500, 300), seed=1).t()
    pair.owner.export("y", [view])
    pair.reader.prepare(pair.reads([view], [targets[0]], "y"), 1 << 16).run()
    assert pair.owner.device_staging_peak > 0
    assert pair.reader.device_staging_peak == 0  # only the end that needs it
    assert bits(targets[0]) == bits(view)


def test_both_directions_and_several_readers_at_once() -> None:
    """More of them than there are slots, all packed and unpacked, in budgets of a few buckets."""
    budget = {"memory_budget": 1 << 18}
    with contextlib.closing(DevicePair(budget, budget)) as pair, contextlib.ExitStack() as stack:
        back = stack.enter_context(contextlib.closing(Server(SECRET, pair.reader.services, "127.0.0.1")))
        others = [stack.enter_context(contextlib.closing(end(RecordingCommunicators(), **budget))) for _ in range(3)]
        source = numbers((400, 300), torch.float32)
        pair.owner.export("x", [source.t()])
        pair.reader.export("x", [source.t()])
        ways = [
            (pair.reader, pair.address),
            (pair.owner, back.address),
            *((other, pair.address) for other in others),
            (others[0], back.address),
        ]
        targets = [torch.zeros(400, 300).t() for _ in ways]
        programs = [
            reader.prepare([Read(RemoteRegion(address, "x", 0, (0, 0), (300, 400), torch.float32), target)], 1 << 15)
            for (reader, address), target in zip(ways, targets, strict=True)
        ]
        runs = [Running(program) for program in programs * 2]
        assert [run.outcome for run in runs] == [source.nbytes] * len(runs)
        assert all(bits(target) == bits(source.t()) for target in targets)
        assert all(0 < each.device_staging_peak <= 1 << 18 for each in (pair.owner, pair.reader))


# --------------------------------------------------------------------------------------------------------------- the path


def mixed(owner: NetworkTransport, reader: NetworkTransport, caplog: pytest.LogCaptureFixture) -> str:
    """What the log says when a program of two tensors was run: once, though it is run and prepared twice."""
    with contextlib.closing(Server(SECRET, owner.services, "127.0.0.1")) as server, contextlib.closing(owner), contextlib.closing(reader):
        sources = [random_tensor((300, 50)), random_tensor((40, 30)).t()]
        owner.export("x", sources)
        for _ in range(2):
            targets = [torch.zeros_like(source) for source in sources]
            reads = [
                Read(RemoteRegion(server.address, "x", n, (0, 0), tuple(s.shape), s.dtype), t)
                for n, (s, t) in enumerate(zip(sources, targets, strict=True))
            ]
            reader.prepare(reads).run()
            assert all(bits(source) == bits(target) for source, target in zip(sources, targets, strict=True))
    return "\n".join(record.message for record in caplog.records if "by TCP" in record.message)


def test_a_device_at_one_end_only_goes_by_tcp(caplog: pytest.LogCaptureFixture) -> None:
    for ends in ((end(RecordingCommunicators()), NetworkTransport(SECRET)), (NetworkTransport(SECRET), end(RecordingCommunicators()))):
        assert mixed(*ends, caplog) == ""
        device = ends[0] if ends[0].device_staging_peak else ends[1]
        assert device.device_staging_peak == 0


def test_without_nccl_at_one_end_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    lacks = "there is no NCCL: pip install it"
    good, bad = (lambda: end(RecordingCommunicators())), (lambda: end(lacks))
    said = mixed(good(), bad(), caplog)
    assert said == f"tensors on GPUs go by TCP, through this host's memory: this agent: {lacks} (said once)"
    caplog.clear()
    said = mixed(bad(), good(), caplog)
    assert said.startswith("tensors on GPUs go by TCP, through this host's memory: the agent at 127.0.0.1:")
    assert said.endswith(f": {lacks} (said once)")


def test_tcp_and_nccl_can_be_forced(caplog: pytest.LogCaptureFixture) -> None:
    owner, reader = RecordingCommunicators(), RecordingCommunicators()
    assert mixed(end(owner), end(reader, path="tcp"), caplog) == ""
    assert mixed(end(owner, path="tcp"), end(reader), caplog).endswith("its path is 'tcp' (said once)")
    assert owner.made == reader.made == []
    for ends, reason in (
        ((NetworkTransport(SECRET), end(reader, path="nccl")), "the tensor is not on a device at both ends"),
        ((end(owner), end("no NCCL here", path="nccl")), "this agent: no NCCL here"),
        ((end("no NCCL there"), end(reader, path="nccl")), "no NCCL there"),
    ):
        with pytest.raises(NoTransportError, match=rf"tensor 0 of export 'x' cannot go by NCCL from the agent at .*{reason}.*path 'auto'"):
            mixed(*ends, caplog)


def test_what_a_device_does_not_hold_goes_by_tcp_beside_it(pair: DevicePair, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program by both paths: two of four sources are on the host."""
    sources = [random_tensor((300, 50 + index), seed=index) for index in range(4)]
    targets = [torch.zeros_like(source) for source in sources]
    on_host = {sources[0].data_ptr(), sources[2].data_ptr()}
    device = pair.owner._device
    assert device is not None
    monkeypatch.setattr(device, "holds", lambda tensor: tensor.data_ptr() not in on_host)
    program = pair.prepare(sources, targets)
    program.run()
    assert all(bits(source) == bits(target) for source, target in zip(sources, targets, strict=True))
    assert pair.groups[1:] == [[sources[1].nbytes + sources[3].nbytes]]
    assert "in 2 buckets" in repr(program)
