from __future__ import annotations

import socket

import pytest

from etha_ray.errors import ConfigError
from etha_ray.net import Address, no_listener


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (Address("10.0.0.1", 80), "10.0.0.1:80"),
        (Address("node-3.cluster", 65535), "node-3.cluster:65535"),
        (Address("::1", 80), "[::1]:80"),
        (Address("fe80::1%eth0", 1), "[fe80::1%eth0]:1"),
    ],
)
def test_there_and_back(address: Address, text: str) -> None:
    assert str(address) == text
    assert Address.parse(text) == address


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":80", "::1:80", "[host]:80", "[]:80", "host:0", "host:65536", "host:-1", "host:８0"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        Address.parse(text)


def test_whether_somebody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert no_listener(f"127.0.0.1:{port}") == no_listener(f"ray://127.0.0.1:{port}") == ""
    assert "refused" in no_listener(f"127.0.0.1:{port}")
    assert "refused" in no_listener(f"ray://127.0.0.1:{port}")
    assert no_listener("127.0.0.1:99999999")
    for no_such in ("auto", "local", "", "http://127.0.0.1:8265/x"):
        assert no_listener(no_such) == ""
