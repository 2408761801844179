"""What the documentation shows is executed: Python blocks, docstring examples, commands, examples."""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(page for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")] if page.is_file())
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
MODULES = ("anyfabric", "anyfabric.errors", "anyfabric.config", "anyfabric.pages")
TIMEOUT_S = 50


def blocks(language):
    """Every fenced block of a language, as (name, text)."""
    for page in PAGES:
        for number, (found, text) in enumerate(FENCE.findall(page.read_text(encoding="utf-8")), 1):
            if found == language:
                yield pytest.param(text, id=f"{page.relative_to(ROOT)}-{number}")


def commands():
    """Every command line that a shell block shows."""
    for language in ("sh", "bash", "console"):
        for block in blocks(language):
            for line in block.values[0].splitlines():
                text = line.removeprefix("$ ").partition("#")[0].strip()
                if text and (language != "console" or line.startswith("$ ")):
                    yield pytest.param(text, id=f"{block.id}: {text[:40]}")


def run(arguments, folder):
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("text", list(blocks("python")))
def test_python_blocks_run_as_they_stand(text, tmp_path):
    """Each block is a program: what it needs, it says."""
    program = tmp_path / "program.py"
    program.write_text(text, encoding="utf-8")
    run([sys.executable, str(program)], tmp_path)


@pytest.mark.parametrize("text", list(commands()))
def test_commands_exist(text):
    """Of `make` the target, of `anyfabric` the command and its options; everything else is on the path."""
    words = [word for word in shlex.split(text) if not re.fullmatch(r"\w+=\S*", word)]
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "anyfabric":
        path = [word for word in words[1:4] if re.fullmatch(r"[a-z]+", word)]
        shown = run([sys.executable, "-c", "from anyfabric.cli import main; main()", *path, "--help"], ROOT)
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= set(
            re.findall(r"--[\w-]+", shown)
        )


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    assert doctest.testmod(import_module(module)).failed == 0


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples(example, tmp_path):
    environment = {**os.environ, "ANYFABRIC_EXAMPLE_FOLDER": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(example)], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
