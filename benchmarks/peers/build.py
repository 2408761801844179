"""Compiles the contenders written in C and Rust, when they are older than their sources."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent
REPOSITORY = FOLDER.parents[1]
RUST_EXAMPLE = "bench_endpoint"
FLAGS = ("-O2", "-Wall", "-Wextra", "-std=gnu11")


class BuildError(RuntimeError):
    """A contender cannot be compiled here; the text says why, for the record."""


def peers_python() -> Path:
    """Return the interpreter of the peers' venv, whether or not it exists."""
    return FOLDER / ".venv" / "bin" / "python"


def ucx_folder() -> Path | None:
    """Return where the wheel of UCX keeps its headers and libraries, or None without the wheel."""
    found = sorted((FOLDER / ".venv").glob("lib/python3.*/site-packages/libucx"))
    return found[0] if found else None


def baseline() -> Path:
    """Return the baseline program, compiled.

    Raises:
        BuildError: There is no C compiler, or it refused.
    """
    return _compile("baseline", ())


def ucx() -> Path:
    """Return the program that drives UCX, compiled against the wheel.

    Raises:
        BuildError: The wheel or a C compiler is missing, or the compiler refused.
    """
    wheel = ucx_folder()
    if wheel is None:
        msg = "libucx-cu12 is not installed: run benchmarks/peers/setup"
        raise BuildError(msg)
    libraries = wheel / "lib"
    flags = ("-isystem", str(wheel / "include"), f"-L{libraries}", f"-Wl,-rpath,{libraries}")
    return _compile("ucx", (*flags, "-lucp", "-lucs"))


@functools.cache
def rust_endpoint() -> Path:
    """Return the program that drives anyfabric from Rust, built by cargo from this checkout.

    Raises:
        BuildError: cargo is missing or refused.
    """
    command = ["cargo", "build", "--release", "--quiet", "-p", "anyfabric-engine", "--example", RUST_EXAMPLE]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=1200, cwd=REPOSITORY
        )
    except FileNotFoundError:
        msg = "there is no cargo: install Rust"
        raise BuildError(msg) from None
    if done.returncode:
        msg = f"cargo refused the {RUST_EXAMPLE} example: {' '.join(done.stderr.split())[-300:]}"
        raise BuildError(msg)
    target = Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target"))
    return target / "release" / "examples" / RUST_EXAMPLE


def _compile(name: str, flags: tuple[str, ...]) -> Path:
    source, program = FOLDER / f"{name}.c", FOLDER / "build" / name
    inputs = (source, FOLDER / "endpoint.h")
    if program.exists() and program.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        return program
    program.parent.mkdir(exist_ok=True)
    command = ["cc", *FLAGS, "-o", str(program), str(source), *flags]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    except FileNotFoundError:
        msg = "there is no C compiler: install gcc"
        raise BuildError(msg) from None
    if done.returncode:
        msg = f"cc refused {source.name}: {' '.join(done.stderr.split())[:300]}"
        raise BuildError(msg)
    return program
