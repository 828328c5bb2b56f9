"""One line of the doctor's."""

from __future__ import annotations

from typing import Literal

import msgspec


class Check(msgspec.Struct, frozen=True):
    """What was looked at, how it is, what was found, and what to do; the remedy is empty where all is well.

    warn: it works, but not for everything, or not for long. fail: etha_ray does not work here.
    """

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def ok(name: str, found: str) -> Check:
    """All is well."""
    return Check(name, "ok", found)


def warn(name: str, found: str, remedy: str) -> Check:
    """It works, and may not always."""
    return Check(name, "warn", found, remedy)


def fail(name: str, found: str, remedy: str) -> Check:
    """It does not work."""
    return Check(name, "fail", found, remedy)
