"""What a benchmark found: figures with their units, ratios to its baselines, and the machine they hold for."""

from __future__ import annotations

import math
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One measured number. Its name ends in its unit; ``reach`` is the most it may be, where it has a goal."""

    name: str
    value: float
    what: str
    reach: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal was met; None without one."""
        return None if self.reach is None else self.value <= self.reach


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as a baseline; ``reach`` is the least it may be, where it has a goal."""

    name: str
    value: float
    what: str
    reach: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal was met; None without one."""
        return None if self.reach is None else self.value >= self.reach


@dataclass(frozen=True)
class BenchResult:
    """All that one benchmark found."""

    bench: str
    figures: Sequence[Figure]
    ratios: Sequence[Ratio]
    machine: Mapping[str, str | int | float] = field(default_factory=lambda: describe_machine())

    def as_dict(self) -> dict[str, Any]:
        """``bench``, ``figures`` and ``ratios`` by name, ``machine``: plain data for JSON."""
        return {
            "bench": self.bench,
            "figures": {figure.name: _rounded(figure.value) for figure in self.figures},
            "ratios": {ratio.name: _rounded(ratio.value) for ratio in self.ratios},
            "machine": dict(self.machine),
        }

    def table(self) -> Table:
        """The same for people, with the goals."""
        machine = self.machine
        processor = machine.get("gpu", machine["cpu"])
        table = Table(
            title=f"bench {self.bench}",
            caption=f"{processor}, {machine['cores']} cores, torch {machine['torch']}, ray {machine['ray']}, {machine['date']}",
            title_justify="left",
            caption_justify="left",
        )
        table.add_column("figure")
        table.add_column("value", justify="right")
        table.add_column("goal", justify="right")
        table.add_column("what it is", overflow="fold")
        for figure in self.figures:
            table.add_row(figure.name, _text(figure.value), _goal("≤", figure.reach, figure.met), figure.what)
        if self.ratios:
            table.add_section()
        for ratio in self.ratios:
            table.add_row(ratio.name, f"{_text(ratio.value)}×", _goal("≥", ratio.reach, ratio.met), ratio.what)
        return table


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _text(value: float) -> str:
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _goal(sign: str, reach: float | None, met: bool | None) -> str:
    if reach is None:
        return ""
    return f"[green]{sign} {reach:g} met[/]" if met else f"[red]{sign} {reach:g} missed[/]"


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of ``values`` that at least ``percent`` of 100 of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def median(values: Sequence[float]) -> float:
    """The 50th `percentile`."""
    return percentile(values, 50)


def interleaved(rounds: int, measures: Mapping[str, Callable[[], Sequence[float]]]) -> dict[str, list[float]]:
    """Take every measure once a round, in turns, so that a noisy machine hits all of them alike; all samples by name."""
    samples: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}: {', '.join(measures)}")
        for name, measure in measures.items():
            samples[name].extend(measure())
    return samples


def progress(text: str) -> None:
    """Say on stderr what is being done."""
    Console(stderr=True, highlight=False).print(f"{time.strftime('%H:%M:%S')} {text}", style="dim", markup=False)


def describe_machine() -> dict[str, str | int | float]:
    """CPU model, cores, memory in GiB, kernel, versions and the date."""
    return {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "ray": _version("ray"),
        "load_average": round(psutil.getloadavg()[0], 2),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
