"""The driver of the comparison: what becomes of contenders that are missing, fail, or move wrong bytes."""

from typing import ClassVar

import pytest
from benchmarks.peers import contenders, pair, run
from benchmarks.peers.workload import DATA_BYTES, Operation, Shape

WRITE = next(shape for shape in run.PLAN if shape.op is Operation.WRITE)
FLAG = Shape(Operation.FLAG, 8, 1, DATA_BYTES)
SHAPES = (WRITE, FLAG)


class FakePair:
    """Answers every load with one duration, or with what `script` says of its operation."""

    script: ClassVar[dict] = {}
    version, path, pids = "1.0", "nowhere", ()

    def __init__(self, *_):
        if "start" in self.script:
            raise self.script["start"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def measure(self, load):
        outcome = self.script.get(load.shape.op, 0)
        if isinstance(outcome, Exception):
            raise outcome
        return pair.Measured((1000,), outcome)


@pytest.fixture
def turn(monkeypatch):
    """Let a contender take one turn under a script; return its rows by operation."""
    monkeypatch.setattr(run, "Pair", FakePair)
    monkeypatch.setattr(FakePair, "script", {})
    monkeypatch.setattr(run.placement, "ring_ns", lambda: 70)

    def take(scripts, command=lambda: ("true",), **settings):
        contender = contenders.Contender("it", "peer", "C", command, **settings)
        standing = run.Standing(contender)
        for round_idx, script in enumerate(scripts):
            FakePair.script = script
            run.take_turn(standing, SHAPES, round_idx, quick=False)
        return {shape.op: standing.row(shape) for shape in SHAPES}

    return take


def test_each_round_leaves_a_number(turn):
    rows = turn([{}, {}])
    assert all(len(row.rounds) == 2 and row.problem is None for row in rows.values())


def test_what_cannot_be_started_is_unavailable(turn):
    reason = "no wheel"

    def command():
        raise contenders.UnavailableError(reason)

    for rows in (turn([{}], command), turn([{"start": pair.PairError("no wheel")}])):
        assert {row.problem for row in rows.values()} == {"unavailable: no wheel"}


def test_what_stops_starting_has_failed(turn):
    rows = turn([{}, {"start": pair.PairError("gone")}])
    assert all(row.problem == "failed: gone" and not row.rounds for row in rows.values())


def test_wrong_bytes_cost_the_number_of_that_operation(turn):
    rows = turn([{}, {Operation.WRITE: 7}, {}])
    assert rows[Operation.WRITE].problem == "failed: 7 bytes or words were wrong"
    assert rows[Operation.WRITE].rounds == ()
    assert len(rows[Operation.FLAG].rounds) == 3


def test_an_operation_that_fails_leaves_the_others(turn):
    rows = turn([{Operation.WRITE: pair.PairError("hung")}, {}])
    assert rows[Operation.WRITE].problem == "failed: hung"
    assert len(rows[Operation.FLAG].rounds) == 2


def test_what_is_not_offered_is_not_asked(turn):
    rows = turn([{Operation.FLAG: 9}], unsupported={Operation.FLAG: "no"})
    assert rows[Operation.FLAG].problem == "unsupported: no"
    assert len(rows[Operation.WRITE].rounds) == 1


def test_seeds_differ_between_rounds_and_shapes():
    seeds = {run.seed_of(round_idx, shape) for round_idx in range(20) for shape in run.PLAN}
    assert len(seeds) == 20 * len(run.PLAN)


def test_every_contender_is_named_once():
    names = [each.name for each in contenders.all_contenders()]
    assert len(names) == len(set(names))


def test_nothing_to_measure_is_an_error(capsys):
    assert run.main(["--only", "no such contender"]) == 2
    assert "nothing to measure" in capsys.readouterr().err


def measured_between(monkeypatch, rings, num_rounds=1):
    """Return the rounds of a contender beside whose turns a bare ring took what `rings` say."""
    monkeypatch.setattr(run, "Pair", FakePair)
    monkeypatch.setattr(FakePair, "script", {})
    monkeypatch.setattr(run.placement, "ring_ns", iter(rings).__next__)
    contender = contenders.Contender("it", "peer", "C", lambda: ("true",))
    options = run.parse_arguments(["--rounds", str(num_rounds)])
    (standing,) = run.measure_all([contender], [WRITE], options)
    return standing.row(WRITE).rounds


def test_a_turn_counts_while_the_cores_are_near(monkeypatch):
    (turn,) = measured_between(monkeypatch, [80, 70, 75])
    assert (turn.ring_ns, turn.is_near) == (75, True)


def test_a_turn_on_cores_far_apart_is_taken_again(monkeypatch):
    turns = measured_between(monkeypatch, [70, 70, 240, 250, 70, 75, 70])
    assert [(turn.ring_ns, turn.is_near) for turn in turns] == [(240, False), (250, False), (75, True)]


def test_a_turn_is_taken_three_times_at_most(monkeypatch):
    turns = measured_between(monkeypatch, [70, 70, *[240] * 5])
    assert [turn.is_near for turn in turns] == [False] * 3


def test_one_ring_that_was_quick_by_luck_does_not_put_the_others_far(monkeypatch):
    turns = measured_between(monkeypatch, [160, 160, 160, 47, 47, *[160] * 20], num_rounds=5)
    assert {turn.ring_ns for turn in turns} == {47, 160}
    assert all(turn.is_near for turn in turns)


def test_the_best_ring_may_come_last(monkeypatch):
    turns = measured_between(monkeypatch, [240, 240, 250, 70, 70], num_rounds=2)
    assert [turn.is_near for turn in turns] == [False, True]


def test_without_a_ring_every_turn_counts(monkeypatch):
    (turn,) = measured_between(monkeypatch, [0, 0, 0])
    assert (turn.ring_ns, turn.is_near) == (0, True)


def test_a_ring_that_failed_once_says_nothing_of_the_others(monkeypatch):
    (turn,) = measured_between(monkeypatch, [0, 70, 75])
    assert turn.is_near
