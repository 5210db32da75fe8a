"""``python -m bench peers``: the protocol between it and its children, what is refused, and how it is told."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import peers, report
from bench.peers import __main__ as command
from bench.peers import products, tables

CHILDREN = str(peers.CHILDREN)
SHAPE = (64, 256)

#: A runtime of numpy that can do what a test asks for in its format's name.
FAKE = f"""
import os, sys
sys.path.insert(0, {CHILDREN!r})
import numpy as np
from products import normal_weights, serve

class Fake:
    copies = 2
    def __init__(self, request):
        self.weights = normal_weights(request).astype(np.float64)
        self.weight_bytes = self.weights.nbytes
        self.kind = request["format"]
        if self.kind == "unmade":
            raise ValueError("cannot be made\\nsecond line")
    def reference(self, n_rows):
        return self.weights[:n_rows]
    def inputs(self, x):
        return x
    def multiply(self, x):
        if self.kind == "dies" and len(x) == 4:
            print("last words", file=sys.stderr)
            os._exit(3)
        if self.kind == "fails" and len(x) == 4:
            raise RuntimeError("no such rows")
        return [x @ self.weights.T, x @ self.weights.T * (0.9 if self.kind == "wrong" else 1)]
    def products(self, outputs):
        return [outputs[0], np.full_like(outputs[1], np.nan) if self.kind == "nan" else outputs[1]]
    def read(self):
        return self.weights.nbytes

print("a library's own line")
print("[1, 2]", flush=True)
serve("9.9", Fake)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Runs formats of the fake runtime, as edge and as a peer, and returns the shape's part of the document."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)

    def go(names: str) -> dict[str, Any]:
        formats = names.split()
        system = peers.System(str(script), "edge")
        runtime = products.Runtime(system, dict.fromkeys(formats, 0.01))
        monkeypatch.setattr(products, "RUNTIMES", {"edge": runtime, "peer": runtime})
        with products.children(["edge", "peer"], 1) as (found, missing):
            assert not missing
            return products.measure_shape(found, SHAPE, formats, [1, 4], 2, 0.0, 1)

    return go


def named(document: dict[str, Any]) -> list[str]:
    return [f"{one['runtime']} {one['format']}" for one in document["products"]]


def test_everyone_multiplies_in_every_round(fake: Callable[[str], dict[str, Any]]) -> None:
    found = fake("a b")
    assert named(found) == ["edge a", "edge b", "peer a", "peer b"]
    assert found["failures"] == []
    assert found["read_bytes_per_second"]["runs"] == 8
    assert found["foreign_cpus"] >= 0
    for one in found["products"]:
        assert one["version"] == "9.9" and one["copies"] == 2 and one["bits_per_weight"] == 64
        assert one["error"] < 1e-6
        for m in (1, 4):
            at = one["m"][str(m)]
            assert at["seconds"]["runs"] == 2
            rate = 64 * 256 / at["seconds"]["low"]
            assert at["operations_per_second"]["high"] == pytest.approx(2 * m * rate)
            assert at["tokens_per_second_of_1e9"]["high"] == pytest.approx(m * rate / 1e9)
            assert at["bytes_per_second"]["high"] == pytest.approx(8 * rate)
        assert one["m"]["1"]["read_share"]["runs"] == 2 and one["m"]["4"]["read_share"] is None


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("wrong", r"products are 0\.1 away from the reference, expected at most 0\.01"),
        ("nan", r"products are nan away from the reference, expected at most 0\.01"),
        ("unmade", "ValueError: cannot be made$"),
    ],
)
def test_who_computes_something_else_is_not_timed(
    fake: Callable[[str], dict[str, Any]], kind: str, said: str
) -> None:
    found = fake(f"{kind} a")
    assert named(found) == ["edge a", "peer a"]
    assert len(found["failures"]) == 2
    for line, runtime in zip(found["failures"], ("edge", "peer"), strict=True):
        assert line.startswith(f"{runtime} {kind}, 64 x 256: ") and re.search(said, line)


def test_one_that_fails_later_leaves_the_others_their_rounds(fake: Callable[[str], dict[str, Any]]) -> None:
    found = fake("fails a")
    assert named(found) == ["edge a", "peer a"]
    assert found["failures"] == [
        "edge fails: RuntimeError: no such rows",
        "peer fails: RuntimeError: no such rows",
    ]
    assert all(one["m"]["4"]["seconds"]["runs"] == 2 for one in found["products"])


def test_a_process_that_ends_says_its_last_line(fake: Callable[[str], dict[str, Any]]) -> None:
    found = fake("dies")
    assert found["products"] == [] and found["read_bytes_per_second"] is None
    assert found["failures"][0] == "edge dies: its process ended with 3: last words"


def test_a_child_that_never_answers_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "silent.py"
    script.write_text("import time\nwhile True: time.sleep(1)")
    monkeypatch.setattr(products, "_WAIT_SECONDS", 0.2)
    child = products.Child("silent", peers.System(str(script), "edge"), 1)
    with pytest.raises(products.ChildError, match="its process ended with -9: no message"):
        child.ask("drop")
    child.close()


def test_absent_runtimes_cost_a_line(
    fake: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGE_TORCH_PYTHON", "/nowhere/python")
    monkeypatch.setenv("EDGE_PEER_PYTHON", sys.executable)
    monkeypatch.setitem(peers._NEEDED, "onnxruntime", "import no_such_package")
    with products.children(["torch", "onnxruntime"], 1) as (found, missing):
        assert found == {}
        assert missing["torch"].startswith("torch: /nowhere/python does not run (")
        assert missing["onnxruntime"] == (
            f"onnxruntime: not available to {sys.executable}: ModuleNotFoundError: No module named "
            "'no_such_package'; EDGE_PEER_PYTHON names an interpreter that has it"
        )
    assert capsys.readouterr().err.count("\n") == 2


class Working:
    """Stands for a child that used so much of the processors."""

    cpu_seconds = 0.0


def test_what_children_use_is_not_foreign(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = {"perf_counter": 0.0, "process_time": 0.0, "busy": 0.0}
    monkeypatch.setattr(products.time, "perf_counter", lambda: clocks["perf_counter"])
    monkeypatch.setattr(products.time, "process_time", lambda: clocks["process_time"])
    monkeypatch.setattr(products, "busy_seconds", lambda: clocks["busy"])
    child: Any = Working()
    with products.foreign_cpus({"a": child}) as others:
        child.cpu_seconds = 5.0
        clocks.update(perf_counter=10.0, process_time=1.0, busy=8.0)
    assert others == [pytest.approx(0.2)]


# --- what children share


@pytest.fixture
def shared_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``bench/children/products.py`` as a child imports it."""
    monkeypatch.syspath_prepend(CHILDREN)
    import products as found

    yield found
    sys.modules.pop("products", None)


def test_rows_are_values_of_bf16(shared_code: Any) -> None:
    rows = shared_code.normal_rows(3, 64)
    assert rows.shape == (3, 64) and not np.any(rows.view(np.uint32) & 0xFFFF)
    assert 0.7 < rows.std() < 1.3


@pytest.mark.parametrize(("block", "most", "error"), [(32, 7, 0.15), (64, 127, 0.01)])
def test_quantised_weights_are_near_what_they_stand_for(
    shared_code: Any, block: int, most: int, error: float
) -> None:
    weights = shared_code.normal_weights({"rows": 16, "cols": 64, "seed": 3})
    codes, scales = shared_code.block_codes(weights, block, most)
    assert codes.shape == (16, 64 // block, block) and np.abs(codes).max() == most
    back = (codes * scales[..., None]).reshape(16, 64)
    assert np.linalg.norm(back - weights) < error * np.linalg.norm(weights)


def test_a_matrix_goes_on_with_its_first_rows(shared_code: Any) -> None:
    request = {"rows": 600, "cols": 32, "seed": 3}
    first = shared_code.normal_weights(request)
    made = shared_code.filled(first, request)
    assert first.shape == (256, 32) and made.shape == (600, 32)
    assert np.array_equal(made[512:], first[:88])


def test_a_pass_longer_than_its_turn_is_the_only_one(
    shared_code: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def work(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(shared_code.time, "perf_counter", lambda: now)
    assert shared_code.timed(lambda: work(2), 1) == [2]
    assert shared_code.timed(lambda: work(0.25), 1) == [0.25] * 3


def test_threads_that_go_on_are_told(shared_code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(np.arange(0, 1e6, 0.01))
    monkeypatch.setattr(shared_code.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(shared_code.time, "perf_counter", lambda: float(next(now)))
    monkeypatch.setattr(shared_code.time, "process_time", lambda: float(next(now)))
    with pytest.raises(RuntimeError, match=r"still computing 2\.0 s after the last product"):
        shared_code.rest()


# --- how it is told


def document(fake_shape: dict[str, Any]) -> dict[str, Any]:
    facts = {"cpu": "a cpu", "cpus": 2, "isa": [], "memory_bytes": 1 << 30, "system": "s", "commit": "c"}
    return {
        "machine": facts | {"date": "2026-01-01T00:00:00", "load_average": 0.0},
        "threads": 1,
        "batches": [1, 4],
        "rounds": 2,
        "shapes": [fake_shape],
        "models": [],
        "absent": {"torch": "torch: not here"},
    }


def test_table_bars_and_ratios(
    fake: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    shape = fake("a wrong")
    for one, rate in zip(shape["products"], (8.0, 2.0), strict=True):
        one["bits_per_weight"] = 4.5
        one["m"]["1"]["tokens_per_second_of_1e9"] = report.spread_json([rate])
        one["m"]["1"]["read_share"] = report.spread_json([rate / 10])
        one["m"]["4"]["tokens_per_second_of_1e9"] = report.spread_json([1 / rate])
    tables.show(document(shape))
    said = capsys.readouterr().out
    assert "64 x 256, 1 threads, 2 rounds" in said
    assert "M=1, 4 bits and a little: edge a is 4.00 x peer a" in said
    assert "M=4, 4 bits and a little: edge a is 0.25 x peer a" in said
    assert "edge wrong, 64 x 256: products are" in said and "torch: not here" in said


def test_bars_are_as_long_as_their_share() -> None:
    assert tables.bar(1, 1) == "█" * 12
    assert tables.bar(0.5, 1) == "█" * 6
    assert tables.bar(1, 96) == "▏" and tables.bar(0, 1) == "" and tables.bar(1, 0) == ""


def test_picture(fake: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tables.plot(document(fake("a")), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


# --- the command


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--shapes", "100x256"], "expected ROWSxCOLS"),
        (["--shapes", "many"], "expected ROWSxCOLS"),
        (["--formats", "q4_0,q9"], "found 'q9'"),
        (["--runtimes", "mlx"], "found 'mlx'"),
        (["--rows", "0"], "--rows: expected at least 1, found 0"),
        (["--runs", "0"], "--runs: expected at least 1, found 0"),
        (["/no/model.gguf"], "no such file"),
    ],
)
def test_wrong_arguments_are_one_line(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(given)
    assert said in capsys.readouterr().err


def test_edge_against_itself_through_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--runs", "1", "--seconds", "0", "--bytes", "1", "--threads", "1", "--rows", "1", "5"]
    assert command.main(["--shapes", "64x256", "--runtimes", "edge", "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    [shape] = found["shapes"]
    tolerances = products.RUNTIMES["edge"].tolerance
    assert named(shape) == [f"edge {name}" for name in products.FORMATS if name in tolerances]
    assert shape["failures"] == []
    assert all(1e-4 < one["error"] < 0.012 for one in shape["products"])


def test_a_model_is_run_as_a_whole_too(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGE_PEER_PYTHON", "/nowhere/python")
    options = ["--shapes", "--runs", "1", "--prompt", "5", "--tokens", "3", "--threads", "1"]
    monkeypatch.setattr(command.machine, "read_bandwidth", lambda threads: {"median": 1e9})
    assert command.main([str(tiny("tiny", "q8_0")), "--runtimes", "edge", *options]) == 0
    said = capsys.readouterr().out
    assert "whole tokens, prompt of 5, 1 threads" in said
    assert "llama.cpp: /nowhere/python does not run" in said


@pytest.mark.slow
def test_every_runtime_that_is_here_computes_its_own_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        command.main(["--shapes", "256x512", "--runs", "1", "--seconds", "0", "--bytes", "300000", "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    [shape] = found["shapes"]
    assert shape["failures"] == []
    present = [name for name in products.RUNTIMES if name not in found["absent"]]
    assert {one["runtime"] for one in shape["products"]} == set(present) and "edge" in present
