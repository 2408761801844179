"""Each check on a machine that is well, and on one where what it looks at is not."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from anyfabric.doctor import CHECKS, diagnose
from anyfabric.doctor.trial import Way, ways
from anyfabric.gpu import DriverGpu

BRIDGE = "0000:12:01.0"


def test_a_machine_that_is_well(machine):
    assert machine.findings() == []
    found = diagnose(machine.system)
    assert not found.is_broken
    assert found.has_nic
    assert found.summary == "everything that was looked at is well"
    well = {check.name for check, _ in found.findings}
    # The rest does not arise: no container, no libfabric, no EFA, no translated addresses.
    assert {check.name for check in CHECKS} - well == {"container", "one-libfabric", "efa-library", "ats"}


def old_kernel(machine):
    machine.write("proc/sys/kernel/osrelease", "4.19.0-27-amd64")
    machine.write("sys/module/nvidia_peermem/version", "1")


def rhel_kernel(machine):
    machine.write("proc/sys/kernel/osrelease", "4.18.0-553.el8_10.x86_64")
    machine.write("sys/module/nvidia_peermem/version", "1")


def no_rdma_module(machine):
    for idx in (0, 1):
        machine.remove(f"sys/class/infiniband/mlx5_{idx}")
        machine.remove(f"sys/class/infiniband_verbs/uverbs{idx}")
        for folder in machine.root.glob(f"sys/devices/**/infiniband/mlx5_{idx}"):
            machine.remove(folder.parent.relative_to(machine.root))


def one_card_without_rdma(machine):
    machine.remove("sys/class/infiniband/mlx5_1")
    machine.remove("sys/class/infiniband_verbs/uverbs1")
    (folder,) = machine.root.glob("sys/devices/**/infiniband/mlx5_1")
    machine.remove(folder.parent.relative_to(machine.root))


def no_uverbs(machine):
    machine.remove("sys/class/infiniband_verbs")


def no_node(machine):
    machine.remove("dev/infiniband/uverbs1")


def bare_container(machine):
    machine.write(".dockerenv", "")
    machine.remove("dev/infiniband")


def bare_pod(machine):
    """Kubernetes on cgroup v2: what tells a container is where its root lies."""
    machine.write("proc/1/cgroup", "0::/")
    layers = "lowerdir=/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/7/fs"
    machine.write("proc/self/mountinfo", f"97 80 0:50 / / rw,relatime - overlay overlay rw,{layers}")
    machine.remove("dev/infiniband")


def container_with_the_manager_alone(machine):
    bare_pod(machine)
    machine.write("dev/infiniband/rdma_cm", "")


def container_without_lock(machine):
    machine.write("proc/1/cgroup", "0::/kubepods.slice/pod1")
    machine.limit(1 << 40)


def small_limit(machine):
    machine.limit(8 << 20)


def limit_below_memory(machine):
    machine.limit(16 << 30)


def no_libibverbs(machine):
    machine.remove("usr/lib/x86_64-linux-gnu/libibverbs.so.1")


def no_provider(machine):
    machine.remove("usr/lib/x86_64-linux-gnu/libibverbs")
    machine.provider("rxe")


def two_libfabrics_loaded(machine):
    lines = (
        "/usr/lib/x86_64-linux-gnu/libfabric.so.1",
        "/venv/lib/mpich.libs/libfabric-3f.so.1.30 (deleted)",
    )
    machine.write("proc/self/maps", "\n".join(f"7f00-7f01 r-xp 0 00:00 1    {line}" for line in lines))


def two_libfabrics_installed(machine):
    machine.write("usr/lib/x86_64-linux-gnu/libfabric.so.1", "")
    machine.write("opt/amazon/efa/lib/libfabric.so.1", "")


def port_down(machine):
    machine.port(1, "state", "1: DOWN")
    machine.port(1, "phys_state", "3: Disabled")


def all_ports_down(machine):
    for idx in (0, 1):
        machine.port(idx, "state", "1: DOWN")


def no_subnet_manager(machine):
    for idx in (0, 1):
        machine.port(idx, "link_layer", "InfiniBand")
        machine.port(idx, "state", "2: INIT")


def one_slow_port(machine):
    machine.port(1, "rate", "200 Gb/sec (4X HDR)")


def narrow_slot(machine):
    (file,) = machine.root.glob("sys/devices/**/0000:84:00.0/current_link_width")
    file.write_text("8\n")


def no_gid(machine):
    machine.gids(0)


def only_roce_v1(machine):
    machine.gids(0, "0000:0000:0000:0000:0000:ffff:0a00:0001", kind="IB/RoCE v1")


def link_local_gid(machine):
    machine.gids(0, "fe80:0000:0000:0000:1234:56ff:fe78:9abc")


def small_mtu(machine):
    for idx in (0, 1):
        machine.write(f"sys/class/net/eth{idx}/mtu", "1500")


def unequal_mtu(machine):
    machine.write("sys/class/net/eth1/mtu", "2200")


def translated(machine):
    machine.write("sys/bus/pci/devices/0000:14:00.0/iommu_group/type", "DMA-FQ")


def translated_without_ats(machine):
    translated(machine)
    machine.write("sys/bus/pci/devices/0000:14:00.0/config", machine.extended_config(0x000F, 0))


def redirecting_bridge(machine):
    machine.write(f"sys/bus/pci/devices/{BRIDGE}/config", machine.extended_config(0x000D, 0b11101))


def unreadable_bridges(machine):
    machine.write(f"sys/bus/pci/devices/{BRIDGE}/config", bytes(64))


def nic_on_the_other_node(machine):
    machine.port(1, "state", "1: DOWN")


def closed_driver(machine):
    machine.write("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08")


def old_driver(machine):
    machine.write("proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX Open Kernel Module  510.10")


def no_driver(machine):
    machine.remove("proc/driver/nvidia/version")


BAD = [
    (old_kernel, "kernel", "broken", "4.19.0-27-amd64 has no pidfd_open", "Linux 5.3 or later"),
    (rhel_kernel, "kernel", "note", "takes over newer functions", ""),
    (no_rdma_module, "modules", "broken", "mlx5_ib does not drive it", "modprobe mlx5_ib"),
    (one_card_without_rdma, "modules", "warning", "mlx5_ib does not drive it", "modprobe mlx5_ib"),
    (no_uverbs, "modules", "broken", "ib_uverbs is not loaded", "modprobe ib_uverbs"),
    (no_node, "device-nodes", "broken", "/dev/infiniband/uverbs1 is missing", "udevadm trigger"),
    (
        bare_container,
        "container",
        "broken",
        "no /dev/infiniband",
        "--device=/dev/infiniband --cap-add=IPC_LOCK",
    ),
    (bare_pod, "container", "broken", "no /dev/infiniband", "a resource of the device plugin"),
    (container_with_the_manager_alone, "container", "broken", "was given no RDMA device", "--device="),
    (container_without_lock, "container", "warning", "neither IPC_LOCK nor unlimited", "--cap-add=IPC_LOCK"),
    (small_limit, "locked-memory", "broken", "8 MiB: no region larger", "ulimit -l unlimited"),
    (limit_below_memory, "locked-memory", "warning", "16 GiB of 64 GiB", "LimitMEMLOCK=infinity"),
    (
        no_libibverbs,
        "provider",
        "broken",
        "libibverbs.so.1 is not installed",
        "apt-get install ibverbs-providers",
    ),
    (no_provider, "provider", "broken", "no provider mlx5 for the driver mlx5_core", "ibverbs-providers"),
    (two_libfabrics_loaded, "one-libfabric", "broken", "loaded 2: .*mpich.libs", "LD_PRELOAD"),
    (
        two_libfabrics_installed,
        "one-libfabric",
        "note",
        "several are installed: .*/opt/amazon",
        "ANYFABRIC_LIBFABRIC_LIBRARY",
    ),
    (port_down, "link", "warning", r"DOWN \(physical: Disabled\)", "ip link set dev eth1 up"),
    (all_ports_down, "link", "broken", "the port is DOWN", "ethtool eth0"),
    (no_subnet_manager, "link", "broken", "the port is INIT", "opensm"),
    (one_slow_port, "speed", "warning", "200 Gbit/s, where most of its kind here have 400", "ethtool eth1"),
    (narrow_slot, "speed", "warning", "400 Gbit/s in a slot that carries 252", "lspci -vv -s 0000:84:00.0"),
    (no_gid, "gid", "broken", "has no RoCE v2 GID", "ip addr add ADDRESS/24 dev eth0"),
    (only_roce_v1, "gid", "broken", "has no RoCE v2 GID", "ip addr add"),
    (link_local_gid, "gid", "warning", r"only a link-local GID \(fe80::1234", "ip addr add"),
    (small_mtu, "mtu", "warning", "MTU 1500: RDMA packets carry 1024 bytes of 4096", "mtu 9000"),
    (unequal_mtu, "mtu", "warning", "differ: mlx5_0 9000, mlx5_1 2200", "the same everywhere"),
    (translated, "iommu", "warning", "translates every address of mlx5_0", "iommu.passthrough=1"),
    (translated_without_ats, "ats", "warning", "its translation service is off", "ATS_ENABLED=1"),
    (
        redirecting_bridge,
        "acs",
        "warning",
        "between mlx5_0 and 0000:13:00.0 up to",
        f"setpci -s {BRIDGE} ECAP_ACS",
    ),
    (unreadable_bridges, "acs", "note", "cannot be read", "as root"),
    (
        nic_on_the_other_node,
        "gpu-distance",
        "warning",
        "mlx5_0, is on another NUMA node",
        "CUDA_VISIBLE_DEVICES",
    ),
    (
        closed_driver,
        "gpu-memory",
        "broken",
        "not the open one.* nor nvidia-peermem",
        "modprobe nvidia-peermem",
    ),
    (old_driver, "gpu-memory", "broken", "older than 515", "nvidia-peermem"),
    (no_driver, "gpu-memory", "note", "no NVIDIA driver", ""),
]


@pytest.mark.parametrize(
    ("change", "expected"), [(row[0], row[1:]) for row in BAD], ids=[row[0].__name__ for row in BAD]
)
def test_a_machine_that_is_not_well(machine, change, expected):
    check, level, found, mend = expected
    change(machine)
    matching = [row for row in machine.findings(level) if row[0] == check and re.search(found, row[3])]
    assert matching, machine.findings()
    assert mend in matching[0][4]
    assert diagnose(machine.system).is_broken == bool(machine.findings("broken"))


def test_a_gpu_that_was_not_given_is_not_judged(machine):
    nic_on_the_other_node(machine)
    machine.write("proc/driver/nvidia/gpus/0000:13:00.0/information", "")
    assert {row[0] for row in machine.findings("warning")} == {"link"}
    machine.write("proc/driver/nvidia/gpus/0000:83:00.0/information", "")
    assert {row[0] for row in machine.findings("warning")} == {"link", "gpu-distance"}


def test_every_check_is_tried_on_a_bad_machine():
    assert {check for _, check, *_ in BAD} | {"efa-library"} == {check.name for check in CHECKS}


def test_a_node_that_may_not_be_opened(open_machine):
    (open_machine.root / "dev/infiniband/uverbs0").chmod(0)
    found = open_machine.findings_of_nobody()
    assert found[0][3] == "no permission to open /dev/infiniband/uverbs0"
    (open_machine.root / "dev/infiniband").chmod(0)
    (row,) = open_machine.findings_of_nobody()
    assert row[3:] == ["no permission to look into /dev/infiniband", "as root: chmod 0755 /dev/infiniband"]


@pytest.mark.parametrize("folder", ["", "dev", "sys", "sys/devices", "sys/class/infiniband", "proc", "usr"])
def test_folders_that_may_not_be_read_are_no_error(open_machine, folder):
    (open_machine.root / folder).chmod(0)
    open_machine.findings_of_nobody()
    (open_machine.root / folder).chmod(0o755)


SPOILT = {
    "a folder": Path.mkdir,
    "a loop": lambda file: file.symlink_to(file.name),
    "nothing": lambda _: None,
    "garbage": lambda file: file.write_bytes(b"\xff\xfe\x00 99999999999999999999,-,:\n0x"),
    "digits": lambda file: file.write_bytes(b"9" * 5000),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_files_that_are_not_what_they_should_be_are_no_error(machine, spoil):
    everything = sorted(file for file in machine.root.rglob("*") if file.is_symlink() or file.is_file())
    assert len(everything) > 50
    for file in everything:
        aside = file.with_name("aside")
        file.rename(aside)
        spoil(file)
        diagnose(machine.system)
        if file.is_dir() and not file.is_symlink():
            file.rmdir()
        aside.replace(file)
    assert machine.findings() == []


def test_the_right_to_lock_replaces_the_limit(machine):
    machine.limit(8 << 20)
    machine.write("proc/self/status", "CapEff:\t0000000000004000")
    assert machine.findings() == []
    machine.write("proc/self/status", "CapEff:\t00000000ffffbfff")
    assert machine.findings("broken")


def test_nics_that_are_named_and_not_here(machine):
    named = ("mlx5_0", "mlx5_1:1", "eth1", "mlx5_0-rdm", "10.0.0.1", "fe80::1", "mlx5_7")
    told = diagnose(replace(machine.system, named=named)).findings
    ((check, finding),) = [row for row in told if row[1].level == "broken"]
    assert (check.name, finding.subject) == ("link", "mlx5_7")
    assert finding.found == "the setting `nics` names it, and here is mlx5_0, mlx5_1"


def test_the_right_to_lock_is_the_hosts(machine):
    """In a namespace of users it is for that namespace, and the kernel asks for the host's."""
    machine.limit(8 << 20)
    machine.write("proc/self/status", "CapEff:\t0000000000004000")
    machine.write("proc/self/uid_map", "         0          0 4294967295")
    assert machine.findings() == []
    machine.write("proc/self/uid_map", "         0     100000      65536")
    assert [row[0] for row in machine.findings("broken")] == ["locked-memory"]


def test_of_two_speeds_the_lower_is_the_slow_one(machine):
    for idx in (0, 1):
        machine.port(idx, "rate", "200 Gb/sec (4X HDR)")
        assert [row[:3] for row in machine.findings("warning")] == [("speed", "warning", f"mlx5_{idx}")]
        machine.port(idx, "rate", "400 Gb/sec (4X NDR)")


def test_peermem_will_do(machine):
    closed_driver(machine)
    machine.write("sys/module/nvidia_peermem/version", "1")
    assert machine.findings() == []


@pytest.mark.parametrize(
    ("driver_gpu", "level", "found"),
    [
        ({}, "ok", "dmabuf"),
        ({"writes": "flushed"}, "ok", "dmabuf; the driver flushes what NICs write"),
        ({"dmabuf": False}, "broken", "the driver does not export this GPU's memory"),
        ({"dmabuf": False, "rdma": False}, "warning", "its driver lets no NIC reach its memory"),
        ({"writes": "never"}, "broken", "neither orders what NICs write nor flushes it"),
    ],
)
def test_the_driver_knows_better_than_the_files(machine, driver_gpu, level, found):
    facts = {"rdma": True, "dmabuf": True, "writes": "ordered", **driver_gpu}
    gpu = DriverGpu(device="cuda:0", name="H100", uuid="GPU-1", pci="0000:13:00.0", **facts)
    told = diagnose(replace(machine.system, gpus=(gpu,))).findings
    (finding,) = [finding for check, finding in told if check.name == "gpu-memory"]
    assert (finding.level, finding.subject) == (level, "cuda:0 (H100)")
    assert found in finding.found


def test_a_container_that_was_given_one_nic_of_several_is_well(machine):
    machine.write(".dockerenv", "")
    machine.remove("dev/infiniband/uverbs1")
    machine.port(1, "state", "1: DOWN")
    machine.gids(1)
    assert machine.findings("broken") == []
    rows = [row[:4] for row in machine.findings("note")]
    assert rows == [("device-nodes", "note", "", "of the host's devices this container was not given mlx5_1")]
    assert ways(machine.system.topology) == [Way("shm"), Way("tcp"), Way("verbs", "mlx5_0")]
    told = diagnose(replace(machine.system, named=("mlx5_1",))).findings
    ((check, finding),) = [row for row in told if row[1].level == "broken"]
    assert (check.name, finding.subject) == ("link", "mlx5_1")
    assert "no device node" in finding.found


def test_a_host_that_runs_containers_is_none(machine):
    layers = "lowerdir=/var/lib/docker/overlay2/l/7"
    lines = (
        "25 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw",
        f"97 25 0:50 / /var/lib/docker/overlay2/7/merged rw,relatime - overlay overlay rw,{layers}",
    )
    machine.write("proc/self/mountinfo", "\n".join(lines))
    assert not machine.system.is_container


def test_soft_roce_is_a_nic(machine):
    machine.write("sys/class/infiniband/rxe0/parent", "eth0")
    machine.write("sys/class/infiniband/rxe0/ports/1/state", "4: ACTIVE")
    machine.write("sys/class/infiniband/rxe0/ports/1/link_layer", "Ethernet")
    rows = [row for row in machine.findings("broken") if row[0] == "provider"]
    assert rows[0][3] == "libibverbs has no provider rxe for the driver rdma_rxe"


@pytest.mark.parametrize("driver", ["mlx5_core.sf", "mlx5_core"])
def test_drivers_of_one_provider(machine, driver):
    for link in machine.root.glob("sys/devices/**/0000:*4:00.0/driver"):
        link.unlink()
        link.symlink_to("../" * 6 + f"bus/auxiliary/drivers/{driver}")
    rows = [row[3] for row in machine.findings("ok") if row[0] == "provider"]
    assert rows == ["libibverbs with mlx5 for 2 devices"]


def test_a_nic_on_lo_is_for_this_host(machine):
    (folder,) = machine.root.glob("sys/devices/**/0000:14:00.0/net/eth0")
    folder.rename(folder.parent / "lo")
    assert (
        "gid",
        "note",
        "mlx5_0",
        "on the interface lo: its GIDs reach this host only",
        "",
    ) in machine.findings()


def test_room_for_headers_counts(machine):
    machine.write("sys/class/net/eth1/mtu", "4192")
    assert machine.findings() == []
    machine.write("sys/class/net/eth1/mtu", "4191")
    assert any("carry 2048 bytes" in row[3] for row in machine.findings("warning"))


def test_no_rdma_nic_is_no_fault(tmp_path):
    from anyfabric.doctor import System

    laptop = System(tmp_path)
    found = diagnose(laptop)
    assert not found.is_broken
    assert found.summary == "no RDMA NIC: shm and tcp are used"
    required = diagnose(System(tmp_path, required="verbs"))
    assert required.is_broken
    assert "verbs is required" in required.findings[1][1].found


def test_a_copy_that_was_packed_by_tar_is_the_same(machine):
    """It fills every file of sysfs with zeros up to 4096 bytes, the size that sysfs states."""
    for file in (machine.root / "sys").rglob("*"):
        if file.is_file() and not file.is_symlink():
            os.truncate(file, 4096)
    assert machine.findings() == []


def test_nonsense_in_files_is_no_exception(machine):
    for file in machine.root.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.write_bytes(b"\xff\x00:;\n-1\xfe" * 40)
    diagnose(machine.system)
