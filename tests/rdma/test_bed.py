"""The parts of the RDMA bed that need no virtual machine."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture
def image(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("image")


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("run")


def module(*needed: str) -> bytes:
    return b"\x7fELF...\0license=GPL\0depends=" + ",".join(needed).encode() + b"\0name=x\0"


def test_a_module_is_loaded_after_what_it_needs(image):
    modules = {
        "rdma_rxe": module("ib-core", "udp_tunnel"),
        "ib_core": module(),
        "udp_tunnel": module("ip6", "ib_core"),
        "ip6": module(),
    }
    order = image.in_order(["rdma_rxe", "ib_core", "virtio"], modules, frozenset({"virtio"}))
    assert order == ["ib_core", "ip6", "udp_tunnel", "rdma_rxe"]
    with pytest.raises(RuntimeError, match="no module udp_tunnel"):
        image.in_order(["a"], {"a": module("udp_tunnel")}, frozenset())


def test_an_archive_is_read_back(image, tmp_path):
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("busybox is not installed: `make test-rdma` does")
    files = {"bin/": b"", "bin/tool": b"#!/bin/sh\n", "init": bytes(range(256)) * 17, "empty": b""}
    subprocess.run([busybox, "cpio", "-id"], input=image.cpio(files), cwd=tmp_path, check=True)
    for name, content in files.items():
        found = tmp_path / name
        assert found.is_dir() if name.endswith("/") else found.read_bytes() == content
    assert os.access(tmp_path / "init", os.X_OK)


def test_what_is_missing_is_a_reason_to_skip(image, run, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RDMA_BED_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert run.main() == 77
    assert "SKIPPED the RDMA tests: the bed boots x86_64 kernels only" in capsys.readouterr().out
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(image.shutil, "which", lambda _: None)
    assert run.main() == 77
    assert "this machine has no apt" in capsys.readouterr().out


def test_without_the_right_to_install_it_says_what_to_type(image, monkeypatch, tmp_path):
    monkeypatch.setenv("RDMA_BED_CACHE", str(tmp_path))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(image, "PACKAGES", ("no-such-package",))
    monkeypatch.setattr(image, "_may_install", lambda: False)
    with pytest.raises(image.Missing, match=r"sudo apt-get install .* no-such-package"):
        image.ready()


def test_scenarios_have_names_of_their_own(run):
    names = [scenario.name for scenario in run.SCENARIOS]
    assert len(set(names)) == len(names)
    assert all(scenario.smoke for scenario in run.SCENARIOS)


@pytest.fixture
def trying(image, run, monkeypatch, tmp_path):
    """Runs two scenarios in machines that exit with the codes given, one after the other."""

    def trying(codes):
        def in_vm(*_, stdout, **__):
            stdout.write(b"what it printed")
            return codes.pop(0)

        scenarios = [run.Scenario(name, "", ("rxe0 rxe0",)) for name in ("first", "second")]
        monkeypatch.setattr(run, "SCENARIOS", scenarios)
        monkeypatch.setattr(sys, "argv", ["run.py"])
        monkeypatch.setenv("CARGO_TARGET_DIR", str(tmp_path))
        monkeypatch.setattr(run, "ready", lambda: image.Image(tmp_path, tmp_path, "a kernel"))
        monkeypatch.setattr(run, "build", lambda _: {})
        monkeypatch.setattr(run, "run_in_vm", in_vm)
        return run.main()

    return trying


@pytest.mark.parametrize(
    ("codes", "code", "told"),
    [
        ([0, 0], 0, "2 of 2 RDMA scenarios passed"),
        ([1, 0, 0], 0, "FLAKY, passed at the second try: first"),
        ([0, 1, 1], 1, "1 of 2 RDMA scenarios passed"),
        ([1, 1, 0, 1], 1, "FLAKY, passed at the second try: first"),
    ],
)
def test_what_fails_is_run_once_more(trying, capsys, codes, code, told):
    left = codes.copy()
    assert trying(left) == code
    assert left == []
    printed = capsys.readouterr().out
    assert told in printed
    assert printed.count("what it printed") == sum(codes)
