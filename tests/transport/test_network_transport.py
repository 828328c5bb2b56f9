"""Reading over sockets: what arrives, how much memory that takes, and that ends which leave are noticed and come back."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from etha_ray.errors import (
    ConfigError,
    HandleExpiredError,
    NoTransportError,
    NotShareableError,
    PeerLostError,
    TensorMismatchError,
    TransferError,
    WrongDeviceError,
)
from etha_ray.net import Server, dial
from etha_ray.testing import eventually
from etha_ray.transport.network import NetworkTransport, Read, RemoteRegion, wire
from etha_ray.transport.network.staging import Staging
from tests.contracts.transport import bits, numbers, random_tensor
from tests.net.pair import PATIENCE, SECRET, Pair


@pytest.fixture(scope="module")
def lasting() -> Iterator[Pair]:
    with contextlib.closing(Pair()) as pair:
        yield pair


@st.composite
def layouts(draw: st.DrawFn) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...], torch.Tensor]:
    """A source of any strides, a box of it (start, size), and a target of that size and any strides."""
    dtype = draw(st.sampled_from([torch.bool, torch.bfloat16, torch.float32, torch.complex128]))
    box = [draw(st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(0, 2))) for _ in range(draw(st.integers(0, 3)))]
    start, size = tuple(before for before, _, _ in box), tuple(count for _, count, _ in box)
    tensors = []
    for seed, shape in enumerate((tuple(map(sum, box)), size)):
        order = draw(st.permutations(range(len(shape))))
        step = draw(st.integers(1, 2))
        memory = random_tensor((*(shape[dim] for dim in order), step), dtype, seed)
        tensors.append(memory[..., 0].permute([order.index(dim) for dim in range(len(shape))]))
    return tensors[0], start, size, tensors[1]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(layouts(), st.sampled_from([4096, 65536]))
def test_any_box_of_any_layout(
    lasting: Pair, sides: tuple[torch.Tensor, tuple[int, ...], tuple[int, ...], torch.Tensor], bucket_size: int
) -> None:
    source, start, size, target = sides
    export = lasting.owner.export("any", [source])
    try:
        lasting.reader.prepare([Read(RemoteRegion(lasting.address, "any", 0, start, size, source.dtype), target)], bucket_size).run()
    finally:
        export.close()
    assert bits(target) == bits(source[tuple(slice(first, first + count) for first, count in zip(start, size, strict=True))])


def test_thousands_of_small_regions(pair: Pair) -> None:
    sources = [random_tensor((2048,), seed=seed % 7) for seed in range(5000)]
    targets = [torch.zeros(2048, dtype=torch.bfloat16) for _ in sources]
    pair.owner.export("x", sources)
    program = pair.reader.prepare(pair.reads(sources, targets))
    assert program.run() == 5000 * 4096
    assert all(map(torch.equal, map(_bits, targets), map(_bits, sources)))
    assert repr(program) == "NetworkProgram(20480000 bytes from 1 agents in 3 buckets)"
    assert pair.reader.staging_peak == pair.owner.staging_peak == 0  # every one went straight


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16)


def test_a_gibibyte_goes_straight(pair: Pair) -> None:
    """Contiguous on one side, rows of a wider tensor on the other: no byte is staged on either."""
    source = torch.arange(1 << 27, dtype=torch.int32).view(4096, 1 << 15)
    target = torch.zeros(4096, (1 << 15) + 8, dtype=torch.int32)
    export = pair.owner.export("x", [source, source])
    halves = [
        Read(RemoteRegion(pair.address, "x", half, (0, half << 14), (4096, 1 << 14), torch.int32), target[:, 8:].chunk(2, 1)[half])
        for half in (0, 1)
    ]
    assert pair.reader.prepare(halves * 2).run() == 1 << 30
    assert torch.equal(target[:, 8:], source)
    assert not target[:, :8].any()
    assert pair.reader.staging_peak == pair.owner.staging_peak == 0
    export.close()


def test_the_narrower_dtype_travels(pair: Pair) -> None:
    wide, narrow = numbers((300, 500), torch.float32), numbers((300, 500), torch.bfloat16)
    pair.owner.export("x", [wide, narrow])
    to_narrow, to_wide = torch.zeros_like(narrow), torch.zeros_like(wide)
    program = pair.reader.prepare(pair.reads([wide, narrow], [to_narrow, to_wide]))
    assert program.nbytes == 300 * 500 * 6
    assert program.wire_nbytes == 300 * 500 * 4
    program.run()
    assert torch.equal(to_narrow, wide.bfloat16())
    assert torch.equal(to_wide, narrow.float())


def test_several_owners_in_one_program() -> None:
    with contextlib.ExitStack() as stack:
        pairs = [stack.enter_context(contextlib.closing(Pair())) for _ in range(3)]
        sources = [random_tensor((700, 900), seed=seed) for seed in range(3)]
        targets = [torch.zeros_like(source) for source in sources]
        reads = []
        for pair, source, target in zip(pairs, sources, targets, strict=True):
            pair.owner.export("x", [source])
            reads += pair.reads([source], [target])
        program = pairs[0].reader.prepare(reads)
        assert program.run() == sum(source.nbytes for source in sources)
        assert all(map(torch.equal, map(_bits, targets), map(_bits, sources)))
        pairs[2].owner.close()
        pairs[2].server.close()
        with pytest.raises(PeerLostError, match=str(pairs[2].address)):
            program.run()


# ------------------------------------------------------------------------------------------------------------- memory


def test_staging_that_cannot_be_made_is_not_lent() -> None:
    """Pinned memory can be refused; the budget is there for the next."""
    refused = [MemoryError("no memory can be pinned")]

    def allocate(nbytes: int) -> torch.Tensor:
        if refused:
            raise refused.pop()
        return torch.empty(nbytes, dtype=torch.uint8)

    staging = Staging(8192, allocate)
    with pytest.raises(MemoryError, match="pinned"), staging.borrow(8192):
        pass
    with staging.borrow(8192) as buffer:
        assert buffer.nbytes == staging.peak == 8192


def test_staging_never_passes_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six programs at a time in both directions between two agents, all of it packed and cast, in a budget of three buckets."""
    bucket, budget = 1 << 18, 6 << 18
    lent: list[int] = []
    lock, borrowed, take = threading.Lock(), [0], Staging._take

    def counted(staging: Staging, nbytes: int) -> torch.Tensor:
        buffer = take(staging, nbytes)
        with lock, staging._changed:  # others take and give back meanwhile
            lent.append(staging._lent + sum(each.nbytes for each in staging._kept))
            borrowed[0] += 1
        return buffer

    monkeypatch.setattr(Staging, "_take", counted)
    with contextlib.closing(Pair(memory_budget=budget)) as one:
        back = Server(SECRET, one.reader.services, "127.0.0.1")
        source = numbers((1500, 1000), torch.float32)
        exports = [one.owner.export("x", [source.t()]), one.reader.export("x", [source.t()])]
        targets = [torch.zeros(1000, 1500, dtype=torch.bfloat16) for _ in range(6)]
        programs = []
        for number, target in enumerate(targets):
            reader, address = ((one.reader, one.address), (one.owner, back.address))[number % 2]
            # Every other element: what arrives must be unpacked as well.
            regions = [RemoteRegion(address, "x", 0, (0, half), (1000, 750), torch.float32) for half in (0, 750)]
            reads = [Read(region, target[:, half::2]) for half, region in enumerate(regions)]
            programs.append(reader.prepare(reads, bucket))
        threads = [threading.Thread(target=lambda program=program: [program.run() for _ in range(3)]) for program in programs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = source.t().bfloat16()
        for target in targets:
            assert torch.equal(target[:, ::2], expected[:, :750])
            assert torch.equal(target[:, 1::2], expected[:, 750:])
        assert borrowed[0] > 100
        assert 0 < max(lent) <= budget // 2  # of each direction
        assert 0 < one.reader.staging_peak <= budget
        assert 0 < one.owner.staging_peak <= budget
        back.close()
        for export in exports:
            export.close()


def test_tiny_strided_elements_need_no_more_than_a_bucket() -> None:
    with contextlib.closing(Pair(memory_budget=2 << 16)) as pair:
        sources = [random_tensor((3, 5), torch.uint8, seed)[:, ::2] for seed in range(4000)]
        targets = [torch.zeros(3, 3, dtype=torch.uint8).t() for _ in sources]
        pair.owner.export("x", sources)
        pair.reader.prepare(pair.reads(sources, targets), 1 << 16).run()
        assert all(map(torch.equal, targets, sources))
        assert max(pair.reader.staging_peak, pair.owner.staging_peak) <= 1 << 16


def test_out_of_range_is_named(pair: Pair) -> None:
    for bucket_size in (0, 4095):
        with pytest.raises(ConfigError, match=f"bucket_size of {bucket_size} bytes is too small: give 4096 at least"):
            pair.reader.prepare([], bucket_size)
    with pytest.raises(ConfigError, match="memory budget 8191"):
        NetworkTransport(SECRET, memory_budget=8191)
    with pytest.raises(ConfigError, match="0 streams"):
        NetworkTransport(SECRET, streams=0)


@pytest.mark.parametrize("poor", ["reader", "owner", "both"])
@pytest.mark.parametrize("budget", [8192, 2 << 20, 3_000_001])
def test_regions_are_split_as_the_smaller_budget_wants(poor: str, budget: int, pair: Pair) -> None:
    """The bucket size is the usual one, and the region larger than either."""
    with contextlib.closing(Pair(memory_budget=budget)) as small:
        owner, reader = (pair if poor == "reader" else small), (pair if poor == "owner" else small)
        source, target = random_tensor((700, 2100), torch.int32, 1).t(), torch.zeros(700, 2100, dtype=torch.int32).t()[:, :690]
        owner.owner.export("x", [source])
        reads = [Read(RemoteRegion(owner.address, "x", 0, (0, 7), (2100, 690), torch.int32), target)]
        program = reader.reader.prepare(reads)
        assert program.run() == target.numel() * 4
        assert torch.equal(target, source[:, 7:697])
        for name in {"reader": ["reader"], "owner": ["owner"], "both": ["owner", "reader"]}[poor]:
            assert 0 < getattr(small, name).staging_peak <= budget // 2


# ------------------------------------------------------------------------------------------------------------- errors


def test_what_does_not_fit_the_export_is_named(pair: Pair) -> None:
    pair.owner.export("x", [torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)])

    def refused(index: int, start: tuple[int, ...], size: tuple[int, ...], dtype: torch.dtype, match: str) -> None:
        with pytest.raises(TensorMismatchError, match=match):
            pair.reader.prepare([Read(RemoteRegion(pair.address, "x", index, start, size, dtype), torch.zeros(size, dtype=dtype))])

    refused(2, (0,), (4,), torch.float32, rf"{pair.address}: tensor 2 of export 'x' is not there: it has 2")
    refused(-1, (0,), (4,), torch.float32, "tensor -1 of export 'x' is not there")
    refused(1, (0,), (4,), torch.float32, "tensor 1 of export 'x' is torch.int64, and was taken for float32")
    for start, size in (((0, 0), (4, 6)), ((1, 0), (4, 5)), ((-1, 0), (2, 2)), ((0,), (4,)), ((0, 0, 0), (1, 1, 1))):
        refused(0, start, size, torch.float32, "is not within it")
    with pytest.raises(TensorMismatchError, match=r"read 0: source is \(4, 5\).*target is \(5, 4\)"):
        pair.reader.prepare(pair.reads([torch.zeros(4, 5)], [torch.zeros(5, 4)]))
    with pytest.raises(WrongDeviceError, match="read 0: its target is on meta, and this agent has only the CPU"):
        pair.reader.prepare(pair.reads([torch.zeros(4, 5)], [torch.zeros(4, 5, device="meta")]))


def test_what_cannot_be_exported_is_named(pair: Pair) -> None:
    with pytest.raises(WrongDeviceError, match="export 'y': tensor 1 is on meta"):
        pair.owner.export("y", [torch.zeros(1), torch.zeros(1, device="meta")])
    for tensor in (torch.zeros(2, 2).to_sparse(), torch.zeros(2, dtype=torch.complex64).conj()):
        with pytest.raises(NotShareableError, match="export 'y': tensor 0"):
            pair.owner.export("y", [tensor])
    pair.owner.export("y", [])
    with pytest.raises(ConfigError, match="'y' exists already"):
        pair.owner.export("y", [])


def test_an_export_that_is_closed_is_gone_and_one_of_its_name_serves_again(pair: Pair) -> None:
    source, target = torch.ones(1000), torch.zeros(1000)
    with pytest.raises(HandleExpiredError, match=rf"{pair.address}: export 'x' is not there"):
        pair.reader.prepare(pair.reads([source], [target]))
    export = pair.owner.export("x", [source])
    program = pair.reader.prepare(pair.reads([source], [target]))
    program.run()
    assert repr(export) == "Export('x', 1 tensors)"
    export.close()
    export.close()
    assert (repr(export), export.tensors) == ("Export('x', closed)", ())
    with pytest.raises(HandleExpiredError, match=rf"{pair.address}: what it reads was closed by its owner"):
        program.run()
    with pytest.raises(HandleExpiredError, match="export 'x' is not there"):
        program.run()
    pair.owner.export("x", [source + 1])
    program.run()
    assert torch.equal(target, source + 1)


def test_closing_an_export_waits_for_who_reads_it(pair: Pair) -> None:
    """When close returns, what its memory holds from then on goes nowhere."""
    source, target = torch.zeros(24 << 20, dtype=torch.uint8), torch.ones(24 << 20, dtype=torch.uint8)
    export = pair.owner.export("x", [source])
    program = pair.reader.prepare(pair.reads([source], [target]), 1 << 16)
    outcome: list[type[BaseException] | None] = []

    def run() -> None:
        try:
            program.run()
        except HandleExpiredError as error:
            outcome.append(type(error))
        else:
            outcome.append(None)

    thread = threading.Thread(target=run)
    thread.start()
    eventually(lambda: not target[0] or not thread.is_alive())  # the first bytes are here
    export.close()
    source.fill_(7)
    thread.join()
    assert not (target == 7).any()
    assert outcome == [HandleExpiredError] or not target.any()


def test_a_program_that_is_dropped_is_forgotten_by_the_owner(pair: Pair) -> None:
    source = torch.zeros(10)
    pair.owner.export("x", [source])
    programs = [pair.reader.prepare(pair.reads([source], [torch.zeros(10)])) for _ in range(5)]
    (session,) = pair.owner._exports._sessions.values()
    assert len(session.programs) == 5
    del programs[1:]
    gc.collect()
    pair.reader.prepare(pair.reads([source], [torch.zeros(10)]))  # what was said before is handled before
    assert len(session.programs) <= 3


def test_closing_the_reader_ends_its_session_at_the_owner(pair: Pair) -> None:
    before = {thread.name for thread in threading.enumerate()}
    source = torch.zeros(10)
    pair.owner.export("x", [source])
    program = pair.reader.prepare(pair.reads([source], [torch.zeros(10)]))
    program.run()
    pair.reader.close()
    pair.reader.close()
    with pytest.raises(TransferError, match="the transport was closed"):
        program.run()
    eventually(lambda: not pair.owner._exports._sessions and not pair.server._threads)
    eventually(lambda: {thread.name for thread in threading.enumerate()} <= before)  # what the server has forgotten is about to end


def test_a_stranger_with_the_secret_who_speaks_nonsense(pair: Pair) -> None:
    """Garbage on either service ends that connection, and nothing else."""
    source, target = torch.ones(10), torch.zeros(10)
    pair.owner.export("x", [source])
    program = pair.reader.prepare(pair.reads([source], [target]))
    (session,) = pair.owner._exports._sessions
    for service, hello in ((wire.CONTROL, b"short"), (wire.CONTROL, os.urandom(16)), (wire.STREAM, os.urandom(16)), (wire.STREAM, b"")):
        with dial(pair.address, SECRET, service, hello) as connection:
            with contextlib.suppress(OSError):
                connection.socket.sendall(b"\0\1\0\0\0\0\xc1" * 100)
            connection.socket.settimeout(PATIENCE)
            with contextlib.suppress(ConnectionError):
                while connection.socket.recv(1 << 16):
                    pass
    eventually(lambda: list(pair.owner._exports._sessions) == [session])
    with dial(pair.address, SECRET, wire.STREAM, session) as connection:
        connection.send(wire.Fetch(10**9, 0))
        answer, _ = connection.receive(wire.answers)
        assert isinstance(answer, wire.Failed)
        connection.send(wire.Fetch(program._parts[0].request.program, 99))
        with pytest.raises(PeerLostError):
            connection.receive(wire.answers)
    program.run()
    assert torch.equal(target, source)


def test_the_secret_is_shown_nowhere(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    source = torch.ones(10)
    pair.owner.export("x", [source])
    caplog.set_level("DEBUG")
    program = pair.reader.prepare(pair.reads([source], [torch.zeros(10)]))
    other = NetworkTransport(os.urandom(32))
    with pytest.raises(NoTransportError, match="secret") as info:
        other.prepare(pair.reads([source], [torch.zeros(10)]))
    other.close()
    shown = " ".join(map(repr, (pair.reader, pair.owner, pair.server, program, info.value, *program._parts))) + caplog.text
    for form in (repr(SECRET), SECRET.hex(), SECRET.decode("latin-1")):
        assert form not in shown
