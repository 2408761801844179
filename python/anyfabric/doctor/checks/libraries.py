"""User space: libibverbs, its providers, libfabric."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from anyfabric.doctor.finding import Check, Finding, broken, note, ok, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyfabric.doctor.system import System

__all__ = ["LIBRARY_CHECKS"]

FOLDERS = (
    "usr/lib/*-linux-gnu",
    "usr/lib64",
    "usr/lib",
    "usr/local/lib",
    "opt/mellanox/*/lib64",
    "opt/amazon/efa/lib*",
)
# Kernel driver to what the provider's file is called.
PROVIDERS = {
    "mlx5_core": "mlx5",
    "mlx5_core.sf": "mlx5",
    "mlx4_core": "mlx4",
    "efa": "efa",
    "bnxt_en": "bnxt_re",
    "irdma": "irdma",
    "ice": "irdma",
    "i40e": "irdma",
    "ionic": "ionic",
    "mana": "mana",
    "erdma": "erdma",
    "hns3": "hns",
    "rdma_rxe": "rxe",
    "siw": "siw",
}
INSTALL = "Debian, Ubuntu: apt-get install ibverbs-providers; Fedora, RHEL: dnf install libibverbs"

# Where an engine looks before it asks the loader.
EFA_FOLDERS = ("opt/amazon/efa/lib", "opt/amazon/efa/lib64")
EFA_LEAST = (1, 18)
EFA_GOOD = (1, 22)
EFA_INSTALL = (
    "install the newest EFA software: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/efa-start.html"
)


def provider(system: System) -> Iterator[Finding]:
    """Whether user space can drive each RDMA device."""
    devices = system.names("sys/class/infiniband")
    if not devices:
        return
    library = system.verbs_library or "libibverbs.so.1"
    folders = (str(Path(library).parent).lstrip("/"),) if "/" in library else FOLDERS
    if not system.find(*(f"{folder}/{Path(library).name}" for folder in folders)):
        mend = "unset or correct ANYFABRIC_VERBS_LIBRARY" if system.verbs_library else INSTALL
        yield broken("", f"{library} is not installed", mend)
        return
    installed = {
        re.sub(r"^lib|-rdmav\d+\.so$", "", path.name)
        for path in system.find(*(f"{folder}/libibverbs/lib*-rdmav*.so" for folder in (*folders, *FOLDERS)))
        if path.exists()
    }
    served: dict[str, list[str]] = {}
    for device in devices:
        driver = system.rdma_driver(device)
        wanted = PROVIDERS.get(driver)
        if wanted is None:
            yield note(
                device, f"which provider the driver {driver or 'of this device'} needs is not known here"
            )
        elif wanted not in installed:
            yield broken(device, f"libibverbs has no provider {wanted} for the driver {driver}", INSTALL)
        else:
            served.setdefault(wanted, []).append(device)
    for name, of in served.items():
        if (unnamed := _unnamed(system, name)) is not None:
            yield unnamed
            continue
        yield ok("", f"libibverbs with {name} for {len(of)} device{'s' * (len(of) > 1)}")


def _unnamed(system: System, name: str) -> Finding | None:
    """What keeps the system's libibverbs from a provider that is there: no file names it."""
    folder = "etc/libibverbs.d"
    named = [
        re.findall(r"^\s*driver\s+(\S+)", system.text(f"{folder}/{file}"), re.MULTILINE)
        for file in system.names(folder)
    ]
    if system.verbs_library or not system.names("etc") or any(name in drivers for drivers in named):
        return None
    found = f"nothing in /{folder} names {name}: libibverbs"
    mend = f"echo driver {name} > /{folder}/{name}.driver; or install it whole: {INSTALL}"
    # Some are built to look elsewhere.
    return (
        broken("", f"{found} does not load it", mend) if named else note("", f"{found} may not load it", mend)
    )


def one_libfabric(system: System) -> Iterator[Finding]:
    """Whether a process has, or could get, more than one libfabric."""
    loaded = [name for name in system.loaded_libraries if Path(name).name.startswith("libfabric")]
    if len(loaded) > 1:
        mend = "start the process with LD_PRELOAD naming the one to use, or remove what brings the other"
        yield broken("", f"the process has loaded {len(loaded)}: {', '.join(loaded)}", mend)
        return
    if system.libfabric_library:
        return
    found = [_name(system, path) for path in _libfabrics(system)]
    if len(found) > 1:
        in_use = loaded[0] if loaded else "none"
        listed = f"several are installed: {', '.join(found)}; the process has loaded {in_use}"
        mend = "name the one to use: ANYFABRIC_LIBFABRIC_LIBRARY; to others its folder in LD_LIBRARY_PATH"
        yield note("", listed, mend)
    elif found:
        yield ok("", found[0])


def efa_library(system: System) -> Iterator[Finding]:
    """Whether the libfabric that an engine opens is new enough for EFA."""
    if not any(nic.fabric == "efa" for nic in system.topology.nics):
        return
    path = _opened(system)
    if path is None:
        missing, mend = "libfabric is not installed, and EFA is reached through nothing else", EFA_INSTALL
        if system.libfabric_library:
            missing = f"{system.libfabric_library} is not there"
            mend = "unset or correct ANYFABRIC_LIBFABRIC_LIBRARY"
        yield broken("", missing, mend)
        return
    version = _version(system, path)
    name = _name(system, path)
    if version is None:
        yield warning(name, "its version cannot be asked for", EFA_INSTALL)
    elif version < EFA_LEAST:
        yield broken(name, f"libfabric {_dotted(version)} has no write with immediate on EFA", EFA_INSTALL)
    elif version < EFA_GOOD:
        yield warning(name, f"libfabric {_dotted(version)}: immediates use up posted receives", EFA_INSTALL)
    else:
        yield ok(name, f"libfabric {_dotted(version)}")


def _libfabrics(system: System) -> list[Path]:
    return system.find(*(f"{folder}/libfabric.so.1" for folder in FOLDERS))


def _opened(system: System) -> Path | None:
    """The libfabric that an engine of the process opens: named, loaded, EFA's, or what the loader finds."""
    named = system.libfabric_library
    if named and "/" not in named:
        # The loader's to find.
        return next(iter(system.find(*(f"{folder}/{named}" for folder in FOLDERS))), None)
    loaded = [name for name in system.loaded_libraries if Path(name).name.startswith("libfabric.so.1")]
    names = [named] if named else [*loaded, *(f"{folder}/libfabric.so.1" for folder in EFA_FOLDERS)]
    there = [system.path(name.lstrip("/")) for name in names if system.exists(name.lstrip("/"))]
    return next(iter(there if named else [*there, *_libfabrics(system)]), None)


def _name(system: System, path: Path) -> str:
    return f"/{path.relative_to(system.root)}"


def _version(system: System, path: Path) -> tuple[int, int] | None:
    # In a process of its own: a library once loaded stays, and this one may be the wrong one.
    program = f"import ctypes; print(ctypes.CDLL({str(path)!r}).fi_version())"
    found = system.run([sys.executable, "-c", program]).strip()
    return (int(found) >> 16, int(found) & 0xFFFF) if found.isdigit() else None


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


LIBRARY_CHECKS = (
    Check(
        "provider",
        "libibverbs, and its provider for each RDMA device.",
        "libibverbs lists only devices that it has a provider for: without one the kernel has NICs and "
        "programs see none.",
        provider,
    ),
    Check(
        "one-libfabric",
        "How many libfabrics the process has loaded, and how many are installed.",
        "Two in one process (one of the system, one of a wheel) have two caches of registrations and two"
        " sets of providers, and which symbols resolve to which is chance.",
        one_libfabric,
    ),
    Check(
        "efa-library",
        "The version of libfabric on machines with EFA.",
        "Writes with an immediate came to EFA with libfabric 1.18, and came to need no posted receives "
        "with 1.22.",
        efa_library,
    ),
)
