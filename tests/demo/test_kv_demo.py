"""`anyfabric demo kv`, end to end: real processes, both transports, the controls, dying peers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the demo needs torch")
pytest.importorskip("transformers", reason="the demo needs transformers")

# Two processes import torch on two cores; a cold disk makes that slow.
pytestmark = pytest.mark.timeout(180)

COMMAND = [sys.executable, "-m", "anyfabric", "demo", "kv"]
PROMPTS = "Tom had a blue boat. His boat was blue, and Tom\nZoë met Åsa at the café. It rained, so"


def _demo(tmp_path, *options, prompts=PROMPTS):
    """Run the demo; return the finished process and its JSON, if it wrote one."""
    file, out = tmp_path / "prompts.txt", tmp_path / "out.json"
    file.write_text(prompts, encoding="utf-8")
    out.unlink(missing_ok=True)
    command = [*COMMAND, "--prompts", file, "--json", out, "--rounds", "1", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    return done, json.loads(out.read_text()) if out.exists() else None


def _check_record(record, num_prompts):
    assert record["all_identical"] is True
    assert len(record["requests"]) == num_prompts
    assert record["pids"]["prefill"] != record["pids"]["decode"]
    for request in record["requests"]:
        assert request["identical"] is True
        assert request["kv_identical"] is True
        assert request["prefilled_by_decoder"] == 0
        assert request["prompt_tokens"] > 1
        assert request["new_tokens"] > 0
        assert request["kv_bytes"] > 0
        assert request["transfer_gb_per_s"] > 0
        assert request["ttft_ms"] > 0
        assert request["ttft_single_process_ms"] > 0
        assert request["hidden_share"] <= 1
        assert request["pages"] * request["page_bytes"] >= request["kv_bytes"]
        assert {"socket", "gloo"} == set(request["baselines"]) or record["gloo_problem"]
        for layer in request["layers"]:
            begin, end = layer["transfer"]
            assert 0 < layer["compute"][0] < begin <= end


def _check_bytes(request):
    """The model has 8 layers with keys and values of 2 heads of 32 floats; a prompt is its bytes."""
    tokens = 1 + len(request["prompt"].encode())
    assert request["prompt_tokens"] == tokens
    # All but the last token went over.
    assert request["kv_bytes"] == (tokens - 1) * 8 * 2 * 2 * 32 * 4
    assert request["pages"] == 8 * -(-(tokens - 1) // 16)


def test_shm_every_byte_arrives_and_every_token_is_the_same(tmp_path):
    done, record = _demo(tmp_path, "--transport", "shm", "--new-tokens", "24")
    assert done.returncode == 0, done.stdout + done.stderr
    _check_record(record, 2)
    assert record["transport"] == "shm"
    for request in record["requests"]:
        _check_bytes(request)
        assert request["new_tokens"] == 24
        assert request["chunks"] == 1
    text = done.stdout
    assert f"prefill process pid {record['pids']['prefill']}" in text
    assert f"decode process pid {record['pids']['decode']}" in text
    assert "transport shm" in text
    assert "2 of 2 prompts identical" in text
    assert "Zoë met Åsa" in text


def test_tcp_long_prompts_go_in_chunks_and_one_byte_is_a_prompt(tmp_path):
    long = "The library kept every page that anyone had ever sent to it. " * 4
    done, record = _demo(
        tmp_path, "--transport", "tcp", "--chunk-tokens", "64", "--new-tokens", "5", prompts=f"{long}\nA"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _check_record(record, 2)
    assert record["transport"] == "tcp"
    for request in record["requests"]:
        _check_bytes(request)
    first, second = record["requests"]
    assert (first["chunks"], len(first["layers"])) == (4, 4 * 8)
    assert (second["chunks"], second["prompt_tokens"], second["pages"]) == (1, 2, 8)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """A random Qwen2 of other shapes, with a tokenizer that has no begin token."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Qwen2Config, Qwen2ForCausalLM

    directory = tmp_path_factory.mktemp("qwen")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([PROMPTS], vocab_size=270, show_progress=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    torch.manual_seed(7)
    config = Qwen2Config(
        vocab_size=270,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    return directory


def test_any_local_checkpoint_with_its_tokenizer(tmp_path, other_model):
    done, record = _demo(
        tmp_path, "--model", other_model, "--new-tokens", "7", "--no-baselines", prompts="A\n" + "boat " * 40
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert record["all_identical"]
    single, many = record["requests"]
    # One token: there is nothing to prefill, only the tail arrives.
    assert (single["prompt_tokens"], single["kv_bytes"], single["pages"]) == (1, 0, 0)
    # Fewer tokens than bytes: the tokenizer was used.
    assert 40 <= many["prompt_tokens"] < 200
    assert many["kv_bytes"] == (many["prompt_tokens"] - 1) * 3 * 2 * 8 * 4


def test_control_a_corrupt_page_is_noticed(tmp_path):
    done, record = _demo(tmp_path, "--corrupt", "page", "--new-tokens", "4", "--no-baselines")
    assert done.returncode == 1
    assert record["all_identical"] is False
    assert [request["kv_identical"] for request in record["requests"]] == [False, True]
    assert "NOT identical" in done.stdout
    assert "1 of" in record["requests"][0]["problem"]


def test_control_a_dropped_page_is_noticed(tmp_path):
    # Each layer has one page: of that one nothing is left to write.
    done, record = _demo(tmp_path, "--drop", "page", "--timeout", "5", "--no-baselines", prompts="Tom")
    assert done.returncode == 1
    assert record["all_identical"] is False
    assert re.search(r"only 8 of 9 arrivals .* were counted within 5 s", record["error"])
    # That the other process then lost this one is no news.
    assert "prefill" not in record["error"], record["error"]


def test_wrong_options_say_what_is_wrong(tmp_path):
    cases = [
        (["--chunk-tokens", "20"], "no multiple of 16"),
        (["--corrupt", "none"], "neither `page` nor the number of a page"),
        (["--model", tmp_path], "config.json"),
        (["--transport", "pigeon"], "pigeon"),
    ]
    for options, message in cases:
        done, _ = _demo(tmp_path, *map(str, options))
        assert done.returncode != 0
        assert message in done.stdout + done.stderr


class Running:
    """A demo that goes on for long, stopped by the test."""

    def __init__(self, tmp_path):
        file = tmp_path / "prompts.txt"
        file.write_text(PROMPTS, encoding="utf-8")
        command = [*COMMAND, "--prompts", file, "--rounds", "100000", "--timeout", "6", "--no-baselines"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        )
        self.text = ""
        while "transport" not in self.text:
            line = self.process.stdout.readline()
            assert line, self.text
            self.text += line
        found = re.search(r"prefill process pid (\d+), decode process pid (\d+)", self.text)
        self.prefill, self.decode = (int(number) for number in found.groups())
        # It computes only while it serves a request, so one is under way then.
        until = _cpu_ticks(self.prefill) + 20
        while _cpu_ticks(self.prefill) < until:
            assert _is_running(self.prefill), self.text
            time.sleep(0.02)

    def finish(self, timeout_s):
        out, _ = self.process.communicate(timeout=timeout_s)
        self.text += out
        return " ".join(self.text.split())


def _stat(pid):
    """Fields of /proc/PID/stat from the third on; none when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _is_running(pid):
    return bool(stat := _stat(pid)) and stat[0] not in "ZX"


def _cpu_ticks(pid):
    """Processor time that a process has used, in hundredths of a second."""
    return sum(map(int, _stat(pid)[11:13]))


def _await_end(pids, timeout_s):
    deadline = time.monotonic() + timeout_s
    while any(map(_is_running, pids)):
        assert time.monotonic() < deadline, "a process of the demo was left behind"
        time.sleep(0.1)


def test_what_the_prefill_process_cannot_run_is_told_once(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=256)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    done, record = _demo(tmp_path, "--model", tmp_path / "model", "--no-baselines", prompts="boat " * 20)
    assert done.returncode == 1
    assert "the prefill process" in record["error"]
    # That its writes did not come is no other failure.
    assert "the decode process" not in record["error"], record["error"]


@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_when_one_process_is_killed_the_other_says_so_and_ends(tmp_path, victim):
    running = Running(tmp_path)
    survivor = "decode" if victim == "prefill" else "prefill"
    os.kill(getattr(running, victim), signal.SIGKILL)
    text = running.finish(timeout_s=40)
    assert running.process.returncode == 1
    assert f"the {victim} process (pid {getattr(running, victim)}) was killed by SIGKILL" in text
    # Whichever of its connections broke first: the engine's, or the raw socket of the comparison.
    lost = r"failed: (PeerLost|\w*Connection\w*Error|BrokenPipeError)"
    assert re.search(rf"the {survivor} process \(pid {getattr(running, survivor)}\) {lost}", text), text
    _await_end([running.prefill, running.decode], timeout_s=20)


def test_a_stopped_prefill_process_is_given_up_at_the_deadline(tmp_path):
    running = Running(tmp_path)
    os.kill(running.prefill, signal.SIGSTOP)
    text = running.finish(timeout_s=60)
    assert running.process.returncode == 1
    assert f"the decode process (pid {running.decode}) failed" in text
    assert f"the prefill process (pid {running.prefill}) is stopped" in text
    _await_end([running.prefill, running.decode], timeout_s=20)


def test_no_process_outlives_the_command(tmp_path):
    running = Running(tmp_path)
    running.process.kill()
    running.process.wait()
    running.process.stdout.close()
    _await_end([running.prefill, running.decode], timeout_s=20)
