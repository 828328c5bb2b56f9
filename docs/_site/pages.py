"""What mkdocs is told beyond mkdocs.yml: every page of docs/ is in the navigation, and notebooks become pages."""

from __future__ import annotations

import json
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Pages that mkdocs.yml does not place come last in the guide."""
    placed = (ROOT / "mkdocs.yml").read_text()
    guide = next(entry["Guide"] for entry in config.nav or [] if "Guide" in entry)
    guide += [path.name for path in sorted((ROOT / "docs").glob("*.md")) if f": {path.name}\n" not in placed]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook: its text and its code, as they are kept in git, without outputs."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        text = "\n\n".join(_shown(cell["cell_type"], "".join(cell["source"])) for cell in cells)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=_with_links_from_here(text) + "\n"))
    return files


def _shown(kind: str, source: str) -> str:
    return source if kind == "markdown" else f"```python\n{source}\n```"


def _with_links_from_here(text: str) -> str:
    """Links to pages, which a notebook has relative to its folder; folders of code have no page."""
    return text.replace("](../docs/", "](../").replace("[actors/](../actors/)", "`actors/`")
