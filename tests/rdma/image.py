"""The virtual machine's kernel and initramfs, made once from Debian's or Ubuntu's own packages.

Owns a folder of the user's cache (`RDMA_BED_CACHE` moves it):

    lock                     held while something is made
    linux-*.deb              downloaded by apt, which checks them against the distribution's signatures
    <version>-<digest>/      vmlinux and initramfs; `digest` is that of the files that make them

The kernel is never installed, only unpacked. `Missing` says that this machine cannot run the bed and what
would have to be there; everything else that goes wrong is an error.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import lzma
import os
import platform
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

Result = TypeVar("Result")

__all__ = ["Image", "Missing", "cpio", "in_order", "ready"]

SUDO = ("sudo", "--non-interactive")
HERE = Path(__file__).resolve().parent

# What runs on the host, and what the guest uses of it.
PACKAGES = ("qemu-system-x86", "busybox-static", "iproute2", "ibverbs-providers", "libibverbs-dev")
# The package that stands for the newest kernel, by distribution.
KERNELS = {"debian": "linux-image-amd64", "ubuntu": "linux-image-generic"}
# rdma_rxe asks for crc32 by name at run time, so its file does not list it.
MODULES = (
    *("virtio_pci", "virtio_console", "9p", "9pnet_virtio", "overlay"),
    *("veth", "bridge", "sch_netem", "crc32_generic", "rdma_rxe", "ib_uverbs"),
)


class Missing(Exception):
    """This machine cannot run the bed; the text says what is missing."""


@dataclass(frozen=True)
class Image:
    """What qemu boots.

    Attributes:
        kernel: An uncompressed kernel: it boots in half the time, since nothing is unpacked by emulation.
        initramfs: Modules, busybox and `guest/init`.
        version: The kernel's.
    """

    kernel: Path
    initramfs: Path
    version: str


def ready() -> Image:
    """The image, made if it is not there: packages installed, kernel downloaded.

    Raises:
        Missing: Another architecture, no apt, no right to install, or no archive within reach.
        RuntimeError: A command failed; the message ends with what it said.
    """
    if platform.machine() != "x86_64":
        msg = f"the bed boots x86_64 kernels only, and this machine is {platform.machine()}"
        raise Missing(msg)
    cache = _cache()
    with _lock(cache):
        _install()
        digest = _digest()
        for folder in sorted(cache.glob(f"*-{digest}"), reverse=True):
            return _image(folder)
        version, debs = _download(cache)
        return _make(cache / f"{version}-{digest}", debs)


def in_order(wanted: Iterable[str], modules: Mapping[str, bytes], builtin: frozenset[str]) -> list[str]:
    """Names in the order in which they can be loaded: each after what its `depends=` line names."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name in order or name in builtin:
            return
        if name not in modules:
            msg = f"the kernel has no module {name}"
            raise RuntimeError(msg)
        found = re.search(rb"\0depends=([^\0]*)\0", modules[name])
        for needed in (found.group(1).decode() if found else "").split(","):
            if needed:
                visit(needed.replace("-", "_"))
        order.append(name)

    for name in wanted:
        visit(name)
    return order


def cpio(files: Mapping[str, bytes]) -> bytes:
    """An archive of executable files in the kernel's `newc` format; names that end in `/` are folders."""
    out = io.BytesIO()
    for inode, (name, content) in enumerate([*files.items(), ("TRAILER!!!", b"")], start=1):
        mode = 0o040755 if name.endswith("/") else 0o100755
        encoded = name.rstrip("/").encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
        out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)
        out.write(b"\0" * (-out.tell() % 4) + content)
        out.write(b"\0" * (-out.tell() % 4))
    return out.getvalue()


def _cache() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anyfabric-rdma-bed"
    folder = Path(os.environ.get("RDMA_BED_CACHE") or default)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _lock(cache: Path) -> Iterator[None]:
    with (cache / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest() -> str:
    files = (HERE / "image.py", HERE / "guest" / "init")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _image(folder: Path) -> Image:
    return Image(folder / "vmlinux", folder / "initramfs", folder.name.rpartition("-")[0])


def _install() -> None:
    query = ["dpkg-query", "--show", "--showformat", "${Package} ${db:Status-Status}\n", *PACKAGES]
    if shutil.which("apt-get") is None or shutil.which("dpkg-query") is None:
        msg = "the bed is made of Debian or Ubuntu packages, and this machine has no apt"
        raise Missing(msg)
    listed = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    installed = {line.split()[0] for line in listed.splitlines() if line.endswith(" installed")}
    lacking = [package for package in PACKAGES if package not in installed]
    if not lacking:
        return
    if not _may_install():
        command = f"sudo apt-get install --no-install-recommends {' '.join(lacking)}"
        msg = f"no right to install packages; first run: {command}"
        raise Missing(msg)
    print(f"installing {' '.join(lacking)}", flush=True)
    _twice(lambda: _apt("install", "--yes", "--no-install-recommends", *lacking))


def _download(cache: Path) -> tuple[str, list[Path]]:
    """The newest kernel's version, and the packages that it consists of."""
    release = dict(
        line.rstrip().split("=", 1)
        for line in Path("/etc/os-release").read_text().splitlines()
        if "=" in line
    )
    names = [release.get("ID", "").strip('"'), *release.get("ID_LIKE", "").strip('"').split()]
    stands_for = next((KERNELS[name] for name in names if name in KERNELS), None)
    if stands_for is None:
        msg = f"no kernel package is known for {release.get('PRETTY_NAME', 'this system')}"
        raise Missing(msg)

    def fetch() -> tuple[str, list[Path]]:
        image = _depends(stands_for, r"linux-image-(?:unsigned-)?\d\S*")[0]
        # Ubuntu keeps modules in packages of their own; Debian's image has them.
        packages = [
            image,
            *_depends(image, r"linux-modules-\d\S*"),
            *_depends(stands_for, r"linux-modules-extra-\d\S*"),
        ]
        return image.removeprefix("linux-image-"), [_deb(cache, package) for package in packages]

    return _twice(fetch)


def _depends(package: str, pattern: str) -> list[str]:
    listed = _run(["apt-cache", "depends", "--important", package])
    found = re.findall(rf"^ *\|?Depends: ({pattern})$", listed, re.MULTILINE)
    if not found and pattern.startswith("linux-image"):
        msg = f"apt knows no kernel that {package} depends on"
        raise RuntimeError(msg)
    return found


def _deb(cache: Path, package: str) -> Path:
    for deb in cache.glob(f"{package}_*.deb"):
        return deb
    print(f"downloading {package}", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        _apt("download", package, cwd=folder)
        (deb,) = Path(folder).glob("*.deb")
        # Only what apt has checked gets its name in the cache.
        return deb.rename(cache / deb.name)


def _may_install() -> bool:
    if os.geteuid() == 0 or shutil.which("sudo") is None:
        return os.geteuid() == 0
    return subprocess.run([*SUDO, "true"], capture_output=True, check=False).returncode == 0


def _apt(*arguments: str, cwd: str | None = None) -> None:
    options = (
        "APT::Get::AllowUnauthenticated=false",
        "Acquire::AllowInsecureRepositories=false",
        "APT::Sandbox::User=root",  # the user of apt's own cannot write into the cache folder
        "DPkg::Lock::Timeout=300",
    )
    flags = [flag for option in options for flag in ("-o", option)]
    needs_root = os.geteuid() != 0 and arguments[0] != "download"
    _run([*(SUDO if needs_root else ()), "apt-get", "-qq", *flags, *arguments], cwd=cwd)


def _twice(attempt: Callable[[], Result]) -> Result:
    """Tries again with fresh lists: stale ones name versions that are gone."""
    try:
        return attempt()
    except RuntimeError:
        if not _may_install():
            raise
    try:
        _apt("update")
        return attempt()
    except RuntimeError as error:
        # Without a network this is no failure of ours; the message is in the summary.
        msg = f"what the bed needs cannot be had from the archive: {error}"
        raise Missing(msg) from error


def _run(command: list[str], cwd: str | None = None) -> str:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)
    if done.returncode != 0:
        msg = f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-2000:]}"
        raise RuntimeError(msg)
    return done.stdout


def _make(folder: Path, debs: list[Path]) -> Image:
    modules: dict[str, bytes] = {}
    builtin: frozenset[str] = frozenset()
    kernel = b""
    for deb in debs:
        for name, content in _members(deb):
            if name.startswith("./boot/vmlinuz-"):
                kernel = content
            elif name.endswith("/modules.builtin"):
                builtin = frozenset(_module_name(line) for line in content.decode().split())
            else:
                modules[_module_name(name)] = _unpacked(content)
    order = in_order(MODULES, modules, builtin)
    files = dict.fromkeys(("bin/", "modules/", "proc/", "sys/", "dev/", "lower/", "upper/", "root/"), b"")
    busybox = shutil.which("busybox")
    if busybox is None:
        msg = "busybox-static is installed, but busybox is not found"
        raise RuntimeError(msg)
    files["bin/busybox"] = Path(busybox).read_bytes()
    files["init"] = (HERE / "guest" / "init").read_bytes()
    files["modules/order"] = "".join(f"{name}\n" for name in order).encode()
    files |= {f"modules/{name}.ko": modules[name] for name in order}
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    (scratch / "vmlinux").write_bytes(_vmlinux(kernel))
    (scratch / "initramfs").write_bytes(cpio(files))
    return _image(scratch.rename(folder))


def _members(deb: Path) -> Iterator[tuple[str, bytes]]:
    """The kernel, its modules and the list of built-in ones, of the folders where the bed's modules lie."""
    folders = (
        "net|lib|crypto|arch/x86/crypto|drivers/(infiniband|virtio|char|net)|fs/(9p|overlayfs|netfs|fscache)"
    )
    wanted = re.compile(
        rf"\./boot/vmlinuz-|\./(usr/)?lib/modules/[^/]+/(modules\.builtin$|kernel/({folders})/.*\.ko)"
    )
    command = ["dpkg-deb", "--fsys-tarfile", deb]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for member in archive:
            if member.isfile() and wanted.match(member.name):
                file = archive.extractfile(member)
                yield member.name, file.read() if file else b""
    if process.returncode != 0:
        msg = f"{deb} cannot be unpacked; delete it and run again"
        raise RuntimeError(msg)


def _module_name(path: str) -> str:
    return Path(path).name.partition(".ko")[0].replace("-", "_")


def _unpacked(content: bytes) -> bytes:
    if content.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor().decompress(content)
    if content.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(31).decompress(content)
    if content.startswith(b"\x28\xb5\x2f\xfd"):
        # The kernel's payload has bytes behind it, which zstd calls an error after it has unpacked all.
        command = ["zstd", "--decompress", "--stdout", "--quiet"]
        return subprocess.run(command, input=content, capture_output=True, check=False).stdout
    return content


def _vmlinux(bz_image: bytes) -> bytes:
    """The ELF file inside a bzImage, by the offsets of the x86 boot protocol."""
    if bz_image[0x202:0x206] != b"HdrS":
        msg = "the kernel package has no bzImage"
        raise RuntimeError(msg)
    num_setup_sectors = bz_image[0x1F1] or 4
    offset, nbytes = struct.unpack_from("<II", bz_image, 0x248)
    start = (num_setup_sectors + 1) * 512 + offset
    kernel = _unpacked(bz_image[start : start + nbytes])
    if not kernel.startswith(b"\x7fELF"):
        msg = "the kernel is compressed in a way that is not known here"
        raise RuntimeError(msg)
    return kernel
