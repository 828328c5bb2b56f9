from __future__ import annotations

import msgspec
import pytest

from etha_ray.tensor_bus.commands import (
    HIGHEST_VERSION,
    Announce,
    BaseCommand,
    CancelTransfer,
    CleanupBatch,
    Failed,
    Goodbye,
    Hello,
    HurryTransfer,
    InitPair,
    MakeDigest,
    Ok,
    Outcome,
    Ping,
    QueryStatus,
    ReadBody,
    ReadNotices,
    ReadyReplicas,
    RegisteredTensor,
    RegisterTensors,
    Transfer,
    WaitReady,
    WaitVersion,
    Withdraw,
    decode_outcome,
    encode_outcome,
)
from etha_ray.tensor_bus.messages import (
    DataRead,
    DataReady,
    DataRefused,
    DataRevoked,
    DataStands,
    DataTaken,
    DigestPart,
    Message,
    RegistrationClosed,
    RelayAnswer,
    RelayRead,
    RelayWanted,
    decode_command,
    encode_command,
)

COMMANDS: list[Message] = [
    Transfer(batch_id="b", transfer_type="send", timestamp=1.5, semaphore_name="/s", command_id=7, client_id="c", timeout=3.0),
    Transfer("b", "recv"),
    Transfer("b", "send", version=HIGHEST_VERSION),
    Transfer("b", "recv", mark=bytes(range(64))),
    WaitVersion("b", 1),
    ReadyReplicas("p", 3),
    ReadyReplicas("p", 3, "b"),
    MakeDigest("b"),
    WaitReady("b"),
    RegisterTensors(batch_id="b", tensors=[("actor", b"\x00\xff"), ("critic", b"")], bucket_size=1 << 40),
    InitPair("p", "trainer", 8, "generator", b"mesh", b"placements", b"coordinate"),
    InitPair(pair_name="p", local_name="l", expected_world_size=1, remote_name="r"),
    Announce("weights/policy", "sender/0", b"\x00\xff", body=b"table"),
    Withdraw("weights/policy", "sender/0"),
    ReadNotices("weights/policy"),
    ReadBody("0123"),
    QueryStatus("b", "transfer_signal"),
    CleanupBatch("b"),
    CancelTransfer("b"),
    HurryTransfer("b"),
    Hello(pid=3, start_time=12.25, pid_namespace=0xFFFFFFFF),
    Goodbye(),
    Ping(command_id=2**64 - 1),
    DataReady("b", "source", "target", 9, 5, chosen=True),
    DataTaken("b", "source", "target", 9, 5),
    DataRefused("b", "source", "target", 9, "VersionMismatchError", "a says 5 and b says 6"),
    DataRevoked("b", "source", "target", 9),
    DataRead("b", "source", "target", 9, 2),
    DataStands("b", "source", "target", 9, 2),
    RelayWanted("b", "relay", "target", {"source": 9}, 2),
    RelayAnswer("b", "relay", "target", 2, "ready"),
    RelayRead("b", "relay", "target", 2),
    DigestPart("b", "source", "target", 3, 4, {"p": b"\x00\xff"}),
    RegistrationClosed("b", "closed", "target", "its worker died", lost=True),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: type(command).__name__)
def test_a_command_comes_back_as_it_was(command: Message) -> None:
    again = decode_command(encode_command(command))
    assert type(again) is type(command)
    assert again == command


@pytest.mark.parametrize(
    "tensor",
    [RegisteredTensor(b"h"), RegisteredTensor(b"h", (3, 4)), RegisteredTensor(b"", (8,), (4,), lossy=True), RegisteredTensor(b"h", (), ())],
)
def test_a_tensor_comes_back_as_it_was(tensor: RegisteredTensor) -> None:
    assert RegisteredTensor.decode(tensor.encode()) == tensor
    with pytest.raises(msgspec.DecodeError):
        RegisteredTensor.decode(tensor.encode()[:-1])


def test_every_command_is_tried() -> None:
    assert {type(command) for command in COMMANDS} == set(BaseCommand.__subclasses__())


def test_the_tag_is_the_class_name_and_defaults_take_no_room() -> None:
    assert msgspec.msgpack.decode(encode_command(CleanupBatch("b"))) == {"type": "CleanupBatch", "batch_id": "b"}


def test_what_a_command_carries_is_none_of_its_positional_fields() -> None:
    with pytest.raises(TypeError):
        CleanupBatch("b", 1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "Nonsense", "batch_id": "b"},
        {"batch_id": "b"},
        {"type": "CleanupBatch"},
        {"type": "CleanupBatch", "batch_id": 5},
        {"type": "WaitVersion", "batch_id": "b", "version": 0},
        {"type": "Transfer", "batch_id": "b", "transfer_type": "send", "version": 1 << 63},
        {"type": "CleanupBatch", "batch_id": "b", "colour": "red"},
        {"type": "Transfer", "batch_id": "b", "transfer_type": "sideways"},
        {"type": "Transfer", "batch_id": "b", "transfer_type": "send", "timeout": "5"},
        {"type": "RegisterTensors", "batch_id": "b", "tensors": [["p", "text"]]},
        {"type": "RegisterTensors", "batch_id": "b", "tensors": [["p"]]},
        {"type": "Hello", "pid": 1.5, "start_time": 0.0, "pid_namespace": 0},
        {"type": "Ok"},
        [],
    ],
    ids=str,
)
def test_what_is_no_command_is_refused(fields: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_command(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize("data", [b"", b"\xc1", b"garbage", encode_command(CleanupBatch("b"))[:-1], encode_command(Goodbye()) + b"x"])
def test_what_is_no_msgpack_is_refused(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_command(data)


@pytest.mark.parametrize(
    "outcome",
    [Ok(), Ok({"bytes": 1 << 40, "spans": [["copy", 0.5]], "raw": b"\x00"}, 7), Failed("PairError", "why", "trace", 8), Failed("E", "m")],
    ids=repr,
)
def test_an_outcome_comes_back_as_it_was(outcome: Outcome) -> None:
    assert decode_outcome(encode_outcome(outcome)) == outcome


def test_an_outcome_that_msgpack_cannot_hold_is_refused_where_it_is_made() -> None:
    with pytest.raises(TypeError):
        encode_outcome(Ok(object()))


def test_a_command_is_no_outcome() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_outcome(encode_command(Goodbye()))


def test_decoding_from_a_view_copies_what_it_keeps() -> None:
    data = bytearray(encode_command(RegisterTensors("b", [("p", b"handle")])))
    command = decode_command(memoryview(data))
    data[:] = bytes(len(data))
    assert command == RegisterTensors("b", [("p", b"handle")])
