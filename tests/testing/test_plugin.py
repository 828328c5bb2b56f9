"""The plugin in pytest runs of its users."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]


def imported(statement: str) -> set[str]:
    """The modules that a Python has loaded after it."""
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split())


def test_importing_it_loads_neither_torch_nor_ray() -> None:
    """Nor anything else that takes time: pytest does it at every start."""
    bare = imported("import pytest")
    assert not any(name.split(".")[0] in ("torch", "ray", "numpy", "lmdb", "grpc") for name in bare)
    added = {name.split(".")[0] for name in imported("import etha_ray.testing.plugin") - bare}
    assert added <= {"etha_ray"}


@pytest.fixture
def alone(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project of somebody else's: nothing of this one's settings."""
    for name in ("PYTEST_ADDOPTS", "ETHA_RAY_TEST_ETCD"):
        monkeypatch.delenv(name, raising=False)
    return pytester


def test_a_run_that_uses_none_of_it_is_as_without(alone: pytest.Pytester) -> None:
    """Also where warnings and unknown marks are errors, and fixtures of these names are the project's own."""
    alone.makepyfile(
        """
        import sys
        import pytest

        @pytest.fixture
        def tensor_bus():
            return "mine"

        def test_own(tensor_bus):
            assert tensor_bus == "mine"
            assert not {"torch", "ray", "numpy"} & sys.modules.keys()
        """
    )
    ended = alone.runpytest_subprocess("-W", "error", "--strict-markers", "--strict-config", "-p", "no:cacheprovider")
    ended.assert_outcomes(passed=1)
    assert ended.errlines == []


def test_fixtures_say_what_they_are(alone: pytest.Pytester) -> None:
    listed = alone.runpytest_subprocess("--fixtures")
    listed.stdout.fnmatch_lines([f"{name}*etha_ray/testing/plugin.py*" for name in ("ray_local", "ray_cluster", "tensor_bus", "kv_store")])
    assert "no docstring" not in "\n".join(line for line in listed.outlines if "etha_ray" in line)


def test_where_no_etcd_is_installed_it_is_skipped_with_the_install_line(alone: pytest.Pytester) -> None:
    alone.makeconftest("import os\nos.environ['PATH'] = '/nowhere'")
    alone.makepyfile(test_it="def test_it(kv_store):\n    kv_store.set('k', 'v')")
    ended = alone.runpytest_subprocess("-rs", "-k", "memory or etcd")
    ended.assert_outcomes(passed=1, skipped=1, deselected=2)
    ended.stdout.fnmatch_lines(["SKIPPED*etcd is not installed: apt-get install etcd-server*"])
