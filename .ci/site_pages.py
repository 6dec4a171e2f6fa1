"""What the site has besides the pages in docs/: the README as its front, the project's files, examples and the API.

Links in the pages are those of the repository; here they lead to the same thing on the site.
"""

import re
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
PACKAGES = ("pipelines", "models", "trainers", "tools")


def module(path: str) -> str:
    """The module of a file or folder: ``pipelines/rng.py`` is ``amimv.pipelines.rng``."""
    return "amimv." + path.removesuffix(".py").removesuffix("/__init__").removeprefix("amimv/").replace("/", ".")


def modules() -> list[str]:
    """The files of all modules, from the root, each package's before the next."""
    files = [path for name in ("amimv", *PACKAGES) for path in sorted((ROOT / name).rglob("*.py"))]
    public = [path.relative_to(ROOT).as_posix() for path in files if not path.is_symlink()]
    return [path for path in public if path != "amimv/__init__.py" and not re.search(r"/_(?!_)", path)]


def place_of(path: str) -> str:
    """Where a file of the repository is on the site; empty where it is not."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        page = path.removeprefix("docs/")
        if page.startswith("examples"):
            return page.replace(".py", ".md") if "." in page else f"{page}/README.md"
        return page if (ROOT / path).is_file() else ""
    if path.split("/")[0] in PACKAGES and (path.endswith(".py") or (ROOT / path / "__init__.py").is_file()):
        return f"api/{module(path)}.md"
    return f"files/{path}" if path.endswith((".yaml", "LICENSE", ".cff")) else ""


def on_config(config: Any) -> Any:
    """The API's pages behind the others."""
    tree: dict[str, list] = {}
    for path in modules():
        tree.setdefault(module(path.split("/")[0]), []).append({module(path): f"api/{module(path)}.md"})
    config.nav.append({"API": [{name: pages} for name, pages in tree.items()]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds what is not a page in docs/."""
    for path, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    for path in modules():
        name = module(path)
        files.append(File.generated(config, f"api/{name}.md", content=f"::: {name}\n"))
    for example in (ROOT / "docs" / "examples").glob("*.py"):
        text = f"# {example.name}\n\n```python\n{example.read_text()}```\n"
        files.append(File.generated(config, f"examples/{example.stem}.md", content=text))
    for file in [*(ROOT / "trainers" / "configs").rglob("*.yaml"), ROOT / "LICENSE", ROOT / "CITATION.cff"]:
        page = place_of(file.relative_to(ROOT).as_posix())
        files.append(File.generated(config, page, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are on the site; what is not on it is text."""
    here = page.file.src_uri
    folder = "" if here in PAGES.values() else f"docs/{dirname(here)}"

    def follow(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        target = place_of(normpath(f"{folder}/{target}".lstrip("/")))
        return f"{text}({relpath(target, dirname(here) or '.')}{anchor})" if target else text.lstrip("!")[1:-1]

    return re.sub(r"(!?\[(?:[^][]|\[[^]]*\])*\])\((?!https?:|#|mailto:)([^)#\s]+)(#[^)]*)?\)", follow, markdown)
