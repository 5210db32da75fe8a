"""Other runtimes behind an engine's calls: stand-ins for their packages, and llama.cpp where it is installed."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import edge
from edge.backends import BACKENDS
from edge.backends.peer import LogitsPeer
from edge.cli import cli
from edge.errors import ArgumentError, ContextOverflowError, EdgeError, ModelFileError
from edge.models import resolve_model
from edge.tokenizer import load_tokenizer

STORY = resolve_model("story")


class Runner:
    """Logits by rule: the next token is the last one plus one, with certainty that depends on the length."""

    def __init__(self, vocab_size: int, context: int = 64) -> None:
        self.vocab_size = vocab_size
        self.context = context
        self.fed: list[int] = []
        self.closed = False

    def restart(self) -> None:
        self.fed = []

    def feed(self, tokens: Any, every: bool = False) -> Any:
        rows = []
        for token in tokens:
            self.fed.append(token)
            row = np.zeros(self.vocab_size, np.float32)
            row[(token + 1) % self.vocab_size] = 5 + len(self.fed) % 3
            rows.append(row)
        return np.stack(rows) if every else rows[-1]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def peer() -> Any:
    tokenizer = load_tokenizer(STORY)
    with LogitsPeer("stand-in", "1", tokenizer, Runner(tokenizer.vocab_size)) as found:
        yield found


def test_greedy_follows_the_logits(peer: Any) -> None:
    done = peer.generate([300, 301], max_tokens=5, temperature=0, ignore_eos=True)
    assert done.tokens == [302, 303, 304, 305, 306]
    assert done.finish_reason == "length"
    assert done.text == peer.tokenizer.decode(done.tokens, continues=True)
    assert done.stats["prompt_tokens"] == 2 and done.stats["generated_tokens"] == 5
    assert done.stats["backend"] == "stand-in"


def test_seed_decides_the_text(peer: Any) -> None:
    def text(seed: int) -> list[int]:
        return list(peer.generate([300], max_tokens=12, temperature=3.0, seed=seed, ignore_eos=True).tokens)

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_stream_is_generate_in_pieces(peer: Any) -> None:
    settings: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    chunks = list(peer.stream([300], **settings))
    assert "".join(chunk.text for chunk in chunks) == peer.generate([300], **settings).text
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * 6
    assert chunks[-1].finish_reason == "length"


def test_stop_string_ends_the_text(peer: Any) -> None:
    whole = peer.generate([300], max_tokens=8, temperature=0, ignore_eos=True).text
    stop = whole[len(whole) // 2 :][:3]
    done = peer.generate([300], max_tokens=8, temperature=0, ignore_eos=True, stop=stop)
    assert done.text == whole[: whole.index(stop)]
    assert done.finish_reason == "stop"


def test_cancel_ends_after_a_token(peer: Any) -> None:
    stream = peer.stream([300], max_tokens=20, temperature=0, ignore_eos=True)
    next(stream)
    peer.cancel()
    rest = list(stream)
    assert rest[-1].finish_reason == "cancelled" and len(rest) <= 2


def test_score_is_the_log_probability_of_each_token(peer: Any) -> None:
    tokens = [300, 301, 301, *range(400, 500)]
    peer.context = peer._runner.context = 256
    scores = peer.score(tokens)
    norm = math.log(math.exp(6) + peer.vocab_size - 1)
    assert scores[0] is None and len(scores) == len(tokens)
    assert scores[1] == pytest.approx(6 - norm, abs=1e-9)  # what the rule foretold, after one token
    assert scores[2] == pytest.approx(-math.log(math.exp(7) + peer.vocab_size - 1), abs=1e-9)


def test_what_does_not_apply_is_refused(peer: Any) -> None:
    with pytest.raises(ContextOverflowError, match="exceed the context of 64"):
        peer.generate([300] * 60, max_tokens=5)
    with pytest.raises(
        ArgumentError, match="speculation: expected auto or off with stand-in, found 'lookup'"
    ):
        peer.generate([300], max_tokens=1, speculation="lookup")
    with pytest.raises(ArgumentError, match="overflow: expected error with stand-in"):
        peer.generate([300], max_tokens=1, overflow="shift")
    with pytest.raises(ArgumentError, match="unknown setting"):
        peer.generate([300], length=1)


def test_closed_is_closed() -> None:
    tokenizer = load_tokenizer(STORY)
    runner = Runner(tokenizer.vocab_size)
    peer = LogitsPeer("stand-in", "1", tokenizer, runner)
    peer.close()
    peer.close()
    assert runner.closed
    for request in (lambda: peer.generate([300], max_tokens=1), lambda: peer.score([300, 301])):
        with pytest.raises(EdgeError, match="engine: closed"):
            request()


def test_unknown_backend_is_named() -> None:
    with pytest.raises(
        ArgumentError, match=r"backend: expected edge, llama\.cpp, onnxruntime, mlc, found 'tgi'"
    ):
        edge.load(STORY, backend="tgi")


@pytest.mark.parametrize("backend", BACKENDS)
def test_absent_package_is_one_clear_line(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = BACKENDS[backend][1]
    monkeypatch.setitem(sys.modules, package, None)  # importing it raises ImportError
    with pytest.raises(
        ArgumentError, match=f"backend: {backend} needs the package {package}, which"
    ) as caught:
        edge.load(STORY, backend=backend)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [("memory", "1GiB"), ("weights", "q4"), ("draft", "story"), ("exact", True)]
)
def test_what_edge_alone_has_is_refused(name: str, value: object) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(
        ArgumentError, match=rf"{name}: only edge's own engine takes it; leave it out with mlc"
    ):
        edge.load(STORY, backend="mlc", **options)


@pytest.mark.parametrize(("name", "value"), [("threads", 0), ("context", True), ("context", "long")])
def test_ranges_are_checked_before_anything_is_loaded(name: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{name}: expected 1.."):
        edge.load(STORY, backend="llama.cpp", **{name: value})


class Generator:
    """Stands for onnxruntime_genai.Generator, with a rule of its own."""

    def __init__(self, model: Any, params: Any) -> None:
        self.tokens: list[int] = []

    def append_tokens(self, tokens: Any) -> None:
        assert tokens.dtype == np.int32
        self.tokens += tokens.tolist()

    def get_logits(self) -> Any:
        rows = np.zeros((1, 1, 5000), np.float32)
        rows[0, 0, self.tokens[-1] + 2] = 9
        return rows


def onnx_package(overlays: list[dict[str, Any]]) -> Any:
    config = SimpleNamespace(
        clear_providers=lambda: None, overlay=lambda text: overlays.append(json.loads(text))
    )
    return SimpleNamespace(
        __version__="0.0",
        Config=lambda path: config,
        Model=lambda config: SimpleNamespace(),
        GeneratorParams=lambda model: SimpleNamespace(set_search_options=lambda **options: None),
        Generator=Generator,
    )


def onnx_folder(folder: Path, settings: dict[str, Any]) -> Path:
    from flashload.format import PackFile

    with PackFile(STORY) as pack:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes(pack.read(name))
    (folder / "genai_config.json").write_text(json.dumps(settings))
    return folder


def test_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overlays: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", onnx_package(overlays))
    folder = onnx_folder(tmp_path, {"model": {"vocab_size": 5000, "context_length": 128}})
    with edge.load(folder, backend="onnxruntime", context=64, threads=2) as peer:
        done = peer.generate([300], max_tokens=3, temperature=0, ignore_eos=True)
        assert done.tokens == [302, 304, 306]
        assert peer.score([300, 302, 304])[1:] == pytest.approx([math.log(1 / (1 + 4999 * math.exp(-9)))] * 2)
    assert overlays[0]["model"]["decoder"]["session_options"]["intra_op_num_threads"] == 2


def test_onnxruntime_refuses_what_it_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", onnx_package([]))
    folder = onnx_folder(tmp_path, {"model": {"vocab_size": 5000, "context_length": 128}})
    with pytest.raises(ArgumentError, match="context: expected at most the model's 128 tokens, found 256"):
        edge.load(folder, backend="onnxruntime", context=256)
    with edge.load(folder, backend="onnxruntime") as peer:
        assert peer.context == 128
    with pytest.raises(ModelFileError, match=r"genai_config\.json: expected model\.vocab_size"):
        edge.load(onnx_folder(tmp_path, {"model": {}}), backend="onnxruntime")


def test_onnxruntime_writes_what_edge_writes(shared: Path) -> None:
    """``python -m onnxruntime_genai.models.builder -i tinystories-656k -o FOLDER -p fp32 -e cpu`` makes its model."""
    try:
        importlib.import_module("onnxruntime_genai")
    except ImportError:
        pytest.skip("onnxruntime-genai is not installed")
    folder = os.environ.get("EDGE_ONNX_MODEL")
    if folder is None:
        pytest.skip(
            "EDGE_ONNX_MODEL does not name the folder of tinystories-656k as onnxruntime-genai builds it"
        )
    model = shared / "models" / "tinystories-656k"
    with edge.load(model) as own, edge.load(folder, backend="onnxruntime", threads=2) as peer:
        prompt = "Once upon a time there was"
        settings: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
        assert peer.generate(prompt, **settings).text == own.generate(prompt, **settings).text
        assert peer.score(prompt)[1:] == pytest.approx(own.score(prompt)[1:], abs=0.02)
        again = [peer.generate(prompt, max_tokens=12, seed=3).tokens for _ in range(2)]
        assert again[0] == again[1] and len(again[0]) == 12
        peer.context = 6
        with pytest.raises(ContextOverflowError):
            peer.generate(prompt, max_tokens=12)


def _cli(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(one) for one in arguments])


def test_command_line_with_another_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", onnx_package([]))
    folder = onnx_folder(tmp_path, {"model": {"vocab_size": 5000, "context_length": 128}})
    run = ("run", folder, "the cat", "-n", 3, "--backend", "onnxruntime", "--temperature", 0, "--ignore-eos")
    text = load_tokenizer(STORY).encode("the cat", add_special_tokens=True)[-1]
    found = json.loads(_cli(*run, "--json").stdout)
    assert found["tokens"] == [text + 2, text + 4, text + 6]
    assert found["backend"] == "onnxruntime" and found["context"] == 128
    shown = _cli(*run, "--stats")
    assert "the cat" + found["text"] in shown.stdout
    assert "onnxruntime 0.0" in shown.stderr and "[prompt: " in shown.stderr


@pytest.mark.parametrize(
    ("command", "flag", "given"),
    [
        ("run", "memory", ("--memory", "1GiB")),
        ("run", "draft", ("--draft", "story")),
        ("chat", "kv_type", ("--kv-type", "int8")),
        ("run", "--samples", ("--samples", "2")),
        ("run", "--skeleton", ("--skeleton", "on")),
        ("chat", "--skeleton", ("--skeleton", "auto")),
    ],
)
def test_command_line_refuses_what_edge_alone_has(command: str, flag: str, given: tuple[str, ...]) -> None:
    error = _cli(command, STORY, *given, "--backend", "mlc").exception
    assert isinstance(error, ArgumentError)
    assert re.match(rf"{flag}: only edge's own engine (has|takes) it; leave it out with mlc$", str(error))


class MlcEngine:
    """Stands for mlc_llm's SyncMLCEngine: draws the next id, one a step, and says so as its callback does."""

    asked: Any
    aborted: list[str]

    def __init__(self, model: str, device: str, *, mode: str, request_stream_callback: Any) -> None:
        if "broken" in model:
            raise RuntimeError("no library")
        MlcEngine.aborted = []
        self.callback = request_stream_callback
        self.running: list[Any] = []

    def create_request(self, request_id: str, inputs: list[Any], generation_config: Any) -> Any:
        MlcEngine.asked = generation_config
        return SimpleNamespace(id=request_id, last=inputs[0].token_ids[-1], left=generation_config.max_tokens)

    def add_request(self, request: Any) -> None:
        self.running.append(request)

    def abort_request(self, request_id: str) -> None:
        MlcEngine.aborted.append(request_id)
        self.running.clear()
        self.tell(request_id, [], None, "abort")

    def step(self) -> None:
        [request] = self.running
        request.last += 1
        request.left -= 1
        told = [json.dumps({"token": "x", "logprob": -0.5, "bytes": [], "top_logprobs": []})]
        self.tell(request.id, [request.last], told, None if request.left else "length")
        if not request.left:
            self.running.clear()

    def tell(self, request_id: str, ids: list[int], told: list[str] | None, reason: str | None) -> None:
        stream = SimpleNamespace(delta_token_ids=ids, delta_logprob_json_strs=told, finish_reason=reason)
        self.callback([SimpleNamespace(unpack=lambda: (request_id, [stream]))])


@pytest.fixture
def mlc_package(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {
        "mlc_llm": SimpleNamespace(__version__="0.0"),
        "mlc_llm.serve.data": SimpleNamespace(TokenData=lambda ids: SimpleNamespace(token_ids=ids)),
        "mlc_llm.serve.sync_engine": SimpleNamespace(SyncMLCEngine=MlcEngine),
        "mlc_llm.protocol.generation_config": SimpleNamespace(GenerationConfig=SimpleNamespace),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def test_mlc(tmp_path: Path, mlc_package: None) -> None:
    with edge.load(onnx_folder(tmp_path, {}), backend="mlc") as peer:
        settings: dict[str, Any] = {"temperature": 0.5, "seed": 7, "ignore_eos": True}
        done = peer.generate([300], max_tokens=3, logprobs=0, repetition_penalty=1.3, **settings)
        assert done.tokens == [301, 302, 303] and MlcEngine.aborted == []
        assert [one.logprob for one in done.logprobs or ()] == [-0.5] * 3
        assert MlcEngine.asked.temperature == 0.5 and MlcEngine.asked.seed == 7
        assert MlcEngine.asked.repetition_penalty == 1.3 and MlcEngine.asked.logit_bias is None
        assert peer.generate([310], max_tokens=2, **settings).tokens == [311, 312]


def test_mlc_stops_what_nobody_reads_on(tmp_path: Path, mlc_package: None) -> None:
    with edge.load(onnx_folder(tmp_path, {}), backend="mlc") as peer:
        stream = peer.stream([300], max_tokens=9, ignore_eos=True)
        assert next(iter(stream)).token == 301
        stream.close()
        assert MlcEngine.aborted == ["0"]
        assert peer.generate([300], max_tokens=1, ignore_eos=True).tokens == [301]


def test_mlc_refuses_what_it_lacks(tmp_path: Path, mlc_package: None) -> None:
    with edge.load(onnx_folder(tmp_path, {}), backend="mlc") as peer:
        with pytest.raises(ArgumentError, match=r"min_p: mlc has no such setting, found 0\.1"):
            peer.generate([300], max_tokens=1, min_p=0.1)
        with pytest.raises(ArgumentError, match="logprobs: mlc has no such setting, found 3"):
            peer.generate([300], max_tokens=1, logprobs=3)
        with pytest.raises(ArgumentError, match="score: mlc shows no log-probabilities"):
            peer.score([300, 301])
    broken = tmp_path / "broken"
    broken.mkdir()
    with pytest.raises(ModelFileError, match="mlc does not load it: no library"):
        edge.load(onnx_folder(broken, {}), backend="mlc")


def test_llama_cpp_writes_what_edge_writes(shared: Path) -> None:
    try:
        importlib.import_module("llama_cpp")
    except ImportError:
        pytest.skip("llama-cpp-python is not installed")
    model = next(iter(sorted((shared / "models").glob("*q8_0*.gguf"))), None)
    if model is None:
        pytest.skip("no small GGUF file among the shared models")
    settings: dict[str, Any] = {"max_tokens": 24, "temperature": 0}
    with edge.load(model) as own, edge.load(model, backend="llama.cpp", context=256, threads=2) as peer:
        prompt = "Once upon a time there was"
        assert peer.generate(prompt, **settings).text == own.generate(prompt, **settings).text
        for theirs, ours in zip(peer.score(prompt)[1:], own.score(prompt)[1:], strict=True):
            assert theirs == pytest.approx(ours, abs=0.05)
    with pytest.raises(ModelFileError, match=r"llama\.cpp does not load it"):
        edge.load(STORY, backend="llama.cpp")
