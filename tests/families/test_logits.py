"""Every family against the logits transformers computed, from the Hugging Face folder and through GGUF."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

import edge
from tests import tiny
from tests.families.cases import CASES, EXPECTED, N_POSITIONS

DATA = Path(__file__).parent / "data"
#: RoPE scaling in GGUF metadata is covered in test_arch; here the plain forms.
THROUGH_GGUF = ("llama", "llama-tied", "qwen2", "qwen3", "mixtral", "qwen3_moe", "olmoe")
TOLERANCE = 1e-3


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def all_logits(path: Path, tokens: list[int], **options: object) -> np.ndarray:
    """[n, vocab]: one growing prefix at a time, as decoding does."""
    with edge.load(path, context=N_POSITIONS * 2, threads=1, **options) as engine:
        return np.stack([engine.logits(tokens[: n + 1]) for n in range(len(tokens))])


def check(path: Path, case: str, tolerance: float = TOLERANCE) -> None:
    expected = np.load(DATA / case / EXPECTED)
    found = all_logits(path, [int(t) for t in expected["tokens"]])
    assert found.shape == expected["logits"].shape == (N_POSITIONS, expected["logits"].shape[1])
    assert relative_error(found, expected["logits"]) <= tolerance


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str) -> None:
    check(DATA / case, case)


@pytest.mark.parametrize("case", THROUGH_GGUF)
def test_logits_through_gguf_equal_transformers(case: str, tmp_path: Path) -> None:
    config = tiny.hf_config(CASES[case][0]) | json.loads((DATA / case / "config.json").read_text())
    config["rope_theta"] = config.get("rope_parameters", {}).get("rope_theta", 10000.0)
    tensors = {n: v.astype(np.float32) for n, v in load_file(DATA / case / "model.safetensors").items()}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", tiny.GGUF_ARCHITECTURES[config["model_type"]])
    tiny._write_metadata(writer, config)
    tiny.write_vocabulary(writer, config["vocab_size"])
    for name, values in tiny.gguf_tensors(config, tensors).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check(tmp_path / "m.gguf", case)


def test_a_whole_prompt_gives_the_bits_of_one_token_at_a_time() -> None:
    expected = np.load(DATA / "llama" / EXPECTED)
    tokens = [int(t) for t in expected["tokens"]]
    one_by_one = all_logits(DATA / "llama", tokens)[-1]
    with edge.load(DATA / "llama", context=128, threads=2) as engine:
        assert np.array_equal(engine.logits(tokens), one_by_one)


def test_the_check_can_fail() -> None:
    with pytest.raises(AssertionError):
        check(DATA / "llama", "llama-linear")
