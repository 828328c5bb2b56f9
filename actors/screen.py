"""How an application here ends: failures that a user can meet, as one line and an exit status."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import ray
import typer
from rich.console import Console
from rich.text import Text


class BadInputError(Exception):
    """The job cannot be done as asked."""


@contextmanager
def bad_input() -> Iterator[None]:
    """What goes wrong in here is the user's: raises `BadInputError`."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise BadInputError(str(error)) from error


@contextmanager
def exit_codes(screen: Console) -> Iterator[None]:
    """Failures that a user can meet, as one line and an exit status. Others keep their traceback."""
    try:
        yield
    except BadInputError as error:
        _say(screen, error)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        screen.print("Interrupted.")
        raise typer.Exit(130) from error
    except (ConnectionError, TimeoutError, MemoryError, ray.exceptions.RayActorError) as error:
        _say(screen, getattr(error, "cause", None) or error)
        raise typer.Exit(1) from error


def _say(screen: Console, error: BaseException) -> None:
    screen.print(Text.assemble(("Error: ", "bold red"), str(error)), soft_wrap=True)
