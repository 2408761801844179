"""What the documentation shows is executed: Python blocks, docstrings, examples; commands are looked up."""

from __future__ import annotations

import doctest
import functools
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = (
    "*.md",
    "docs/**/*.md",
    "examples/*.md",
    "benchmarks/peers/*.md",
    "tests/**/*.md",
    "python/**/*.md",
)
PAGES = sorted({page for folder in FOLDERS for page in ROOT.glob(folder)})
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`((?:make|anyfabric|cargo|python3?|\.venv/bin/python) [^`\n]+)`")
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
RUST_EXAMPLES = sorted(ROOT.glob("examples/*.rs"))
MODULES = sorted(
    ".".join(path.relative_to(ROOT / "python").with_suffix("").parts).removesuffix(".__init__")
    for path in ROOT.glob("python/**/*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
TIMEOUT_S = 50
# Where the tests in Rust did not run before.
COMPILE_S = 600


def blocks(language):
    """Every fenced block of a language, as (text, name)."""
    for page in PAGES:
        for number, (found, text) in enumerate(FENCE.findall(page.read_text(encoding="utf-8")), 1):
            if found == language:
                yield text, f"{page.relative_to(ROOT)}-{number}"


def commands():
    """Every command line of a shell block or a code span, once."""
    found = {}
    for text, name in blocks("sh"):
        for line in text.splitlines():
            if words := tuple(shlex.split(line, comments=True)):
                found.setdefault(words, name)
    for page in PAGES:
        for text in SPAN.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
            found.setdefault(tuple(shlex.split(text)), str(page.relative_to(ROOT)))
    return [pytest.param(words, id=f"{name}: {' '.join(words)[:50]}") for words, name in found.items()]


def run(arguments, folder, timeout_s=TIMEOUT_S):
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@functools.cache
def options_of(*path):
    """Options that a command of `anyfabric` has, by its own help."""
    return set(re.findall(r"--[\w-]+", run([sys.executable, "-m", "anyfabric", *path, "--help"], ROOT)))


@pytest.mark.parametrize("text", [pytest.param(text, id=name) for text, name in blocks("python")])
def test_python_blocks_run_as_they_stand(text, tmp_path):
    """Each block is a program: what it needs, it says."""
    program = tmp_path / "program.py"
    program.write_text(text, encoding="utf-8")
    run([sys.executable, str(program)], tmp_path)


@pytest.mark.parametrize("words", commands())
def test_commands_exist(words):
    """Of `make` the target, of `anyfabric` the command and its options, of others what they are to run."""
    program, *rest = itertools.dropwhile(re.compile(r"\w+=").match, words)
    given = dict(zip(rest, [*rest[1:], ""], strict=True))
    if program == "make":
        makefile = ROOT / given.get("-C", "") / "Makefile"
        targets = re.findall(r"^([\w-]+):", makefile.read_text(), re.MULTILINE)
        named = {word for word in rest if "=" not in word and word not in {"-C", given.get("-C")}}
        assert named <= set(targets)
    elif program == "anyfabric":
        path = itertools.takewhile(lambda word: re.fullmatch(r"[a-z]+", word), rest)
        shown = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert shown <= options_of(*path)
    elif program == "cargo":
        crate = ROOT / "crates" / given["-p"].removeprefix("anyfabric-")
        for option, folder in (("--test", "tests"), ("--bench", "benches"), ("--example", "examples")):
            if name := given.get(option):
                found = [*(crate / folder).glob(f"{name}*"), *ROOT.glob(f"examples/{name}.rs")]
                assert [path for path in found if path.stem == name]
    elif "-m" in given:
        module = Path(*given["-m"].split("."))
        files = (module.with_suffix(".py"), module / "__main__.py")
        assert [file for file in files if (ROOT / file).exists() or (ROOT / "python" / file).exists()]
    else:
        assert Path(program).name in {"python", "python3"}
        assert "NAME" in rest[0] or (ROOT / rest[0]).exists()


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    tried = doctest.testmod(import_module(module))
    assert tried.attempted > 0
    assert tried.failed == 0


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples(example, tmp_path):
    run([sys.executable, str(example)], tmp_path)


@pytest.mark.timeout(COMPILE_S)
@pytest.mark.skipif(shutil.which("cargo") is None, reason="cargo is missing")
@pytest.mark.parametrize("example", RUST_EXAMPLES, ids=lambda path: path.name)
def test_rust_examples(example):
    command = ["cargo", "run", "--quiet", "-p", "anyfabric-engine", "--example", example.stem]
    assert "received 4194304 bytes" in run(command, ROOT, COMPILE_S)


def test_every_kind_of_documentation_was_found():
    assert MODULES
    assert EXAMPLES
    assert RUST_EXAMPLES
    assert {page.name for page in PAGES} >= {"README.md", "CONTRIBUTING.md", "benchmarks.md", "doctor.md"}
