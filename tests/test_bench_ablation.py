"""What each stage of the ablation reads, and the whole of it on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("_edge")

from bench import ablation
from bench.ablation import ALIGN_BYTES, GAP_BYTES, RUN_BYTES, Layer, apart, bundled, pieces_of
from tests.neuron_packs import by_neuron, tiny_relu
from tests.tiny import tiny_llama_gguf

LAYER = Layer(0, 8192, 1000, 4608, 2)


@given(
    ids=st.sets(st.integers(0, 999), max_size=60),
    first=st.integers(0, 9999),
    size=st.sampled_from([100, 512, 4608, 300_000]),
)
def test_reads_cover_what_is_wanted_and_no_more_than_gaps(ids: set[int], first: int, size: int) -> None:
    pieces = pieces_of(np.array(sorted(ids), np.int64), first, size)
    for begin, n_bytes in pieces:
        assert begin % ALIGN_BYTES == n_bytes % ALIGN_BYTES == 0
        assert n_bytes <= max(RUN_BYTES, size + 2 * ALIGN_BYTES)
    for i in ids:
        at = first + i * size
        assert any(begin <= at and at + size <= begin + n for begin, n in pieces)
    wanted = sum(n for _, n in pieces) - len(ids) * size
    assert wanted <= len(ids) * (GAP_BYTES + 2 * ALIGN_BYTES)


def test_a_bundle_is_one_read_and_matrices_are_two() -> None:
    far = np.array([10, 500], np.int64)
    assert len(bundled(far, LAYER)) == 2 and len(apart(far, LAYER)) == 4
    assert sum(n for _, n in bundled(far, LAYER)) == 2 * 4608
    (whole,) = bundled(np.array([3, 4, 5], np.int64), LAYER)
    assert whole == (8192 + 3 * 4608, 3 * 4608)
    columns = apart(np.array([0], np.int64), LAYER)[1]
    assert columns[0] <= 8192 + 1000 * 2304 < sum(columns)
    assert apart(np.array([], np.int64), LAYER) == []


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    by_neuron(tiny_relu(folder), folder / "m.edge")
    return folder / "m.edge"


def test_reads_are_done_for_real(pack: Path) -> None:
    (first, *_) = layers = ablation.layers_of(pack)
    ids = np.arange(first.rows, dtype=np.int64)
    got = ablation.timed(pack, [bundled(ids, layer) for layer in layers], 2)
    assert got["drive_seconds"] > 0 and 2 * got["read_bytes"] >= sum(x.rows * x.record_bytes for x in layers)
    assert ablation.timed(pack, [[]], 2)["drive_seconds"] == 0
    assert ablation.timed_stream(pack, 10 * pack.stat().st_size)["read_bytes"] == 10 * pack.stat().st_size


def test_slots_hold_what_was_used(pack: Path) -> None:
    layers = ablation.layers_of(pack)
    ids = np.arange(0, layers[0].rows, 3, dtype=np.int64)
    wanted = [[ids] * len(layers)] * 3
    none = ablation.missing_neurons(pack, layers, wanted, 0.0, None)
    assert all(np.array_equal(found, ids) for token in none for found in token)
    some = ablation.missing_neurons(pack, layers, wanted, 0.5, None)
    # Slots begin with the first neurons.
    assert all(0 < len(found) < len(ids) for found in some[0])
    assert all(len(found) == 0 for found in some[2])


def test_a_pack_of_matrices_is_refused(tmp_path: Path) -> None:
    from flashload.pack import pack as write

    write(tiny_llama_gguf(tmp_path / "m.gguf"), tmp_path / "m.edge")
    with pytest.raises(SystemExit):
        ablation.main([str(tmp_path / "m.edge")])
    with pytest.raises(ValueError, match="records of neurons"):
        ablation.layers_of(tmp_path / "m.edge")


def test_all_stages_of_a_tiny_model(pack: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [str(pack), "--tokens", "4", "--warm", "4", "--threads", "1", "--slots", "0.5"]
    assert ablation.main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    stages = {s["stage"]: s for s in document["stages"]}
    assert list(stages) == ["naive", "persist", "predictor", "window", "bundle", "overlap"]
    assert document["wanted_by"] == "the gates themselves" and 0 < document["wanted_share"] <= 1
    assert document["missing_share"] <= document["wanted_share"]
    assert stages["naive"]["read_bytes"] > stages["persist"]["read_bytes"] > 0
    assert stages["predictor"]["read_bytes"] >= stages["window"]["read_bytes"]
    assert all(s["compute_seconds"] > 0 and s["drive_seconds"] >= 0 for s in stages.values())
    ablation.show(document)
    assert "overlap" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    ablation.plot(document, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
