"""Build the API reference from the docstrings, and check the links of every page.

Native classes are documented by their stub. Usage: `build_docs.py FOLDER`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pdoc

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def broken_links(page: Path) -> list[str]:
    """Name every relative link of a Markdown page that leads nowhere."""
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found: list[str] = []
    for target in LINK.findall(text):
        path = target.partition("#")[0]
        if path and "://" not in path and not (page.parent / path).exists():
            found.append(f"{page}: no file {path}")
    return found


def undocumented(module: pdoc.doc.Module) -> list[str]:
    """Name every public thing of a module that has no docstring."""
    return [
        f"{module.fullname}.{member.qualname}: no docstring"
        for member in module.flattened_own_members
        if not member.docstring and not member.qualname.rpartition(".")[2].startswith("_")
    ]


def main() -> int:
    """Build; exit code 1 if a link is broken or something public is not documented."""
    output = Path(sys.argv[1])
    pdoc.render.configure(docformat="google", show_source=False)
    modules = ["anyfabric", "anyfabric.errors", "anyfabric.config"]
    pdoc.pdoc(*modules, output_directory=output)
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    pages = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    found = [line for page in sorted(set(pages)) if Path(page).is_file() for line in broken_links(Path(page))]
    for name in modules:
        found += undocumented(pdoc.doc.Module.from_name(name))
    for line in found:
        print(f"docs: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
