"""Check the budgets of the code: lines of a file, lines of a function, parameters.

A file has at most 500 lines, a function 70, and 5 parameters that can be passed by position. Files with a
reason to be longer are listed with it. Functions are counted in Python only, without their docstrings: saying
less makes nothing shorter. Clippy counts those of Rust.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70
MAX_PARAMETERS = 5

EXCEPTIONS = {
    "python/anyfabric/_core.pyi": "one native module has one stub, and it is where its documentation lives",
}


def over_budget(path: Path, text: str) -> list[str]:
    """Name what is over budget in one file."""
    found: list[str] = []
    num_lines = text.count("\n")
    if num_lines > MAX_FILE_LINES and str(path) not in EXCEPTIONS:
        found.append(f"{path}: {num_lines} lines, at most {MAX_FILE_LINES}")
    if path.suffix != ".py":
        return found
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        first = node.body[0]
        has_docstring = ast.get_docstring(node, clean=False) is not None
        num_docstring = (first.end_lineno or first.lineno) - first.lineno + 1 if has_docstring else 0
        length = (node.end_lineno or node.lineno) - node.lineno + 1 - num_docstring
        if length > MAX_FUNCTION_LINES:
            found.append(
                f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"
            )
        positional = [a for a in node.args.posonlyargs + node.args.args if a.arg not in {"self", "cls"}]
        is_command = any(
            "click" in ast.unparse(d) or "command" in ast.unparse(d) for d in node.decorator_list
        )
        # By position, by name on purpose, or filled in by click from a command line.
        if len(positional) > MAX_PARAMETERS and not is_command and path.name != "_hooks.py":
            found.append(
                f"{path}:{node.lineno}: {node.name} takes {len(positional)}, at most {MAX_PARAMETERS}"
            )
    return found


def main() -> int:
    """Check every tracked or new source file; exit code 1 if one is over budget."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py", "*.pyi", "*.rs"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    found: list[str] = []
    for name in sorted(set(listed)):
        path = Path(name)
        if path.is_file():
            found += over_budget(path, path.read_text())
    for line in found:
        print(f"budget: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
