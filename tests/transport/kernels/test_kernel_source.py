"""The kernels' text: what compiles it, and what it must do without."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from etha_ray.transport.kernels import sums, table
from etha_ray.transport.kernels.source import COPY_REGIONS, SOURCE, SUM_EDGES, SUM_PIECES
from tests.accelerator.host import compiled

CODE = re.sub(r"//.*", "", SOURCE.code)


def test_it_includes_nothing_and_knows_no_header() -> None:
    """NVRTC has no headers of the system's, and may not find CUDA's."""
    assert not re.search(r"#\s*include", CODE)
    assert not re.search(r"\b(std::|__shared__|__syncthreads|__shfl|u?int\d+_t|size_t)\b", CODE)


def test_the_c_compiler_has_all_kernels() -> None:
    for kernel in (COPY_REGIONS, SUM_PIECES, SUM_EDGES):
        assert getattr(compiled(kernel.source), kernel.name)


@pytest.mark.parametrize(("name", "dtype"), [("Region", table.REGION), ("Piece", sums.PIECE), ("Edge", sums.EDGE)])
def test_tables_are_laid_out_as_the_kernels_read_them(name: str, dtype: object, tmp_path: Path) -> None:
    """The compiler itself compares sizes and offsets."""
    compiler = shutil.which("g++") or shutil.which("clang++") or pytest.skip("no C++ compiler")
    fields: dict[str, tuple[object, int]] = dtype.fields  # type: ignore[attr-defined]
    checks = [f"static_assert(sizeof({name}) == {dtype.itemsize});"]  # type: ignore[attr-defined]
    checks += [f"static_assert(__builtin_offsetof({name}, {field}) == {place[1]});" for field, place in fields.items()]
    struct = re.search(rf"struct {name} {{.*?}};", CODE, re.DOTALL)
    assert struct
    types = "typedef unsigned int u32; typedef unsigned long long u64; typedef long long s64;"
    source = tmp_path / "checks.cpp"
    source.write_text("\n".join([types, struct.group(), *checks]))
    subprocess.run([compiler, "-fsyntax-only", *SOURCE.options, str(source)], check=True)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvcc_compiles_it(architecture: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc") or pytest.skip("no nvcc on this machine")
    source = tmp_path / "kernels.cu"
    source.write_text(SOURCE.code)
    command = [nvcc, f"-arch={architecture}", "-cubin", *SOURCE.options, "-Werror", "all-warnings", "-Xptxas", "-v", str(source)]
    made = subprocess.run([*command, "-o", str(tmp_path / "kernels.cubin")], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    spilled = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", made.stderr)
    assert len(spilled) == 3
    assert set(spilled) == {("0", "0", "0")}  # registers alone: a stack would be in the memory whose bandwidth is what counts


def test_no_cast_is_an_instruction_that_flushes(tmp_path: Path) -> None:
    """cupy compiles with -ftz=true: conversions of floats would make zeros of the smallest."""
    nvcc = shutil.which("nvcc") or pytest.skip("no nvcc on this machine")
    source, made = tmp_path / "kernels.cu", tmp_path / "kernels.ptx"
    source.write_text(SOURCE.code)
    subprocess.run([nvcc, "-arch=sm_90", "-ptx", "-ftz=true", *SOURCE.options, str(source), "-o", str(made)], check=True)
    flushing = set(re.findall(r"[\w.]+\.ftz\S*", made.read_text()))
    assert flushing == {"add.ftz.f32", "mul.ftz.f32"}  # of float16 alone, whose numbers are larger


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_nvrtc_compiles_it(architecture: str) -> None:
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="cupy is not installed")
    program = nvrtc.createProgram(SOURCE.code, "kernels.cu", (), ())
    nvrtc.compileProgram(program, (*SOURCE.options, f"-arch={architecture}"))
    assert all(kernel.name.encode() in nvrtc.getCUBIN(program) for kernel in (COPY_REGIONS, SUM_PIECES, SUM_EDGES))
