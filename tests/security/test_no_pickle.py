"""Nothing in the package runs what bytes of another process say. What pickles all the same, among processes that trust one another, is
listed here, each with the reason; anything new fails."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

import etha_ray
from etha_ray import agent_actor, ray_nodes
from etha_ray.agent_actor import AgentActor
from etha_ray.tensor_bus.ray_lookup import PoolEntry, PoolSettings
from tests.tensor_bus.cluster import local_cluster

PACKAGE = Path(etha_ray.__file__).parent
MODULES = {
    *("pickle", "_pickle", "pickletools", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "jsonpickle", "yaml", "copyreg"),
    *(
        "multiprocessing",
        "concurrent.futures.process",
        "ray.cloudpickle",
        "torch.multiprocessing",
        "torch.package",
        "torch.distributed.rpc",
    ),
    *("xmlrpc", "Pyro4", "rpyc", "code", "codeop", "runpy", "imp", "dbm", "zodb"),
}
"""Those that make objects, or code, of bytes, and what is in them."""
CALLS = {
    *("eval", "exec", "compile", "__import__", "import_module", "importlib.import_module", "torch.load", "torch.save", "torch.jit.load"),
    *("numpy.load", "np.load", "numpy.save", "np.save", "pandas.read_pickle", "logging.config.listen", "torch.hub.load"),
}
PICKLING = {"Queue", "SimpleQueue", "JoinableQueue", "Manager", "Pool", "ProcessPoolExecutor", "Process", "Listener", "ShareableList"}
"""Classes of multiprocessing that send objects."""
COLLECTIVES = "_object", "_object_list"
"""How torch.distributed's functions end that send objects."""
RAY = {"ray.get", "ray.put", "ray.remote", "on_cluster"}
"""Ray pickles what it carries, and so do actors: whatever is called ``.remote``."""

ONE_CLUSTER = "processes of one Ray cluster, which run one another's code by design: only Python's own types are given and taken"
OWN_CHILD = "a process that this one starts: what it is to do is pickled for it alone, and what is said later are bytes that are parsed"
BENCH = "a benchmark of Ray itself, whose actors and arrays are its own"
NAMES = "imports a module by a name that is written in that very file"

ALLOWED = {
    "__init__.py": (NAMES, {"calls import_module"}),
    "agent_actor.py": (ONE_CLUSTER, {"calls actor.health.remote", "calls options.remote", "calls ray.get", "calls ray.remote"}),
    "bench/agent_plan.py": (
        OWN_CHILD,
        {"imports multiprocessing.get_context", "imports multiprocessing.connection.Connection", "makes a context.Process"},
    ),
    "bench/giver.py": (OWN_CHILD, {"imports multiprocessing", "imports multiprocessing.connection.Connection", "makes a context.Process"}),
    "bench/gpu_nccl.py": (OWN_CHILD, {"imports multiprocessing.connection.Connection", "calls importlib.import_module"}),
    "bench/network.py": (OWN_CHILD, {"imports multiprocessing.connection.Connection"}),
    "bench/ray_baseline.py": (
        BENCH,
        {
            *("calls ray.get", "calls ray.put", "calls ray.remote", "calls actor.remote", "calls source.remote", "calls target.remote"),
            *("calls actor.pull.remote", "calls actor.put.remote", "calls actor.wrong.remote", "calls noop.remote"),
            "calls self._actor.noop.remote",
        },
    ),
    "demo/roles.py": (OWN_CHILD, {"imports multiprocessing.connection.Connection"}),
    "demo/show.py": (OWN_CHILD, {"imports multiprocessing", "makes a context.Process"}),
    "doctor/software.py": (NAMES, {"calls importlib.import_module"}),
    "kvstore/__init__.py": (NAMES, {"calls import_module"}),
    "ray_nodes.py": (
        ONE_CLUSTER,
        {
            *("calls ray.get", "calls ray.remote", "calls ray.remote(call).options(num_cpus=0).remote"),
            "calls remote.options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)).remote",
        },
    ),
    "runtime.py": (
        ONE_CLUSTER,
        {"calls on_cluster", "calls ray.get", "calls actor.describe.remote", "calls actor.inspect.remote", "calls actor.stop.remote"},
    ),
    "testing/__init__.py": (NAMES, {"calls import_module"}),
}
"""By file: why, and what."""


def dangers(source: str) -> Iterator[str]:
    """Imports and calls in a file that make objects, or code, of bytes."""
    processes = "multiprocessing" in source or "concurrent" in source
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (f"imports {found}" for found in _imported(node) if _within(found, MODULES))
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            last = called.rpartition(".")[2]
            if called in CALLS | RAY or called.endswith(".remote") or last.endswith(COLLECTIVES):
                yield f"calls {called}"
            if processes and last in PICKLING:
                yield f"makes a {called}"
            if called.endswith(".recv") and not node.args:
                yield f"calls {called}, which unpickles what comes from a pipe of multiprocessing"
            if any(keyword.arg == "shell" for keyword in node.keywords):
                yield "starts a shell"
            if any(keyword.arg in ("allow_pickle", "weights_only") for keyword in node.keywords):
                yield f"says {called} may unpickle, or not"


def _imported(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif not node.level:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _within(found: str, modules: set[str]) -> bool:
    parts = found.split(".")
    return any(".".join(parts[:end]) in modules for end in range(1, len(parts) + 1))


def test_the_package_has_what_is_allowed_and_no_more() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 150
    found = {str(file.relative_to(PACKAGE)): set(dangers(file.read_text())) for file in files}
    assert {file: whats for file, whats in found.items() if whats} == {file: whats for file, (_, whats) in ALLOWED.items()}, (
        "is it of a process that this one must not trust? then it must go; if not, say why in ALLOWED"
    )


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from ray import cloudpickle",
        "import torch\ntorch.load('x', weights_only=True)",
        "import numpy as np\nnp.load('x')",
        "eval('1')",
        "pipe.recv()",
        "import shelve, marshal",
        "import torch.multiprocessing as mp",
        "from multiprocessing.connection import Listener",
        "from multiprocessing import get_context\nget_context().Manager()",
        "from concurrent.futures import ProcessPoolExecutor\nProcessPoolExecutor()",
        "import torch.distributed as dist\ndist.broadcast_object_list([1])",
        "dist.all_gather_object([1], 2)",
        "actor.anything.remote()",
        "ray.get(answer)",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "importlib.import_module(name)",
    ],
)
def test_the_search_finds_them(source: str) -> None:
    assert list(dangers(source))


@pytest.mark.parametrize(
    "source", ["from concurrent.futures import Future", "import torch.distributed", "pipe.recv_bytes()", "sock.recv(9)"]
)
def test_the_search_finds_nothing_else(source: str) -> None:
    assert not list(dangers(source))


PLAIN = (str, int, float, bool, bytes, type(None))


def is_plain(value: Any) -> bool:
    """Whether it is of Python's own types alone, whose pickles name no class and no function."""
    if type(value) is dict:
        return all(is_plain(key) and is_plain(each) for key, each in value.items())
    return all(map(is_plain, value)) if type(value) in (list, tuple) else type(value) in PLAIN


def test_what_agents_say_through_ray_is_plain() -> None:
    answers = {name: get_type_hints(method)["return"] for name, method in vars(AgentActor).items() if name[0] != "_" and callable(method)}
    assert answers == {"health": bool, "describe": dict[str, Any], "inspect": bytes, "stop": type(None)}
    with local_cluster(1) as cluster:
        cluster.client(0)
        assert is_plain(cluster.agents[0].describe())


def test_what_agents_are_given_through_ray_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    class Remote:
        def options(self, **_: Any) -> Remote:
            return self

        def remote(self, *arguments: Any) -> None:
            given.extend(arguments)

    monkeypatch.setattr(agent_actor.ray, "remote", lambda _: Remote())
    settings = PoolSettings(True, "gcs://", 1 << 20, "auto", "auto", False)
    agent_actor.start_actors("pool", [PoolEntry(0, "0" * 56, "cpu", "/q", "/s")], settings)
    monkeypatch.setattr(ray_nodes, "live_nodes", lambda: [{"NodeID": "0" * 56, "Alive": True}])
    monkeypatch.setattr(ray_nodes.ray, "wait", lambda *_, **__: ([], []))
    ray_nodes.clean_nodes([PoolEntry(0, "0" * 56, "cpu", "/q", "/s")])
    assert len(given) == 7
    assert is_plain(given)
