"""Pages that are not written by hand: one per room of the package, one per example and configuration."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ROOMS = (
    "callback",
    "calibration",
    "methods",
    "methods.needs",
    "metrics",
    "flow",
    "stream",
    "tasks",
    "classifiers",
    "studies",
    "report",
    "parameters",
)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the pages in the navigation."""
    config.nav = [
        *(config.nav or []),
        {"Examples": [f"examples/{path.stem}.md" for path in _scripts()]},
        {"API": [f"api/{room}.md" for room in ROOMS]},
    ]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    for room in ROOMS:
        path = f"lightning_odem.{room}"
        head = f"# {path}\n\n"
        body = f"::: {path}\n    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"
        files.append(File.generated(config, f"api/{room}.md", content=head + body))
    for path in _scripts():
        text = f"# {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n"
        files.append(File.generated(config, f"examples/{path.stem}.md", content=text))
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        text = f"# {path.name}\n\n```yaml\n{path.read_text(encoding='utf-8')}```\n"
        files.append(File.generated(config, f"configs/{path.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links into the repository at the pages made from its files."""
    up = "../" * page.file.src_uri.count("/")
    return re.sub(r"\]\((?:\.\./)+(examples|configs)/(\w+)\.(?:py|yaml)\)", rf"]({up}\1/\2.md)", markdown)


def _scripts() -> list[Path]:
    return sorted((ROOT / "examples").glob("*.py"))
