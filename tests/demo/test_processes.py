"""The command's view of its two processes: which ends are a loss, and which are not."""

import os
import signal
import sys

import pytest

from anyfabric.demo import processes


@pytest.fixture
def pair(monkeypatch):
    """Make a pair whose children run a given program instead of a role of the demo."""
    popen = processes.subprocess.Popen

    def run_program(command, **options):
        return popen([sys.executable, "-c", command[-1].removeprefix("anyfabric.demo.")], **options)

    monkeypatch.setattr(processes.subprocess, "Popen", run_program)
    # Programs here do not notice that another one is gone.
    monkeypatch.setattr(processes, "STOP_S", 1.0)
    pair = processes.Pair()
    yield pair
    pair.stop()


def test_one_may_end_before_the_last_event_of_the_other(pair):
    first = pair.start("")
    assert first.wait(timeout_s=20)
    second = pair.start("""input(); print('{"event": "finished"}')""")
    second.write(go_on=True)
    assert pair.next_event(timeout_s=20) == (second, {"event": "finished"})


def test_events_of_children_that_have_both_ended_are_taken(pair):
    children = [pair.start(program) for program in ("", """print('{"event": "finished"}')""")]
    assert all(child.wait(timeout_s=20) for child in children)
    assert pair.next_event(timeout_s=20) == (children[1], {"event": "finished"})
    with pytest.raises(processes.ChildLostError, match="ended with code 0"):
        pair.next_event(timeout_s=20)


def test_a_bad_end_is_told_at_once(pair):
    pair.start("input()")
    lost = pair.start("raise SystemExit(7)")
    with pytest.raises(processes.ChildLostError, match=rf"{lost.pid}\) ended with code 7"):
        pair.next_event(timeout_s=20)


def test_a_killed_child_is_named(pair):
    pair.start("input()")
    lost = pair.start("input()")
    os.kill(lost.pid, signal.SIGKILL)
    with pytest.raises(processes.ChildLostError, match=rf"{lost.pid}\) was killed by SIGKILL"):
        pair.next_event(timeout_s=20)


def test_a_failure_is_told_with_its_message(pair):
    pair.start("input()")
    pair.start("""print('{"event": "failed", "message": "no memory"}'); input()""")
    with pytest.raises(processes.ChildLostError, match="failed: no memory"):
        pair.next_event(timeout_s=20)


LOSER = """print('{"event": "failed", "message": "lost the other", "lost_the_other": true}')"""
CULPRIT = """print('{"event": "failed", "message": "no memory"}')"""


@pytest.mark.parametrize("loser_first", [True, False])
def test_a_cause_is_told_without_its_consequence(pair, loser_first):
    programs = {"loser": LOSER, "culprit": CULPRIT}
    children = {}
    for name in sorted(programs, reverse=loser_first):
        children[name] = pair.start(programs[name])
        assert children[name].wait(timeout_s=20)
    with pytest.raises(processes.ChildLostError) as lost:
        pair.next_event(timeout_s=20)
    assert str(lost.value) == f"the {CULPRIT} process (pid {children['culprit'].pid}) failed: no memory"


def test_a_consequence_is_told_where_the_cause_cannot_speak(pair):
    killed = pair.start("input()")
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait(timeout_s=20)
    loser = pair.start(LOSER)
    with pytest.raises(processes.ChildLostError) as lost:
        pair.next_event(timeout_s=20)
    assert f"{killed.pid}) was killed by SIGKILL" in str(lost.value)
    assert f"{loser.pid}) failed: lost the other" in str(lost.value)


def test_who_does_not_listen_yet_is_ended_at_once(pair, monkeypatch):
    child = pair.start("while True: pass")
    monkeypatch.setattr(processes, "STOP_S", 60.0)
    pair.stop()
    assert child.obituary() == f"the {child.role} process (pid {child.pid}) was killed by SIGTERM"
