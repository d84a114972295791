"""What `mkdocs build` does to each page: links that leave docs/ go to the file in the repository.

MkDocs calls `on_page_markdown` itself; mkdocs.yml names this file. In the repository the links work as they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"\]\((\.\./[^)\s#]+)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Return the page's text with the address of the repository in front of links to files outside docs/."""
    docs = Path(config["docs_dir"]).resolve()
    folder = (docs / page.file.src_uri).parent

    def to_repository(link: re.Match[str]) -> str:
        target = (folder / link[1]).resolve()
        if target.is_relative_to(docs) or not target.exists():
            return link[0]  # another page, or a fault that MkDocs reports
        kind = "tree" if target.is_dir() else "blob"
        return f"]({config['repo_url'].rstrip('/')}/{kind}/main/{target.relative_to(docs.parent).as_posix()}"

    return _LINK.sub(to_repository, markdown)
