"""The benchmark of neurons left out: its rows, and that bytes are counted where they are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import thresholds
from tests.tiny import tiny_hf


@pytest.mark.slow
def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {
        "intermediate_size": 1024,
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "max_position_embeddings": 256,
    }
    tiny_hf(tmp_path / "hf", "llama", **sizes)
    (tmp_path / "text.txt").write_text("the cat sat on a mat and the dog ran.\n" * 120)
    arguments = [
        str(tmp_path / "hf"),
        "--data",
        str(tmp_path / "text.txt"),
        "--shares",
        "0.5",
        "--weights",
        "q8",
    ]
    assert thresholds.main([*arguments, "--tokens", "4", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    matrices, records, half = document["rows"]
    assert [row["placement"] for row in document["rows"]] == ["stream", "neurons", "neurons"]
    assert all(row["drive_bytes"] > 0 for row in document["rows"])
    assert half["skipped"] == pytest.approx(0.5, abs=0.1) and records["skipped"] == matrices["skipped"] == 0
    assert half["memory_bytes"] < records["memory_bytes"] == matrices["memory_bytes"]
    thresholds.show(document)
    assert "50%" in capsys.readouterr().out


def test_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("a")
    assert thresholds.main([str(tmp_path / "none"), "--data", str(tmp_path / "text.txt")]) == 1
    assert "error:" in capsys.readouterr().err
