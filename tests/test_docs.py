"""The pages of docs/: their code runs, and their tables say what the code says. (`make docs` checks links and names.)"""

from __future__ import annotations

import inspect
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Shard

import etha_ray
from etha_ray import errors
from etha_ray.kvstore.etcd import EtcdStore
from etha_ray.kvstore.gcs import GcsStore
from etha_ray.kvstore.tcp import TorchTCPStore
from etha_ray.layout import MeshSpec
from tests.doctor_table import table
from tests.tensor_bus.cluster import LONG, LocalCluster, local_cluster, succeed
from tests.test_readme import environment

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^([^\n]*)\n```(\w+)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
HERE = re.compile(r"<!-- executed by tests/test_docs\.py: ([\w ]+) -->")


def marked() -> dict[str, str]:
    """The blocks that are executed here, by the names that their marks give them."""
    found = {}
    for page in PAGES:
        for mark, _, code in BLOCK.findall(page.read_text()):
            name = HERE.fullmatch(mark)
            if name is not None:
                assert name[1] not in found
                found[name[1]] = code
    return found


CODE = marked()


def run(name: str, names: dict[str, Any]) -> None:
    """Run a block of Python with these names."""
    exec(compile(CODE[name], name, "exec"), names)


@pytest.fixture
def names() -> dict[str, Any]:
    """What a page takes for granted."""
    return {"etha_ray": etha_ray, "torch": torch, "Shard": Shard}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    """An agent on a thread, which `bootstrap_client` finds."""
    with local_cluster(1) as cluster:
        monkeypatch.setenv("AGENT_RANK", "0")
        monkeypatch.setenv("TENSOR_BUS_COMMAND_QUEUE_PATH", cluster.paths[0].command_queue)
        monkeypatch.setenv("TENSOR_BUS_STATE_PATH", cluster.paths[0].state)
        yield cluster


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_executed_or_says_why_not(page: Path) -> None:
    text = page.read_text()
    found = [mark for mark, _, _ in BLOCK.findall(text)]
    assert len(found) == text.count("```") / 2
    for mark in found:
        by = re.match(r"<!-- executed by (tests/[\w/]+\.py)", mark)
        assert mark.startswith("<!-- not executed here: ") or (by is not None and (ROOT / by[1]).exists()), mark


def test_whole_models(cluster: LocalCluster, names: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run("publish", names)
    run("pull", names)
    succeed(lambda: run("push", names), lambda: run("update", names))
    assert names["version"] == 1
    assert "version 1 to 0" in capsys.readouterr().out
    assert torch.equal(names["weights"]["weight"], names["model"].weight.detach())
    names["receiver"].close()
    names["sender"].close()


def test_fused_weights(cluster: LocalCluster, names: dict[str, Any]) -> None:
    parts = {f"attention.{part}_proj.weight": torch.full((2, 4), float(value)) for value, part in enumerate("qkv")}
    with etha_ray.publish(parts, "attention") as sender:
        run("fused", names)
        succeed(sender.push, names["receiver"].update)
        assert names["fused"]["attention.qkv_proj.weight"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]
        names["receiver"].close()


def test_pairs_and_pieces(names: dict[str, Any]) -> None:
    with local_cluster(1) as cluster:
        sides = [{**names, "client": cluster.client(), "rank": rank} for rank in range(2)]
        others = [cluster.client() for _ in range(2)]
        succeed(
            *[lambda side=side: run("pair", side) for side in sides],
            *[
                lambda other=other, rank=rank: other.init_pair("weights", "generator", "trainer", 2, MeshSpec((2,), (rank,)), [Shard(1)])
                for rank, other in enumerate(others)
            ],
        )
        run("piece", sides[0])
        rest = etha_ray.Piece(torch.ones(4, 8), (7, 8), (0, 0))
        whole = [torch.zeros(7, 4) for _ in others]
        made = [sides[1]["client"].register_tensors("experts", [(rest, "weights")], blocking=False)]
        made += [other.register_tensors("experts", [(one, "weights")], blocking=False) for other, one in zip(others, whole, strict=True)]
        batches = [sides[0]["batch"], *made]
        succeed(*[lambda batch=batch: batch.wait_ready(LONG) for batch in batches])
        directions = ("send", "send", "recv", "recv")
        succeed(
            *[
                lambda batch=batch, way=way: batch.transfer(way, blocking=True, timeout=LONG).result()
                for batch, way in zip(batches, directions, strict=True)
            ]
        )
        assert [one.sum().item() for one in whole] == [16, 16]


def test_explain(names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run("tokens", names)
    assert (tmp_path / "crossing.svg").exists()
    ended = subprocess.run(["bash", "-ec", CODE["explain"]], env=environment(), capture_output=True, text=True, timeout=250, check=False)
    assert ended.returncode == 0, ended.stderr


def test_stores(names: dict[str, Any]) -> None:
    run("store", names)
    run("lease", names)
    run("c10d", names)


def test_names_of_etha(names: dict[str, Any]) -> None:
    run("imports", names)


def test_the_limits_of_stores() -> None:
    page = (ROOT / "docs" / "stores.md").read_text()
    assert f"| Ray's GCS | {GcsStore.max_value_bytes >> 20} MiB |" in page
    assert f"| etcd | {EtcdStore.max_value_bytes >> 20} MiB, in chunks of 512 KiB | {EtcdStore.max_key_bytes >> 10} KiB |" in page
    store = TorchTCPStore("127.0.0.1", 0, None, True)
    try:
        assert (store.max_value_bytes, store.max_key_bytes) == ((8 << 20) - 32, (8 << 10) - 1)
        assert "| TCPStore (libuv) | 8 MiB less 32 bytes | 8 KiB less 1 byte |" in page
    finally:
        store.close()


def test_what_the_doctor_says() -> None:
    assert table() in (ROOT / "docs" / "troubleshooting.md").read_text(), "python -m tests.doctor_table prints the table as it should be"


def test_all_errors_are_listed_with_their_builtins() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|", (ROOT / "docs" / "failures.md").read_text(), flags=re.MULTILINE)
    tree = re.findall(r"^[│├└─ ]+(\w+Error) +(\w+)", inspect.getdoc(errors) or "", flags=re.MULTILINE)
    assert rows == tree
    for name, builtin in rows:
        assert issubclass(
            getattr(errors, name), __builtins__[builtin] if isinstance(__builtins__, dict) else getattr(__builtins__, builtin)
        )
    declared = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.EthaRayError)}
    assert declared == {"EthaRayError", *(name for name, _ in rows)}


def test_the_reference_has_every_public_name() -> None:
    listed = re.findall(r"^::: etha_ray\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(etha_ray.__all__)


def test_the_site_has_every_notebook() -> None:
    listed = re.findall(r": notebooks/(\w+)\.md$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    assert listed == [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]


def test_every_cell_that_compares_has_its_source() -> None:
    section = (ROOT / "README.md").read_text().partition("\n## Beside others\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|")[1:] for line in section.splitlines() if line.startswith("| ")]
    assert len(rows) > 5
    sources = set(re.findall(r"^\[([\w-]+)\]: https://", section, flags=re.MULTILINE))
    for cell in (cell.strip() for row in rows[1:] for cell in row):
        named = set(re.findall(r"\]\[([\w-]+)\]", cell))
        pages = re.findall(r"\]\(([\w./-]+)", cell)
        assert cell == "unknown" or named or pages, cell
        assert named <= sources
        assert all((ROOT / page).exists() for page in pages), cell


def test_no_block_is_forgotten() -> None:
    source = Path(__file__).read_text()
    assert [name for name in CODE if f'run("{name}", ' not in source and f'CODE["{name}"]' not in source] == []
