"""Records of the comparison with other libraries: arithmetic, JSON, and the tables made from them."""

import dataclasses
import json

import pytest
from benchmarks.peers import records, table
from benchmarks.peers.workload import Operation, Shape

MIB = 1 << 20
WRITE = Shape(Operation.WRITE, MIB, 1, 64 * MIB)
NOTIFY = Shape(Operation.NOTIFY, 8, 1, 64 * MIB)
PAGES = Shape(Operation.PAGES, 1024, 4096, 4 * MIB)


def turn(call_ns, num_calls=4):
    return records.Round.of([call_ns] * num_calls, foreign_cpu=0.25)


def participant(name, kind="peer"):
    return records.Participant(name, kind, "C", "1.2", "shm", "a note", {"UCX_TLS": "tcp"})


def record(rows, participants=("fast", "gone")):
    return records.Record(
        started_at="2026-01-02T03:04:05+00:00",
        command="python -m benchmarks.peers.run",
        commit="0123456789abcdef",
        modified=False,
        machine=records.Machine("a CPU", 2, 24 << 30, "6.1", hypervisor=True, huge_pages="madvise"),
        versions={"python": "3.11"},
        num_rounds=3,
        participants=tuple(map(participant, participants)),
        rows=tuple(rows),
    )


ROWS = (
    records.Row("fast", WRITE, (turn(100_000), turn(200_000), turn(400_000))),
    records.Row("fast", NOTIFY, (turn(1500), turn(2500), turn(2000))),
    records.Row("gone", WRITE, problem="unavailable: no wheel"),
    records.Row("gone", NOTIFY, problem="unavailable: no wheel"),
)


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1), (1, 1), (50, 50), (50.1, 51), (99, 99), (99.5, 100), (100, 100)]
)
def test_percentile_is_a_value_that_occurred(percent, expected):
    assert records.percentile(range(1, 101), percent) == expected


def test_percentile_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no values"):
        records.percentile([], 50)


def test_round_keeps_the_slow_call():
    summary = records.Round.of([10, 30, 20, 1000])
    assert summary == records.Round(4, total_ns=1060, p50_ns=20, p99_ns=1000, max_ns=1000)


def test_rates_are_medians_over_rounds_of_each_rounds_mean():
    row = ROWS[0]
    assert row.median("gb_per_s") == pytest.approx(MIB / 200_000)
    assert row.median("ops_per_s") == pytest.approx(5000)
    assert row.values("p50_us") == [100.0, 200.0, 400.0]


def test_rounds_on_cores_far_apart_count_only_where_there_are_no_others():
    near, far = turn(100_000), dataclasses.replace(turn(400_000), ring_ns=250, is_near=False)
    assert records.Row("fast", WRITE, (far, near, far)).values("p50_us") == [100.0]
    assert records.Row("fast", WRITE, (far, far)).values("p50_us") == [400.0, 400.0]


def test_pages_count_all_their_bytes():
    row = records.Row("fast", PAGES, (turn(1_000_000),))
    assert row.median("gb_per_s") == pytest.approx(4 * MIB / 1e6)
    assert row.median("pages_per_s") == pytest.approx(4096e3)


def test_row_without_rounds_has_no_numbers():
    assert ROWS[2].median("gb_per_s") is None


def test_json_round_trip():
    assert records.from_json(records.to_json(record(ROWS))) == record(ROWS)


def test_json_names_what_readers_look_for():
    body = json.loads(records.to_json(record(ROWS)))
    assert (body["schema"], body["kind"]) == (1, "peers")
    row = body["rows"][1]
    assert (row["op"], row["size_bytes"], row["pages"], row["checked"]) == ("notify", 8, 1, True)
    assert row["latency_us"] == {"p50": 2.0, "p99": 2.0}
    unavailable = body["rows"][2]
    assert unavailable["problem"] == "unavailable: no wheel"
    assert (unavailable["checked"], unavailable["latency_us"], unavailable["rounds"]) == (False, None, [])


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 1, "kind": "peers"}', '{"schema": 9, "kind": "x"}']
)
def test_other_files_are_refused(text):
    with pytest.raises(records.RecordError):
        records.from_json(text)


def test_failures_are_found():
    wrong = records.Row("fast", PAGES, problem="failed: 7 bytes or words were wrong")
    assert record([*ROWS, wrong]).failures() == (wrong,)
    assert record(ROWS).failures() == ()


@pytest.mark.parametrize(
    ("value", "text"), [(0.066, "0.07"), (9.994, "9.99"), (12.34, "12.3"), (99.96, "100.0"), (123.6, "124")]
)
def test_figures(value, text):
    assert table.figure(value) == text


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (8, "8 B"), (1024, "1 KiB"), (65536, "64 KiB"), (MIB + 1024, "1025 KiB")]
)
def test_amounts(nbytes, text):
    assert table.amount(nbytes) == text


def test_table_shows_every_participant():
    lines = table.render(record(ROWS)).splitlines()
    assert lines[0] == "|  | caller | 1 MiB, GB/s | 8 B + notification, µs p50 / p99 |"
    assert lines[2] == "| fast | C | 5.24 | 2.00 / 2.00 |"
    assert lines[3] == "| gone | C | unavailable |  |"
    assert "- gone: unavailable: no wheel" in lines
    assert any("3 interleaved rounds" in line and "0123456789" in line for line in lines)


def test_table_tells_missing_from_failed():
    rows = [
        records.Row("fast", WRITE, problem="failed: 7 bytes or words were wrong"),
        records.Row("fast", NOTIFY, problem="unsupported: it cannot notify"),
    ]
    text = table.render(record(rows, ["fast"]))
    assert "| fast | C | failed | - |" in text
    assert "- fast: failed: 7 bytes" in text
    assert "cannot notify" not in text


def test_long_form_has_ranges_and_notes():
    text = table.render(record(ROWS), "peers, ranges")
    assert "5.24 (2.62 to 10.5)" in text
    assert "- fast: a note; version 1.2; path `shm`; `UCX_TLS=tcp`" in text
    assert "at most 25%" in text


def test_uncommitted_changes_are_said():
    assert "with changes" in table.render(dataclasses.replace(record(ROWS), modified=True))


def test_replacing_touches_only_what_is_between_the_markers():
    begin, end = table.markers("peers")
    long_begin, long_end = table.markers("peers, ranges")
    text = f"a\n{begin}\nold\n{end}\nb\n{long_begin}{long_end}\n"
    once = table.replace_between(text, "peers", "new")
    assert once == f"a\n{begin}\n\nnew\n\n{end}\nb\n{long_begin}{long_end}\n"
    assert table.replace_between(once, "peers", "new") == once
    assert table.replace_between("no markers", "peers", "new") == "no markers"


@pytest.mark.parametrize("which", [0, 1])
def test_a_lone_marker_is_refused(which):
    with pytest.raises(ValueError, match="expected"):
        table.replace_between(table.markers("peers")[which], "peers", "new")


def test_main_renders_into_the_named_file(tmp_path):
    source, shown = tmp_path / "record.json", tmp_path / "page.md"
    source.write_text(records.to_json(record(ROWS)))
    shown.write_text("\n".join(table.markers("peers")))
    assert table.main(["--record", str(source), str(shown)]) == 0
    assert "| fast | C | 5.24 |" in shown.read_text()


def test_long_form_says_how_the_cores_stood():
    near = dataclasses.replace(turn(100_000), ring_ns=70)
    far = dataclasses.replace(turn(400_000), ring_ns=250, is_near=False)
    text = table.render(
        record([records.Row("fast", WRITE, (near, near, near, far))], ("fast",)), table.FORMS[1]
    )
    assert "70 to 250 ns" in text
    assert "(25%)" in text
    assert "bare ring" not in table.render(record(ROWS), table.FORMS[1])
