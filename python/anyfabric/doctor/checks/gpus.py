"""Whether NICs can be given GPU memory."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from anyfabric.doctor.finding import Check, Finding, broken, note, ok, warning

if TYPE_CHECKING:
    from collections.abc import Iterator

    from anyfabric.doctor.system import System

__all__ = ["GPU_CHECKS"]

DMABUF_KERNEL = (5, 12)
DMABUF_DRIVER = 515
PEERMEM_MODULES = ("nvidia_peermem", "nv_peer_mem", "efa_nv_peermem")


def gpu_memory(system: System) -> Iterator[Finding]:
    """Whether there is dmabuf, or a peer-memory module."""
    if not system.topology.gpus or not system.topology.nics:
        return
    driver = system.text("proc/driver/nvidia/version")
    if not driver:
        yield note("", "GPUs, but no NVIDIA driver: only host memory can be sent")
        return
    lacking = _lacking_for_dmabuf(system, driver)
    is_old = system.kernel < DMABUF_KERNEL and system.takes_over_newer
    if not system.gpus and not lacking and is_old and not _peermem(system):
        found = "the kernel takes over newer functions: dmabuf, of 5.12, may be there; nvidia-peermem is not"
        yield note("", found, "modprobe nvidia-peermem")
    elif not system.gpus:
        yield _reached(system, "", lacking)
    for gpu in system.gpus:
        subject = f"{gpu.device} ({gpu.name})"
        if gpu.writes == "never":
            mend = "use NVIDIA driver 470 or later"
            yield broken(subject, "the driver neither orders what NICs write nor flushes it", mend)
        elif not gpu.rdma and not gpu.dmabuf:
            # No module changes that.
            mend = "send from host memory, or use a GPU whose driver does: GeForce has none"
            yield warning(subject, "its driver lets no NIC reach its memory", mend)
        else:
            # The driver knows better than the files: it may be the open one, and yet refuse.
            refusal = lacking or "the driver does not export this GPU's memory"
            yield _reached(system, subject, "" if gpu.dmabuf else refusal, gpu.writes)


def _reached(system: System, subject: str, lacking: str, writes: str = "") -> Finding:
    peermem = _peermem(system)
    told = "; the driver flushes what NICs write before it is counted" if writes == "flushed" else ""
    if not lacking:
        return ok(subject, f"dmabuf{told}")
    if peermem:
        return ok(subject, f"{peermem}; no dmabuf: {lacking}{told}")
    mend = "modprobe nvidia-peermem; or the open kernel modules of driver 515, and Linux 5.12, or later"
    found = f"neither dmabuf ({lacking}) nor nvidia-peermem: GPU memory cannot be registered"
    return broken(subject, found, mend)


def _peermem(system: System) -> str:
    """The peer-memory module that is loaded, if any."""
    return next((name for name in PEERMEM_MODULES if system.exists(f"sys/module/{name}")), "")


def _lacking_for_dmabuf(system: System, driver: str) -> str:
    if (0, 0) < system.kernel < DMABUF_KERNEL and not system.takes_over_newer:
        return f"Linux {system.kernel[0]}.{system.kernel[1]} is older than 5.12"
    if "Open Kernel Module" not in driver:
        return "the NVIDIA driver is not the open one"
    version = re.search(r"\b(\d{3})\.\d+", driver)
    if version is None or int(version.group(1)) < DMABUF_DRIVER:
        return "the NVIDIA driver is older than 515"
    return ""


GPU_CHECKS = (
    Check(
        "gpu-memory",
        "dmabuf (Linux 5.12, open NVIDIA driver 515) or a peer-memory module.",
        "A NIC reads and writes GPU memory only through one of the two; else it cannot be registered.",
        gpu_memory,
    ),
)
