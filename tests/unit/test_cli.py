"""The command line, as a user runs it: in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-m", "anyfabric"]


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


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    done = run("info", "--json", str(tmp_path), code=2)
    assert f"'{tmp_path}' is a directory" in done.stderr
    for place in (Path("/dev/full"), Path("/proc/none/info.json")):
        done = run("info", "--json", str(place), code=1)
        assert f"cannot write {place}" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("info",), ("info", "--json"), ("doctor",), ("doctor", "--json")])
def test_a_full_disk_is_a_line_on_stderr(arguments):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*PROGRAM, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=50
        )
    assert done.returncode == 1
    assert done.stderr == "error: [Errno 28] No space left on device\n"


def test_closed_outputs():
    closed = ["sh", "-c", 'exec "$@"', "sh", *PROGRAM, "info", "--json"]
    done = subprocess.run(
        [*closed[:2], 'exec "$@" >&-', *closed[3:]], capture_output=True, text=True, timeout=50
    )
    assert (done.returncode, done.stderr) == (1, "Error: cannot write to stdout: it is closed\n")
    # What is said beside the results must not be among them.
    environment = {**os.environ, "ANYFABRIC_TYPO": "1"}
    command = [*closed[:2], 'exec "$@" 2>&-', *closed[3:-1]]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=50, env=environment)
    assert done.returncode == 0
    assert "ANYFABRIC_TYPO" not in done.stdout


def test_ctrl_c_ends_both_processes_of_perf_without_a_traceback():
    arguments = [*PROGRAM, "perf", "--transport", "tcp", "--op", "barrier", "--rounds", "100000000"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True) as measuring:
        try:
            other = eventually(
                lambda: Path(f"/proc/{measuring.pid}/task/{measuring.pid}/children").read_text()
            )
            status = Path(f"/proc/{other.strip()}/status")
            eventually(
                lambda: int(re.search(r"SigIgn:\t(\w+)", status.read_text())[1], 16) >> signal.SIGINT - 1 & 1
            )
            os.killpg(measuring.pid, signal.SIGINT)
            assert measuring.wait(20) == 1
            assert "Traceback" not in measuring.stderr.read()
            assert not status.exists()
        finally:
            measuring.kill()


def eventually(look, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def test_errors_are_lines_on_stderr():
    done = run("info", env={"ANYFABRIC_TCP_STREAMS": "[bold]"}, code=1)
    assert done.stdout == ""
    assert "ANYFABRIC_TCP_STREAMS was given '[bold]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert "unknown" in run("perf", "--sizes", "unknown", code=2).stderr
    assert "GiB of memory" in run("perf", "--op", "write", "--sizes", "1024G", code=1).stderr


ROW = {
    *("transport", "op", "polling", "size_bytes", "pages", "gb_per_s", "ops_per_s", "latency_us"),
    *("checked", "nics"),
}


@pytest.fixture
def over_sockets(libfabric_of_the_wheel):
    """Options for engines whose NICs are loopback addresses."""
    settings = ("--set", "libfabric_provider=tcp", "--set", f"libfabric_library={libfabric_of_the_wheel}")
    return lambda *nics: (*settings, "--nics", ",".join(nics))


def test_perf_over_eight_nics(over_sockets, tmp_path):
    file, nics = tmp_path / "perf.json", over_sockets(*(f"127.0.0.{host}" for host in range(1, 9)))
    run("perf", "--transport", "libfabric", "--op", "write", "--rounds", "20", "--sizes", "8,8M", *nics,
        "--memory", "allocated", "--json", str(file))  # fmt: skip
    rows = json.loads(file.read_text())["rows"]
    assert {row["size_bytes"] for row in rows} == {8, 8 << 20}
    for row in rows:
        assert row["checked"] is True
        assert row["nics"][0].startswith("8 of 8 rails over "), row
        assert all(f"127.0.0.{host} " in row["nics"][0] for host in range(1, 9)), row


@pytest.mark.parametrize("transport", ["shm", "tcp", "libfabric"])
def test_perf_measures_every_operation(request, transport, tmp_path):
    file = tmp_path / "perf.json"
    nics = ()
    if transport == "libfabric":
        nics = request.getfixturevalue("over_sockets")("127.0.0.1", "127.0.0.2")
    done = run("perf", "--transport", transport, "--rounds", "10", "--pages", "64", "--sizes", "8,64K", *nics,
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
        if nics:
            assert row["nics"] == ["2 of 2 rails over 127.0.0.1 (tcp), 127.0.0.2 (tcp)"]
            assert row["nics"][0] in done.stdout
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


def test_perf_covers_the_nics_that_are_named(over_sockets):
    done = run("perf", "--op", "barrier", "--rounds", "10", "--json", *over_sockets("127.0.0.1"))
    found = json.loads(done.stdout)
    assert [row["transport"] for row in found["rows"]] == ["shm", "libfabric", "tcp"]
    assert found["settings"].items() >= {"libfabric_provider": "tcp", "nics": ["127.0.0.1"]}.items()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--transport", "libfabric", "--set", "libfabric_provider=none"], 1, "has no NIC for provider"),
        (["--nics", "none0"], 1, "none0"),
        (
            ["--transport", "libfabric", "--set", "libfabric_provider=tcp", "--nics", "none0"],
            1,
            "has no NIC none0 for provider tcp; it has ",
        ),
        (["--set", "queue_depth=none"], 1, "`queue_depth` was given 'none'; expected a whole number"),
        (["--set", "queue_depths=1"], 2, "no setting is called 'queue_depths'"),
        (["--set", "polling=busy"], 2, "polling is given by --polling"),
        (["--set", "queue_depth"], 2, "expected NAME=VALUE"),
    ],
)
def test_perf_says_what_is_missing_or_wrong_once(libfabric_of_the_wheel, arguments, code, message):
    env = {"ANYFABRIC_LIBFABRIC_LIBRARY": libfabric_of_the_wheel}
    done = run("perf", "--op", "barrier", *arguments, env=env, code=code)
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert "other process" not in done.stderr


@pytest.mark.parametrize("transport", ["verbs", "libfabric"])
def test_perf_without_a_nic_says_so(transport):
    if json.loads(run("info", "--json").stdout)["topology"]["nics"]:
        pytest.skip("this machine has RDMA NICs")
    done = run("perf", "--op", "barrier", "--transport", transport, code=1)
    assert f"error: {transport}: " in done.stderr
    assert "code=unsupported" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(tmp_path):
    program = "import sys; sys.modules['matplotlib'] = None; from anyfabric.cli import main; main()"
    command = [sys.executable, "-c", program, "perf", "--plot", str(tmp_path / "perf.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "plots need matplotlib" in done.stderr


def test_what_cannot_be_kept_is_refused_before_anything_is_measured(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for option in ("--json", "--plot"):
        done = run("perf", option, str(file / "new" / "perf.png"), code=2)
        assert f"'{file}' is no folder" in " ".join(done.stderr.split())
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: make .venv with `make test`")
    done = run("perf", "--plot", str(tmp_path / "perf.pgn"), code=1)
    assert "perf.pgn: its suffix is none of" in done.stderr
    assert list(tmp_path.iterdir()) == [file]


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
            # Without a transport: the one that the two choose, and tcp.
            done = run(*command[2:], *more[:6], "--json", env=secret)
            assert [row["transport"] for row in json.loads(done.stdout)["rows"]] == ["shm", "tcp"]
            run(*command[2:], *more, env={"ANYFABRIC_SECRET": "wrong"}, code=1)
            run(*command[2:], *more, env=secret)
            server.send_signal(signal.SIGINT)
            assert server.wait(10) == 0
        finally:
            server.kill()


def test_perf_serves_every_transport_of_one_client():
    arguments = [*PROGRAM, "perf", "serve", "--listen", "127.0.0.1", "--once"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            command = server.stdout.readline().split()
            more = ["--op", "send", "--sizes", "8", "--rounds", "10", "--json"]
            done = run(*command[2:], *more, env=dict([command[0].split("=")]))
            assert [row["transport"] for row in json.loads(done.stdout)["rows"]] == ["shm", "tcp"]
            assert server.wait(20) == 0
        finally:
            server.kill()


def test_perf_serves_over_nics(over_sockets):
    nics = over_sockets("127.0.0.1")
    arguments = [*PROGRAM, "perf", "serve", "--listen", "127.0.0.1", "--once", *nics]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            command = server.stdout.readline().split()
            secret = dict([command[0].split("=")])
            more = ["--op", "send", "--sizes", "8", "--rounds", "10", "--transport", "libfabric", "--json"]
            done = run(*command[2:], *more, *over_sockets("127.0.0.2", "127.0.0.3"), env=secret)
            (row,) = json.loads(done.stdout)["rows"]
            assert row["nics"] == ["2 of 2 rails over 127.0.0.2 (tcp), 127.0.0.3 (tcp)"]
            assert server.wait(20) == 0
        finally:
            server.kill()
