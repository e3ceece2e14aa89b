"""mkdocs' hook: pages that are kept elsewhere in the repository, and links that leave docs/."""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "index.md": "README.md",
    "training.md": "examples/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "first_steps.md": "docs/first_steps.ipynb",
}
SOURCE = re.compile(r'src="([^":]+)"')  # of an image in HTML, which mkdocs leaves as it is
LINK = re.compile(r"(!?)\[([^\[\]]+)\]\(([^()\s#:]+)(#[^()\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page, source in ELSEWHERE.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=as_markdown(text) if source.endswith(".ipynb") else text))
    for figure in (ROOT / "examples").rglob("*.png"):
        files.append(File.generated(config, figure.relative_to(ROOT).as_posix(), abs_src_path=str(figure)))
    return files


def as_markdown(notebook: str) -> str:
    """The cells of a notebook, without what they printed."""
    cells: list[dict[str, Any]] = json.loads(notebook)["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    fenced = [
        f"```python\n{text}\n```" if cell["cell_type"] == "code" else text
        for cell, text in zip(cells, texts, strict=True)
    ]
    return "\n\n".join(fenced)


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are right in the repository become links as they are right on the site."""
    uri = page.file.src_uri
    folder = (ROOT / ELSEWHERE.get(uri, f"docs/{uri}")).parent
    pages = {source: page for page, source in ELSEWHERE.items()}

    def name_of(target: str) -> str:
        """A target's path in the repository, or nothing where there is no such file."""
        path = (folder / target).resolve()
        return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) and path.exists() else ""

    def on_site(name: str) -> File | None:
        return files.get_file_from_path(pages.get(name, name.removeprefix("docs/")))

    def link(found: re.Match[str]) -> str:
        image, text, target, anchor = found.groups()
        name = name_of(target)
        if not name:
            return found[0]  # mkdocs says what is wrong with it
        file = on_site(name)
        if file is not None:
            return f"{image}[{text}]({'../' * uri.count('/')}{file.src_uri}{anchor or ''})"
        return f"`{name}`" if name.endswith(text.strip("`")) else f"{text} (`{name}`)"

    def source(found: re.Match[str]) -> str:
        file = on_site(name_of(found[1]))
        return found[0] if file is None else f'src="{get_relative_url(file.url, page.url)}"'

    return SOURCE.sub(source, LINK.sub(link, markdown))
