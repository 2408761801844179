"""Build the API reference from the docstrings, and check the links of every page.

The native module is documented by its stub, which stands in for it here: the reference is the same with and
without a build, and stubtest keeps it true. Usage: `build_docs.py FOLDER`.
"""

from __future__ import annotations
import __future__

import importlib
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pdoc

PACKAGE = Path(__file__).parent.parent / "python" / "anyfabric"
MODULES = ("anyfabric", "anyfabric.errors", "anyfabric.config")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def load_stub() -> None:
    """Put the stub in the place of the native module.

    The stub names types of the package and the package imports the native module: a bare package stands in
    while the stub is loaded.
    """
    bare = types.ModuleType("anyfabric")
    bare.__path__ = [str(PACKAGE)]
    sys.modules["anyfabric"] = bare
    path = PACKAGE / "_core.pyi"
    stub = types.ModuleType("anyfabric._core")
    stub.__file__ = str(path)
    # In a stub, a name may be used before it is defined.
    flags = __future__.annotations.compiler_flag
    exec(compile(path.read_text(encoding="utf-8"), path, "exec", flags), stub.__dict__)
    stub.__dict__["__version__"] = "development"
    del sys.modules["anyfabric"]
    sys.modules[stub.__name__] = stub
    # The public engine is documented with what it inherits from the native one, which has no page.
    public = importlib.import_module("anyfabric").Engine
    for name, member in vars(stub.__dict__["Engine"]).items():
        if not name.startswith("_") and name not in vars(public):
            setattr(public, name, member)
    public.__bases__ = (types.new_class("Native"),)


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
    load_stub()
    # The field of a named tuple keeps its annotation as text, which pdoc cannot resolve; it prints the text.
    warnings.filterwarnings("ignore", "Error parsing type annotation ForwardRef", UserWarning)
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc(*MODULES, output_directory=Path(sys.argv[1]))
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    pages = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    found = [line for page in sorted(set(pages)) if Path(page).is_file() for line in broken_links(Path(page))]
    for name in MODULES:
        found += undocumented(pdoc.doc.Module.from_name(name))
    for line in found:
        print(f"docs: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
