"""Nothing in the package can run what bytes of another process say."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import etha_ray

PACKAGE = Path(etha_ray.__file__).parent
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle", "yaml"}
PICKLING = {"Queue", "SimpleQueue", "JoinableQueue", "Manager", "Pool", "ProcessPoolExecutor"}
"""Classes of multiprocessing that send objects."""
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.jit.load", "numpy.load", "np.load"}


def dangers(source: str, name: str) -> Iterator[str]:
    """Imports and calls in a file that make objects, or code, of bytes."""
    processes = "multiprocessing" in source or "concurrent" in source
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{name}:{node.lineno} imports {found}" for found in names if found.partition(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in CALLS:
                yield f"{name}:{node.lineno} calls {called}"
            if processes and called.rpartition(".")[2] in PICKLING:
                yield f"{name}:{node.lineno} makes a {called}, which sends pickled objects"
            if called.endswith(".recv") and not node.args:
                yield f"{name}:{node.lineno} unpickles what comes from a pipe of multiprocessing"
            if any(keyword.arg == "shell" for keyword in node.keywords):
                yield f"{name}:{node.lineno} starts a shell"


def test_the_package_has_none() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 150
    assert [found for file in files for found in dangers(file.read_text(), str(file.relative_to(PACKAGE)))] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "eval('1')",
        "pipe.recv()",
        "multiprocessing.Queue()",
        "from multiprocessing import get_context\nget_context().Manager()",
        "import subprocess\nsubprocess.run('x', shell=True)",
    ],
)
def test_the_search_finds_them(source: str) -> None:
    assert list(dangers(source, "x"))
