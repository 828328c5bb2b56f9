"""How a command ends that cannot do what it was asked."""

from __future__ import annotations

import typer
from rich.console import Console


def failed(error: Exception) -> typer.Exit:
    """Say on stderr what went wrong; raise what is returned, and the command ends with code 1."""
    Console(stderr=True, highlight=False).print(f"error: {error}", style="red", markup=False)
    return typer.Exit(1)
