"""The command line, as a user runs it: in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest

PROGRAM = [sys.executable, "-c", "from anyfabric.cli import main; main()"]


def run(*arguments, env=None, code=0, timeout=50):
    done = subprocess.run(
        [*PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
    )
    assert done.returncode == code, done.stderr
    return done


def test_help_names_every_command():
    text = run("--help").stdout
    for command in ("info", "doctor", "perf", "demo"):
        assert re.search(rf"^  {command}\b", text, re.MULTILINE)
    assert "kv" in run("demo", "--help").stdout
    assert "anyfabric, version" in run("--version").stdout


def test_info_as_tables():
    text = run("info", env={"ANYFABRIC_POLLING": "busy", "ANYFABRIC_SECRET": "hunter2"}).stdout
    assert "ANYFABRIC_POLLING" in text
    assert "hunter2" not in text
    for word in ("shm", "tcp", "cpu", "heartbeats_lost"):
        assert word in text


def test_info_as_json(tmp_path):
    found = json.loads(run("info", "--json").stdout)
    assert {row["name"] for row in found["transports"]} >= {"shm", "tcp"}
    assert all(row["doc"] and row["origin"] == "default" for row in found["settings"])
    file = tmp_path / "new" / "info.json"
    assert run("info", "--json", str(file)).stdout == ""
    assert json.loads(file.read_text())["version"] == found["version"]


def test_errors_are_lines_on_stderr():
    done = run("info", env={"ANYFABRIC_TCP_STREAMS": "[bold]"}, code=1)
    assert done.stdout == ""
    assert "ANYFABRIC_TCP_STREAMS was given '[bold]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert "unknown" in run("perf", "--sizes", "unknown", code=2).stderr
    assert "GiB of memory" in run("perf", "--op", "write", "--sizes", "1024G", code=1).stderr


ROW = {"transport", "op", "polling", "size_bytes", "pages", "gb_per_s", "ops_per_s", "latency_us", "checked"}


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_perf_measures_every_operation(transport, tmp_path):
    file = tmp_path / "perf.json"
    done = run("perf", "--transport", transport, "--rounds", "10", "--pages", "64", "--sizes", "8,64K",
               "--memory", "allocated", "--memory", "registered", "--json", str(file))  # fmt: skip
    assert transport in done.stdout
    found = json.loads(file.read_text())
    assert {"machine", "commit", "command", "versions", "rows", "baselines"} <= set(found)
    assert {row["op"] for row in found["rows"]} == {"write", "pages", "scatter", "send", "barrier"}
    for row in found["rows"]:
        assert set(row) >= ROW
        assert row["checked"] is True
        assert list(row["latency_us"]) == ["p50", "p99", "p999", "max"]
        assert 0 < row["latency_us"]["p50"] <= row["latency_us"]["max"]
        assert row["ops_per_s"] > 0
    if transport == "shm":
        names = {row["baseline"] for row in found["baselines"]}
        assert names == {"ring", "memcpy", "copy_pages", "process_vm_writev"}


def test_perf_to_stdout_is_json_alone():
    done = run(
        "perf",
        "--transport",
        "shm",
        "--op",
        "write",
        "--sizes",
        "8",
        "--rounds",
        "10",
        "--no-check",
        "--json",
    )
    (row,) = json.loads(done.stdout)["rows"]
    assert row["checked"] is False


def test_perf_plots(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: make .venv with `make test`")
    file = tmp_path / "perf.png"
    run(
        "perf",
        "--transport",
        "shm",
        "--op",
        "write",
        "--sizes",
        "8:4K",
        "--rounds",
        "10",
        "--plot",
        str(file),
    )
    assert file.read_bytes().startswith(b"\x89PNG")


def test_perf_serve_prints_the_command_for_the_other_host():
    arguments = [*PROGRAM, "perf", "serve", "--listen", "127.0.0.1"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            command = server.stdout.readline().split()
            assert re.fullmatch(r"ANYFABRIC_SECRET=[0-9a-f]{32}", command[0])
            assert command[1:4] == ["anyfabric", "perf", "--connect"]
            secret = dict([command[0].split("=")])
            more = ["--op", "write", "--sizes", "8", "--rounds", "10", "--transport", "tcp", "--json"]
            for _ in range(2):
                done = run(*command[2:], *more, env=secret)
                assert json.loads(done.stdout)["rows"][0]["transport"] == "tcp"
            run(*command[2:], *more, env={"ANYFABRIC_SECRET": "wrong"}, code=1)
            run(*command[2:], *more, env=secret)
            server.send_signal(signal.SIGINT)
            assert server.wait(10) == 0
        finally:
            server.kill()
