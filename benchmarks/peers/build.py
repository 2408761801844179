"""Compiles the contenders written in C, when they are older than their sources."""

from __future__ import annotations

import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent
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
