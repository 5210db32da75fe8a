"""The command line as its user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edge.cli.report import summary
from tests.tiny import tiny_hf, tiny_llama_gguf

RUN = [sys.executable, "-c", "from edge.cli import main; main()"]


def edge(*arguments: object, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*RUN, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=100,
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama_gguf(tmp_path_factory.mktemp("cli") / "tiny.gguf", type="q4_0", seed=1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))


RUN_KEYS = (
    "text tokens prompt_tokens generated_tokens finish_reason load_seconds prefill_tokens_per_second "
    "decode_tokens_per_second peak_memory_bytes budget_bytes flash_bytes_per_token placement"
)


def test_samples_are_the_texts_of_their_seeds(gguf_file: Path) -> None:
    command = ("run", gguf_file, "the cat", "-n", 6, "--context", 128, "--ignore-eos", "--json")
    together = json.loads(edge(*command, "--seed", 5, "--samples", 3).stdout)["samples"]
    alone = [json.loads(edge(*command, "--seed", 5 + i).stdout) for i in range(3)]
    assert [one["tokens"] for one in together] == [one["tokens"] for one in alone]
    assert [one["seed"] for one in together] == [5, 6, 7]
    shown = edge(*command[:-1], "--seed", 5, "--samples", 3)
    assert [line for line in shown.stdout.splitlines() if line.startswith("--- ")] == [
        f"--- {i} of 3, seed {4 + i}" for i in (1, 2, 3)
    ]
    assert alone[1]["text"] in shown.stdout and shown.stderr.count("tok/s") == 3


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--speculation", "lookup"), "speculation auto or off"),
        (("--skeleton", "on"), "skeleton off"),
        (("--overflow", "shift"), "expected 'error'"),
    ],
)
def test_what_several_samples_cannot_have_is_one_line(gguf_file: Path, options: Any, why: str) -> None:
    done = edge("run", gguf_file, "x", "-n", 2, "--context", 64, "--samples", 2, *options, check=False)
    assert done.returncode != 0 and why in done.stderr.splitlines()[-1]


def test_run_json(gguf_file: Path) -> None:
    done = edge(
        "run", gguf_file, "the cat", "-n", 8, "--temperature", 0, "--memory", "256MiB", "--context", 64,
        "--threads", 2, "--ignore-eos", "--json",
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert set(RUN_KEYS.split()) <= set(result)
    assert result["generated_tokens"] == len(result["tokens"]) == 8
    assert result["budget_bytes"] == 256 << 20
    assert 0 < result["peak_memory_bytes"] <= result["budget_bytes"]


def test_run_prints_prompt_text_and_cost(gguf_file: Path) -> None:
    done = edge("run", gguf_file, "the cat", "-n", 4, "--seed", 3, "--context", 64)
    assert done.stdout.startswith("the cat")
    assert "tok/s" in done.stderr and "seed 3" in done.stderr


def test_run_reads_a_prompt_file(gguf_file: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("the dog")
    done = edge("run", gguf_file, "--file", prompt, "-n", 2, "--context", 64)
    assert done.stdout.startswith("the dog")


def test_keys_and_values_go_where_kv_says(gguf_file: Path, tmp_path: Path) -> None:
    def run(kv: str) -> dict[str, Any]:
        command = ("run", gguf_file, "the cat", "-n", 4, "--temperature", 0, "--context", 64, "--json")
        found: dict[str, Any] = json.loads(edge(*command, "--kv", kv, EDGE_SCRATCH=str(tmp_path)).stdout)
        return found

    found = {kv: run(kv) for kv in ("auto", "memory", "flash")}
    assert {kv: one["plan"]["kv"] for kv, one in found.items()} == {
        "auto": "memory",
        "memory": "memory",
        "flash": "flash",
    }
    assert found["flash"]["tokens"] == found["memory"]["tokens"]
    refused = edge("chat", gguf_file, "--kv", "disk", check=False)
    assert refused.returncode == 2 and "'auto', 'memory', 'flash'" in refused.stderr


def test_exact_gives_the_text_of_the_model(gguf_file: Path) -> None:
    settings = (gguf_file, "x", "-n", 4, "--context", 64, "--temperature", 0, "--json")
    plain, exact = (json.loads(edge("run", *settings, *more).stdout) for more in ((), ("--exact",)))
    assert plain["tokens"] == exact["tokens"] and exact["neuron_mode"] == ""


@pytest.mark.parametrize(
    ("mode", "is_lossy"), [("", False), ("exact", False), ("predictor", True), ("lean", True)]
)
def test_the_last_line_says_what_is_lossy(mode: str, is_lossy: bool) -> None:
    stats = {
        "peak_memory_bytes": 1,
        "budget_bytes": 2,
        "flash_bytes_per_token": 3,
        "placement": "neurons",
        "neuron_mode": mode,
        "generated_tokens": 1,
        "decode_tokens_per_second": 1.0,
        "prefill_tokens_per_second": 1.0,
        "seed": 1,
    }
    assert ("lossy" in summary(stats, "length")) == is_lossy


def test_pack_show_verify_plan_list(gguf_file: Path, tmp_path: Path) -> None:
    pack = tmp_path / "m.edge"
    report = json.loads(edge("pack", gguf_file, pack, "--weights", "q8", "--json").stdout)
    assert report["file_bytes"] == pack.stat().st_size
    assert json.loads(edge("verify", pack, "--json").stdout)["ok"] is True
    shown = json.loads(edge("show", pack, "--json").stdout)
    assert shown["config"]["family"] == "llama"
    plan = json.loads(edge("plan", pack, "--memory", "1GiB", "--context", 64, "--json").stdout)
    assert plan["placement"] == "resident" and plan["floor_bytes"] > 0
    edge("run", gguf_file, "x", "-n", 1, "--context", 64)
    kinds = {m["kind"] for m in json.loads(edge("list", "--json").stdout)["models"]}
    assert "cached" in kinds
    for command in (("show", pack), ("plan", pack, "--context", 64), ("list",), ("verify", pack)):
        assert edge(*command).stdout.strip()


def test_doctor() -> None:
    facts = json.loads(edge("doctor", "--json").stdout)
    assert facts["isa"] and facts["io_engine"] and facts["gpu"]
    assert all(isa["available"] or isa["reason"] for isa in facts["isas"])
    assert "kernels:" in edge("doctor").stdout


@pytest.mark.parametrize(
    "arguments, kind",
    [
        (("run", "nowhere.gguf", "x"), "ArgumentError"),
        (("run", "{model}", "x", "--memory", "plenty"), "ArgumentError"),
        (("run", "{model}", "x", "--memory", "1MiB"), "BudgetError"),
        (("run", "{model}", "x", "-n", "100000", "--context", "64"), "ContextOverflowError"),
        (("run", "{model}", "x", "--temperature", "-2"), "ArgumentError"),
        (("chat", "{model}"), "TemplateError"),
        (("verify", "{model}"), "ModelFileError"),
    ],
    ids=str,
)
def test_errors_are_one_line(gguf_file: Path, arguments: tuple[str, ...], kind: str) -> None:
    arguments = tuple(str(gguf_file) if a == "{model}" else a for a in arguments)
    done = subprocess.run([*RUN, *arguments], capture_output=True, text=True, input="hello\n", timeout=100)
    assert done.returncode == 1
    assert done.stderr.startswith(f"edge: {kind}: ")
    assert len(done.stderr.strip().splitlines()) == 1
    as_json = subprocess.run(
        [*RUN, *arguments, "--json"], capture_output=True, text=True, input="hello\n", timeout=100
    )
    assert json.loads(as_json.stdout.splitlines()[-1])["error"] == kind


def test_usage_errors_exit_with_2() -> None:
    done = edge("run", "--no-such-option", check=False)
    assert done.returncode == 2 and "no-such-option" in done.stderr


def test_forcing_an_unknown_isa_lists_the_known(gguf_file: Path) -> None:
    done = edge("run", gguf_file, "x", "-n", 1, "--context", 64, check=False, EDGE_ISA="sse9")
    assert done.returncode == 1 and "avx2" in done.stderr and "sse9" in done.stderr


def test_ctrl_c_stops_cleanly(gguf_file: Path) -> None:
    child = subprocess.Popen(
        [
            *RUN,
            "run",
            str(gguf_file),
            "x",
            "-n",
            "100000000",
            "--overflow",
            "shift",
            "--ignore-eos",
            "--context",
            "128",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    child.stdout.read(40)
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=100)
    assert child.returncode == 130
    assert "Traceback" not in stderr and "stopped" in stderr


def test_chat_keeps_the_conversation(tmp_path: Path) -> None:
    folder = tiny_hf(tmp_path / "hf", "llama", seed=1)
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:")
    done = subprocess.run(
        [*RUN, "chat", str(folder), "--template", str(template), "-n", "5", "--temperature", "0", "--json"],
        input="hello\nagain\n",
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 2
    assert answers[1]["reused_tokens"] >= answers[0]["prompt_tokens"]
