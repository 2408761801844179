"""Runs a command in a virtual machine that has Soft-RoCE NICs: `python3 tests/rdma/vm.py COMMAND...`.

The machine is this one: its own root file system, read-only with a tmpfs over it, under a kernel that has
rdma_rxe, in qemu without KVM: it needs no right and works inside other virtual machines, slowly. It has the
host's paths, so what was built on the host runs there; what it writes vanishes, but for `/job`.

Exit code: the command's; 77 when this machine cannot run the bed, 124 after the deadline, 125 when the guest
died.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from image import HERE, Image, Missing, ready  # the folder is a program, not a package

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CANNOT_RUN", "DEADLINE", "DIED", "run_in_vm"]

CANNOT_RUN = 77
DEADLINE = 124
DIED = 125


def run_in_vm(
    image: Image, command: str, *, environment: Mapping[str, str], deadline_s: float, stdout: Any = None
) -> int:
    """Boot, make the NICs, run `command` by the shell in this folder, and power off.

    Args:
        image: What `image.ready` returned.
        command: For `/bin/sh`, with the paths of the host.
        environment: All that the command gets.
        deadline_s: For the whole; the guest is killed after it.
        stdout: Where its output goes, stderr included; as for `subprocess`.

    Returns:
        The command's exit code, `DEADLINE` or `DIED`; the guest's console is on stderr then.
    """
    # Told to end, it takes the guest and its folder along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="rdma-bed-") as folder:
        job = Path(folder)
        shutil.copy(HERE / "guest" / "nics", job / "nics")
        exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())
        (job / "command").write_text(f"{exports}cd {shlex.quote(str(Path.cwd()))} || exit\n{command}\n")
        # The pipe stays open and silent: at the end of its input qemu would disconnect the guest's output.
        with subprocess.Popen(_qemu(image, job), stdin=subprocess.PIPE, stdout=stdout) as qemu:
            try:
                qemu.wait(deadline_s)
            except subprocess.TimeoutExpired:
                code = DEADLINE
            else:
                status = job / "status"
                code = int(status.read_text()) if status.exists() else DIED
            finally:
                qemu.kill()
        if code in {DEADLINE, DIED}:
            sys.stderr.write((job / "console").read_text(errors="replace"))
    return code


def _qemu(image: Image, job: Path) -> list[str]:
    # Under emulation the TSC counts the host's time, and any other clock is a device: an exit for each look.
    # Mitigations, and memory that is zeroed before it is overwritten, cost time and guard nothing here.
    kernel = (
        "console=ttyS0 quiet panic=-1 tsc=reliable nohz=off mitigations=off init_on_alloc=0 nokaslr "
        "random.trust_cpu=on"
    )
    root = "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"
    return [
        "qemu-system-x86_64",
        *("-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max,la57=off", "-smp", "2", "-m", "4G"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initramfs), "-append", kernel),
        *("-serial", f"file:{job}/console"),
        *("-chardev", "stdio,id=output,signal=off"),
        *("-device", "virtio-serial", "-device", "virtserialport,chardev=output"),
        *("-fsdev", root, "-device", "virtio-9p,fsdev=host,mount_tag=host"),
        *(
            "-fsdev",
            f"local,id=job,path={job},security_model=none",
            "-device",
            "virtio-9p,fsdev=job,mount_tag=job",
        ),
    ]


def main() -> int:
    """Parse the command line, run, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--deadline", type=float, default=600, metavar="S", help="seconds (600)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="one argument is a line for the shell")
    given = parser.parse_args()
    words = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not words:
        parser.error("no command")
    try:
        image = ready()
    except Missing as reason:
        print(f"cannot run the RDMA bed: {reason}", file=sys.stderr)
        return CANNOT_RUN
    except RuntimeError as error:
        print(f"the RDMA bed cannot be made: {error}", file=sys.stderr)
        return 1
    command = words[0] if len(words) == 1 else shlex.join(words)
    environment = {name: value for name, value in os.environ.items() if name.isidentifier() and name != "PWD"}
    return run_in_vm(image, command, environment=environment, deadline_s=given.deadline)


if __name__ == "__main__":
    sys.exit(main())
