"""``edge plan`` and ``edge.plan``: what a user sees before a model is loaded."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import edge
from edge import planning
from edge.cli import plan_figure
from edge.planning import ModelPlan
from flashload.errors import ArgumentError, ModelFileError
from tests.test_estimate import config_only
from tests.tiny import hf_config, tiny_gguf, tiny_hf, tiny_llama_gguf

RUN = [sys.executable, "-c", "from edge.cli import main; main()"]
OPTION_KEYS = "placement predicted_tokens_per_second predicted_peak_bytes weights memory_bytes speculation"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for the module: the machine is measured once."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("EDGE_CACHE")
    os.environ["EDGE_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["EDGE_CACHE"]
    else:
        os.environ["EDGE_CACHE"] = before


def run(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*RUN, "plan", *map(str, arguments)], capture_output=True, text=True, timeout=100)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def planned(*arguments: object) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(run(*arguments, "--json").stdout)
    return value


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("models")
    gguf = tiny_llama_gguf(folder / "tiny.gguf", type="f16")
    whole = tiny_hf(folder / "whole", "llama", dtype="BF16", torch_dtype="bfloat16")
    made = {"gguf": gguf, "hf": whole, "config": config_only(whole, folder / "bare")}
    edge.pack(gguf, folder / "tiny.edge")
    made["pack"] = folder / "tiny.edge"
    large = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    }
    large |= {"vocab_size": 32000, "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}
    for name, family, more in (
        ("7b", "llama", {"num_key_value_heads": 32}),
        ("moe", "mixtral", {"num_key_value_heads": 8, "num_local_experts": 8, "num_hidden_layers": 8}),
    ):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(hf_config(family, **large | more)))
        made[name] = folder / name
    return lambda name: made[name]


@pytest.mark.parametrize("kind", ["gguf", "hf", "config", "pack"])
def test_json(kind: str, models: Callable[[str], Path]) -> None:
    found = planned(models(kind), "--memory", "1GiB", "--context", 64)
    assert found["kind"] == kind and found["fits"] is True and found["placement"] == "resident"
    assert found["memory_bytes"] == 1 << 30 and found["context"] == 64
    assert 0 < found["floor_bytes"] <= found["predicted_peak_bytes"] <= 1 << 30
    assert {option["weights"] for option in found["options"]} == {"keep", "q8", "q4"}
    for option in [*found["options"], found["recommended"]]:
        assert set(OPTION_KEYS.split()) <= set(option)
        assert option["predicted_tokens_per_second"] > 0 and option["speculation"] == "off"
        assert option["floor_bytes"] <= option["predicted_peak_bytes"] <= option["memory_bytes"]
    assert found["recommended"]["weights"] == "keep" and found["recommended"]["memory_bytes"] == 1 << 30
    assert found["recommended"]["predicted_tokens_per_second"] == found["predicted_tokens_per_second"]


def test_every_option_has_a_curve_that_rises(models: Callable[[str], Path]) -> None:
    found = planned(models("7b"), "--memory", "6GB", "--context", 1024)
    for weights in ("keep", "q8", "q4"):
        options = [o for o in found["options"] if o["weights"] == weights]
        assert len(options) >= 5
        assert [o["memory_bytes"] for o in options] == sorted(o["memory_bytes"] for o in options)
        speeds = [o["predicted_tokens_per_second"] for o in options]
        assert speeds == sorted(speeds)
        assert options[0]["placement"] == "stream" and options[-1]["placement"] == "resident"
        assert options[0]["memory_bytes"] == options[0]["floor_bytes"]


def test_fewer_bits_are_recommended_when_they_make_it_fit(models: Callable[[str], Path]) -> None:
    found = planned(models("7b"), "--memory", "6GB", "--context", 1024)
    assert found["placement"] == "stream"
    assert found["recommended"]["weights"] == "q4" and found["recommended"]["placement"] == "resident"
    assert "fits at 4 bits" in found["recommendation"] and "exact at 16 bits" in found["recommendation"]
    assert planned(models("7b"), "--memory", "20GB", "--context", 1024)["recommended"]["weights"] == "keep"
    assert planned(models("7b"), "--memory", "9GB", "--context", 1024)["recommended"]["weights"] == "q8"


def test_a_mixture_tells_how_often_an_expert_is_at_hand(models: Callable[[str], Path]) -> None:
    found = planned(models("moe"), "--memory", "14GB", "--context", 512)
    assert found["placement"] == "experts"
    chosen = next(o for o in found["options"] if o["weights"] == "keep" and o["memory_bytes"] == 14 * 10**9)
    assert any("equally likely" in note for note in found["notes"])
    assert 0 < chosen["expert_hit_rate"] < 1 and chosen["flash_bytes_per_token"] > 0


def test_below_the_floor_is_told_not_refused(models: Callable[[str], Path]) -> None:
    found = planned(models("7b"), "--memory", "1MB", "--context", 512)
    assert found["fits"] is False and found["floor_bytes"] > 1e6 and "placement" not in found
    assert found["recommended"]["within_memory"] is False
    least = min(option["floor_bytes"] for option in found["options"])
    assert found["recommended"]["memory_bytes"] == least
    text = run(models("7b"), "--memory", "1MB", "--context", 512).stdout
    assert re.search(r"below the floor of .* \(\d+ bytes\)", text) and "the least that runs" in text


def test_a_context_that_only_fits_on_the_drive(models: Callable[[str], Path]) -> None:
    found = planned(models("7b"), "--memory", "1200MB", "--context", 4096)
    assert found["fits"] is True and found["kv"] == "flash" and found["floor_bytes"] < 1200 * 10**6
    chosen = [o for o in found["options"] if o["memory_bytes"] == 1200 * 10**6 and o["weights"] == "keep"]
    assert [o["kv"] for o in chosen] == ["flash"]
    assert chosen[0]["predicted_peak_bytes"] == found["predicted_peak_bytes"]
    held = planned(models("7b"), "--memory", "1200MB", "--context", 4096, "--kv", "memory")
    assert held["fits"] is False and held["floor_bytes"] > 1200 * 10**6
    assert {o["kv"] for o in held["options"]} == {"memory"}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kv", ["auto", "memory", "flash"])
def test_what_is_planned_is_what_is_loaded(
    kv: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same allocator: with equal memory held before, every figure of the two plans is the same."""
    for name in ("rss_bytes", "peak_rss_bytes"):
        monkeypatch.setattr(f"edge.host.{name}", lambda: 0)
    monkeypatch.setenv("EDGE_SCRATCH", str(tmp_path))
    edge.pack(tiny_gguf(tmp_path / "moe.gguf", "mixtral", "q8_0"), tmp_path / "moe.edge")
    full = edge.plan(tmp_path / "moe.edge", memory="1GiB", context=128, kv=kv)
    assert full.plan is not None
    memory = int(full.floor_bytes + share * (full.plan.predicted_peak_bytes - full.floor_bytes))
    found = edge.plan(tmp_path / "moe.edge", memory=memory, context=128, kv=kv)
    with edge.load(tmp_path / "moe.edge", memory=memory, context=128, kv=kv) as engine:
        assert engine.plan == found.plan
        assert engine.plan.floor_bytes == found.floor_bytes == full.floor_bytes
        assert engine.stats()["budget_bytes"] <= engine.plan.predicted_peak_bytes <= memory


def test_without_memory_and_context(models: Callable[[str], Path]) -> None:
    found = planned(models("gguf"))
    assert found["memory_bytes"] > 0 and found["context"] == 128 and found["fits"] is True


def test_the_floor_is_the_floor(models: Callable[[str], Path]) -> None:
    """What edge plan names as the floor of a pack runs, and is planned like any other budget."""
    found = planned(models("pack"), "--memory", 1, "--context", 64)
    floor = found["floor_bytes"] + (2 << 20)  # what a process holds differs by that from run to run
    assert planned(models("pack"), "--memory", floor, "--context", 64)["fits"] is True
    with edge.load(models("pack"), memory=floor, context=64, whole_process=False) as engine:
        assert len(engine.generate([1, 2, 3], max_tokens=2, ignore_eos=True).tokens) == 2


def test_the_table_and_the_words(models: Callable[[str], Path]) -> None:
    text = run(models("7b"), "--memory", "6GB", "--context", 1024).stdout
    for word in (
        "tok/s",
        "floor",
        "keep (16.0 bits)",
        "q8 (8.5 bits)",
        "q4 (4.",
        "resident",
        "stream",
        "GB/s",
    ):
        assert word in text, word
    assert "predicted peak" in text and "fits at 4 bits" in text


def test_a_mixture_and_a_full_context_are_put_in_words(models: Callable[[str], Path]) -> None:
    text = run(models("moe"), "--memory", "14GB", "--context", 512).stdout
    assert re.search(r"weights keep: experts, \d+ experts at hand, \d+\.\d times what a token uses", text)
    text = run(models("7b"), "--memory", "1200MB", "--context", 4096).stdout
    assert "weights keep: stream, keys and values in a file of up to 2.00 GiB" in text
    assert "(stream, kv)" in text and "kv: keys and values of a full context partly in a file" in text


@pytest.mark.parametrize(
    ("weights", "bits", "said"),
    [("keep", 16.0, "at 16 bits"), ("keep", 4.83, "at 4 bits"), ("q8", 8.5, "at 8 bits (--weights q8)"),
     ("q4", 5.03, "at 4 bits (--weights q4)")],
)  # fmt: skip
def test_bits_are_those_of_the_format(weights: str, bits: float, said: str, found: ModelPlan) -> None:
    """A table of many words at eight bits does not make four bits eight."""
    option = dataclasses.replace(found.options[0], weights=weights, bits_per_weight=bits)
    assert planning._bits_text(option) == said


def test_equal_weights_are_one_column(models: Callable[[str], Path], tmp_path: Path) -> None:
    text = run(tiny_llama_gguf(tmp_path / "t.gguf", type="q4_0"), "--context", 64).stdout
    assert "keep (4.5 bits)" in text and "q8 (" not in text


def test_a_figure(models: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = tmp_path / "curve.png"
    run(models("7b"), "--memory", "6GB", "--context", 512, "--figure", figure)
    assert figure.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_figure_without_matplotlib_says_so(models: Callable[[str], Path], tmp_path: Path) -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from edge.cli import main; main()"
    arguments = ["plan", str(models("gguf")), "--context", "64", "--figure", str(tmp_path / "f.png")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1 and "matplotlib" in done.stderr and "edge[bench]" in done.stderr
    assert not (tmp_path / "f.png").exists() and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("--memory", "lots"),
        ("--memory", "-1"),
        ("--context", "0"),
        ("--threads", "0"),
        ("--threads", "5000"),
        ("--figure", "/nonexistent/f.png"),
    ],
    ids=" ".join,
)
def test_nonsense_is_one_clear_line(arguments: tuple[str, str], models: Callable[[str], Path]) -> None:
    done = run(models("gguf"), *arguments, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("edge: ")


def test_an_unknown_model_is_one_clear_line(tmp_path: Path) -> None:
    done = run(tmp_path / "absent", "--json", check=False)
    assert done.returncode == 1 and json.loads(done.stdout)["error"] == "ArgumentError"
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_damaged_model_is_one_clear_line(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(tiny_llama_gguf(tmp_path / "whole.gguf").read_bytes()[:5000])
    done = run(file, check=False)
    assert done.returncode == 1 and done.stderr.startswith("edge: ModelFileError")
    assert len(done.stderr.splitlines()) == 1


# -- the same from Python ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(models: Callable[[str], Path]) -> ModelPlan:
    return edge.plan(models("7b"), memory="6GB", context=1024)


def test_the_object(found: ModelPlan) -> None:
    assert found.fits and found.placement == "stream" and found.plan is not None
    assert found.predicted_peak_bytes == found.plan.predicted_peak_bytes
    assert found.chosen is not None
    assert found.predicted_tokens_per_second == found.chosen.predicted_tokens_per_second
    assert found.recommended in found.options
    assert json.loads(json.dumps(found.to_dict()))["floor_bytes"] == found.floor_bytes


def test_a_library_counts_only_what_it_adds(models: Callable[[str], Path]) -> None:
    inside = edge.plan(models("gguf"), memory="1GiB", context=64)
    alone = planned(models("gguf"), "--memory", "1GiB", "--context", 64)
    assert inside.predicted_peak_bytes is not None
    assert inside.predicted_peak_bytes < alone["predicted_peak_bytes"]


def test_errors_are_typed(models: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="weights"):
        edge.plan(models("gguf"), weights="q1")
    with pytest.raises(ArgumentError, match="context"):
        edge.plan(models("gguf"), context=True)
    with pytest.raises(ModelFileError):
        edge.plan(tmp_path)


def test_weights_are_planned_as_asked(models: Callable[[str], Path]) -> None:
    kept, lower = (edge.plan(models("7b"), memory="6GB", context=1024, weights=w) for w in ("keep", "q4"))
    assert (kept.placement, lower.placement) == ("stream", "resident")
    assert lower.floor_bytes < kept.floor_bytes


def test_the_terminal_figure_has_its_size_and_marks(found: ModelPlan) -> None:
    lines = plan_figure.terminal_figure(found, width=50, height=9)
    assert len(lines) == 9 + 4 and all(len(line) <= 80 for line in lines)
    assert all(mark in "".join(lines[:9]) for mark in "●▲■")
    assert "keep" in lines[-1] and "q4" in lines[-1]


def test_few_bits_are_not_advised_for_little(found: ModelPlan) -> None:
    """A tenth faster at least, or the text of the model as it is."""
    exact = dataclasses.replace(found.options[0], predicted_tokens_per_second=1.0)
    for speed, chosen in ((1.05, "keep"), (1.2, "q4")):
        fewer = dataclasses.replace(exact, weights="q4", predicted_tokens_per_second=speed)
        assert planning._fastest(exact, [exact, fewer]).weights == chosen


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.614, "0.61"), (45.68, "45.7"), (2971.3, "2971"), (31234.5, "31234")]
)
def test_figures_have_no_exponent(value: float, text: str) -> None:
    assert plan_figure.three_digits(value) == text


def test_below_the_floor_the_budget_is_named_once(models: Callable[[str], Path]) -> None:
    lines = run(models("7b"), "--memory", "1MB", "--context", 512).stdout.splitlines()
    (advice,) = [line for line in lines if "the least that runs is" in line]
    assert advice.count("976.56 KiB") == 1
