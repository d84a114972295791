"""The documentation site builds without a warning, and its menu has every page."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from scripts_as_modules import load_script

ROOT = Path(__file__).parents[1]
NEEDED = ("mkdocs", "material", "mkdocstrings")


def menu_pages() -> list[str]:
    """The pages that the menu names, in its order."""
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        inside = entry.values() if isinstance(entry, dict) else entry
        return [page for part in inside for page in pages(part)]  # type: ignore[attr-defined]

    return pages(config["nav"])


def test_the_menu_has_every_page_once() -> None:
    there = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(menu_pages()) == sorted(there)


def test_the_reference_has_every_documented_name() -> None:
    import querybridge

    text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    documented = [f"::: {module}.{name}\n" for name, module in querybridge._MODULES.items()]
    assert [line for line in documented if line not in text + "\n"] == []


def test_links_that_leave_the_docs_go_to_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    site_links = load_script("site_links", monkeypatch)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="api/batch.md"))
    config = {"docs_dir": str(ROOT / "docs"), "repo_url": "https://example.org/repository/"}
    text = "[a](../batch.md) [b](../../README.md#x) [c](../../qformer) [d](../../gone.md) [e](https://x.org)"
    assert site_links.on_page_markdown(text, page=page, config=config, files=None) == (
        "[a](../batch.md) [b](https://example.org/repository/blob/main/README.md#x)"
        " [c](https://example.org/repository/tree/main/qformer) [d](../../gone.md) [e](https://x.org)"
    )


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED), reason="the extra 'docs' is not installed"
)
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    reference = (tmp_path / "site" / "api" / "answering" / "index.html").read_text(encoding="utf-8")
    assert all(text in reference for text in ("serve.adapter.load_adapter", "offline", "Raises:", "UserError"))
