"""What `make docs` adds to mkdocs: pages and files from outside of docs/, with links that hold on the code host too.

README.md is the site's first page. A link in a page is relative to its file in the repository; here it becomes relative
to the page that the file has become, and a file that is no page (a table, a picture) is copied.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
# Pages from elsewhere: the file in the repository, and the page of the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": "examples.md",
    "integrations/comfyui/README.md": "comfyui.md",
}
_LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


def page_of(path: str) -> str | None:
    """The page of the site that a file of the repository has become, or None."""
    if path in PAGES:
        return PAGES[path]
    inside = path.removeprefix("docs/")
    return inside if inside != path and path.endswith(".md") else None


def source_of(page: str) -> str:
    """The file in the repository that a page comes from."""
    return next((source for source, name in PAGES.items() if name == page), f"docs/{page}")


def with_links(markdown: str, page: str, copied: set[str]) -> str:
    """The text of a page with the links of the site; files that are no pages are added to `copied`."""
    source = source_of(page)

    def replace(link: re.Match[str]) -> str:
        target = link[2]
        if "://" in target or target.startswith("mailto:"):
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        name = page_of(path)
        if name is None:
            if not (ROOT / path).is_file():
                raise PluginError(f"{source}: links to {target}, which is no file")
            copied.add(path)
            name = path
        return f"{link[1]}{posixpath.relpath(name, posixpath.dirname(page) or '.')}{link[3]}"

    parts = _CODE.split(markdown)
    return "".join(part if index % 2 else _LINK.sub(replace, part) for index, part in enumerate(parts))


def on_files(files: Files, config: Any) -> Files:
    copied: set[str] = set()
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    for file in files.documentation_pages():
        with_links(file.content_string, file.src_uri, copied)
    for path in sorted(copied):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    return with_links(markdown, page.file.src_uri, set())
