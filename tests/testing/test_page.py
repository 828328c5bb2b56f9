"""The examples of docs/testing.md, run as the project of a user."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

PAGE = Path(__file__).parent.parent.parent / "docs" / "testing.md"


@pytest.mark.local_mode
def test_the_examples_pass(pytester: pytest.Pytester) -> None:
    block = r"<!-- executed by tests/testing/test_page\.py: (\w+)\.py -->\n```python\n(.*?)```"
    files = dict(re.findall(block, PAGE.read_text(), re.DOTALL))
    assert list(files) == ["trainer", "test_trainer", "test_actors", "test_stores"]
    pytester.makepyfile(**files)
    tests = [f"{name}.py" for name in files if name.startswith("test_")]
    ended = pytester.runpytest_subprocess("-rs", "-k", "not gcs", *tests, timeout=250)  # it is test_stores', and a second Ray
    skipped = ended.parseoutcomes().get("skipped", 0)  # etcd, where there is none
    ended.assert_outcomes(passed=8 - skipped, skipped=skipped, deselected=1)
    assert skipped in (0, 1)
