"""What each idea of "LLM in a flash" saves, one after the other: ``python -m bench ablation PACK``.

As table 2 of arXiv 2312.11514: *naive* reads every weight for every token; *persist* keeps attention and predictors in
memory and reads the feed-forward layers whole; *predictor* reads only the neurons that are predicted; *window* only
those that have no slot, rows and columns from matrices of their own; *bundle* rows and column of a neuron together; and
*overlap*, which is not in that table, is the engine as it runs, reading while it computes.

The text is decoded once to know which neurons every layer is asked for. Then the reads of every stage are done for real
from the pack, layer after layer, and timed alone; computing is timed with everything in memory.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bench import machine, report, window
from bench.weights import read_weights

#: As the engine joins reads of records (cpp/store/neuron_turn.cc).
GAP_BYTES, RUN_BYTES, ALIGN_BYTES = 16 << 10, 256 << 10, 512
_STREAM_BYTES = 1 << 20
_DEPTH = 32
#: Of what is read in a row at most so much is really read, and the rest taken to come at the same rate.
_LONG_BYTES = 1 << 30

Ids = npt.NDArray[np.int64]
Piece = tuple[int, int]


class Layer(NamedTuple):
    """The records of one layer in the pack."""

    weight: int
    offset: int
    rows: int
    record_bytes: int
    parts: int


def pieces_of(ids: Ids, first: int, size: int) -> list[Piece]:
    """(offset, bytes) of the reads of items of ``size`` bytes, side by side from ``first``: near ones come together."""
    if not len(ids):
        return []
    begin = (first + ids * size) // ALIGN_BYTES * ALIGN_BYTES
    end = -(-(first + (ids + 1) * size) // ALIGN_BYTES) * ALIGN_BYTES
    pieces: list[Piece] = []
    low, high = int(begin[0]), int(end[0])
    for at, to in zip(begin[1:].tolist(), end[1:].tolist(), strict=True):
        if at <= high + GAP_BYTES and to - low <= RUN_BYTES:
            high = to
        else:
            pieces.append((low, high - low))
            low, high = at, to
    return [*pieces, (low, high - low)]


def apart(ids: Ids, layer: Layer) -> list[Piece]:
    """The reads of neurons whose rows and columns lie in matrices of their own, of this layer's size and place."""
    row_bytes = layer.record_bytes // layer.parts
    return [
        piece
        for part in range(layer.parts)
        for piece in pieces_of(ids, layer.offset + part * layer.rows * row_bytes, row_bytes)
    ]


def bundled(ids: Ids, layer: Layer) -> list[Piece]:
    """The reads of neurons whose rows and column are one record."""
    return pieces_of(ids, layer.offset, layer.record_bytes)


def layers_of(pack: Path) -> list[Layer]:
    """Where the records of each layer lie.

    Raises:
        ValueError: the pack has no records of neurons.
    """
    from flashload.format import PackFile

    with PackFile(pack) as file:
        found = [
            Layer(number, e.offset, e.rows, e.chunk_bytes, e.neuron_parts)
            for number, (name, e) in enumerate(file.entries.items())
            if name.endswith(".neurons.records")
        ]
    if not found:
        raise ValueError(f"{pack}: expected records of neurons (edge pack --neurons on), found none")
    return found


class Predictor:
    """Predictors of a pack, with the engine's kernels; without any, the truly active neurons are taken."""

    def __init__(self, pack: Path, n_layers: int) -> None:
        from flashload.format import PackFile

        with PackFile(pack) as file:
            self._entries = {n: e for n, e in file.entries.items() if ".predictor." in n}
            self._data = {n: np.frombuffer(file.read(n), np.uint8) for n in self._entries}
        self.there = all(f"layers.{i}.predictor.up.weight" in self._entries for i in range(n_layers))

    def wanted(self, layer: int, x: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        """[tokens, neurons] of FFN inputs [tokens, hidden]."""
        scores = self._product(f"layers.{layer}.predictor.up.weight", self._product(
            f"layers.{layer}.predictor.down.weight", x))  # fmt: skip
        bias = self._data.get(f"layers.{layer}.predictor.bias")
        found: npt.NDArray[np.bool_] = (
            scores + (0 if bias is None else bias.view("<f4")[: scores.shape[1]]) > 0
        )
        return found

    def _product(self, name: str, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        import _edge

        entry = self._entries[name]
        product: npt.NDArray[np.float32] = _edge.gemv(
            _edge.default_isa(), int(entry.format), self._data[name], entry.rows, entry.cols, x
        )
        return product


def wanted_neurons(pack: Path, tokens: Sequence[int], threads: int) -> tuple[list[list[Ids]], bool]:
    """Neurons that each layer is asked for, [token][layer]; and whether predictors say so."""
    import edge
    from edge.calibration import capture

    with edge.load(pack, context=len(tokens) + 8, threads=threads, predictor="off") as engine:
        config = engine.metadata["config"]
        predictor = Predictor(pack, config["n_layers"])
        out: list[list[Ids]] = []
        for seen in capture(engine, [tokens]):
            per_layer = []
            for i in range(config["n_layers"]):
                if predictor.there:
                    mask = predictor.wanted(i, seen.inputs[i].astype(np.float32))
                else:
                    bits = np.unpackbits(seen.open[i], axis=1, bitorder="little")
                    mask = bits[:, : config["intermediate_size"]].astype(bool)
                per_layer.append([np.flatnonzero(row) for row in mask])
            out += [list(layers) for layers in zip(*per_layer, strict=True)]
    return out, predictor.there


def missing_neurons(
    pack: Path,
    layers: Sequence[Layer],
    wanted: Sequence[Sequence[Ids]],
    share: float,
    half_life: float | None,
) -> list[list[Ids]]:
    """Those of the wanted that have no slot, [token][layer], when each layer has slots for ``share`` of its neurons."""
    import _edge

    slots = [-1] * (max(layer.weight for layer in layers) + 1)
    for layer in layers:
        slots[layer.weight] = int(share * layer.rows)
    settings = {} if half_life is None else {"half_life_tokens": half_life}
    store = _edge.NeuronWindowTest(str(pack), slots, staging_bytes=4 << 20, budget=1 << 40, **settings)
    out = []
    for token in wanted:
        missing = []
        for layer, ids in zip(layers, token, strict=True):
            held = np.array(store.held(layer.weight, ids.tolist()), bool)
            missing.append(ids[~held] if len(ids) else ids)
            store.read(layer.weight, ids.tolist())
        store.commit([0])
        out.append(missing)
    return out


def timed(pack: Path, groups: Sequence[Sequence[Piece]], n_tokens: int) -> dict[str, float]:
    """The drive's time for groups of reads, one group after the other, per token."""
    import _edge

    pieces = [piece for group in groups for piece in group]
    if not pieces:
        return {"drive_seconds": 0.0, "read_bytes": 0.0, "requests": 0.0}
    ends = np.cumsum([len(group) for group in groups]).tolist()
    got = _edge.replay_reads(str(pack), pieces, ends, _DEPTH)
    return {
        "drive_seconds": got["seconds"] / n_tokens,
        "read_bytes": got["bytes"] / n_tokens,
        "requests": got["requests"] / n_tokens,
    }


def timed_stream(pack: Path, n_bytes: int) -> dict[str, float]:
    """The drive's time for so many bytes in a row, one token's."""
    size = pack.stat().st_size
    read = min(n_bytes, size, _LONG_BYTES)
    pieces = [(at, _STREAM_BYTES) for at in range(0, read - _STREAM_BYTES + 1, _STREAM_BYTES)]
    got = timed(pack, [pieces or [(0, read // ALIGN_BYTES * ALIGN_BYTES)]], 1)
    return {
        "drive_seconds": got["drive_seconds"] * n_bytes / got["read_bytes"],
        "read_bytes": float(n_bytes),
        "requests": n_bytes / _STREAM_BYTES,
    }


def token_seconds(
    pack: Path, tokens: Sequence[int], warm: int, share: float, mode: str, threads: int
) -> dict[str, float]:
    """The engine's time for a token with slots for a share of the neurons, and what it reads."""
    import _edge

    from flashload.format import PackFile

    with PackFile(pack) as file:
        decoder = file.config.to_json()
    options = window.options_of(pack, decoder, share, mode, len(tokens) + 8) | {"threads": threads}
    engine = _edge.Engine(options)
    sequence = _edge.Sequence(engine)
    seconds = []
    for n in range(1, len(tokens) + 1):
        sequence.set_tokens(tokens[:n])
        if n == warm + 1:
            before = engine.stats()
        start = time.perf_counter()
        sequence.advance()
        seconds.append(time.perf_counter() - start)
    after = engine.stats()
    n_timed = len(tokens) - warm
    return {
        "seconds": median(seconds[warm:]) if share >= 1 else sum(seconds[warm:]) / n_timed,
        "read_bytes": (after["neuron_bytes"] - before["neuron_bytes"]) / n_timed,
        "requests": (after["neuron_requests"] - before["neuron_requests"]) / n_timed,
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every stage of a pack; returns the document that ``--json`` prints."""
    layers = layers_of(args.pack)
    facts = machine.facts()
    texts = window.own_texts(args.pack, 1, args.warm + args.tokens)
    tokens = texts[0][: args.warm + args.tokens]
    wanted, predicted = wanted_neurons(args.pack, tokens, args.threads)
    missing = missing_neurons(args.pack, layers, wanted, args.slots, args.half_life)[args.warm :]
    wanted = wanted[args.warm :]
    mode = "predictor" if predicted else "exact"
    exact = token_seconds(args.pack, tokens, args.warm, 1.0, "exact", args.threads)["seconds"]
    guessed = exact
    if predicted:
        guessed = token_seconds(args.pack, tokens, args.warm, 1.0, mode, args.threads)["seconds"]
    real = token_seconds(args.pack, tokens, args.warm, args.slots, mode, args.threads)

    def of(what: Sequence[Sequence[Ids]], how: Any) -> dict[str, float]:
        groups = [how(ids, layer) for token in what for ids, layer in zip(token, layers, strict=True)]
        return timed(args.pack, groups, len(what))

    ffn_bytes = sum(layer.rows * layer.record_bytes for layer in layers)
    drives = {
        "naive": timed_stream(args.pack, read_weights(args.pack).token_bytes),
        "persist": timed_stream(args.pack, ffn_bytes),
        "predictor": of(wanted, apart),
        "window": of(missing, apart),
        "bundle": of(missing, bundled),
    }
    stages = [
        {"stage": name, "compute_seconds": exact if name in ("naive", "persist") else guessed} | drive
        for name, drive in drives.items()
    ]
    waited = max(0.0, real["seconds"] - guessed)
    stages.append({"stage": "overlap", "compute_seconds": real["seconds"] - waited, "drive_seconds": waited,
                   "read_bytes": real["read_bytes"], "requests": real["requests"]})  # fmt: skip
    n_neurons = sum(layer.rows for layer in layers)
    return {
        "benchmark": "ablation",
        "machine": facts,
        "model": args.pack.name,
        "threads": args.threads,
        "tokens": len(wanted),
        "warm_tokens": args.warm,
        "slot_share": args.slots,
        "half_life_tokens": args.half_life,
        "wanted_by": "predictors" if predicted else "the gates themselves",
        "wanted_share": sum(len(ids) for token in wanted for ids in token) / len(wanted) / n_neurons,
        "missing_share": sum(len(ids) for token in missing for ids in token) / len(missing) / n_neurons,
        "stages": stages,
    }


def show(document: dict[str, Any]) -> None:
    """Milliseconds per token of every stage."""
    rows = []
    for s in document["stages"]:
        total = s["drive_seconds"] + s["compute_seconds"]
        values = (1e3 * s["drive_seconds"], 1e3 * s["compute_seconds"], 1e3 * total, s["read_bytes"] / 1e6)
        rows.append(
            [s["stage"], *map(report.figure, values), f"{s['requests']:.0f}", report.figure(1 / total)]
        )
    columns = ["stage", "drive ms", "compute ms", "ms per token", "MB read", "requests", "tok/s"]
    notes = [
        f"of the neurons {document['wanted_share']:.1%} are wanted, as {document['wanted_by']} have it, and with "
        f"slots for {document['slot_share']:.0%} {document['missing_share']:.1%} are missing, per token",
        "naive to bundle: the reads alone, then computing; overlap: the engine as it runs, drive is what it waits for",
        f"{document['tokens']} tokens after {document['warm_tokens']} to fill slots; {document['threads']} threads",
        report.machine_line(document["machine"]),
    ]
    report.print_table(f"{document['model']}: per token", columns, rows, notes)


def plot(document: dict[str, Any], path: Path) -> None:
    """The same as stacked bars; PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = document["stages"]
    names = [s["stage"] for s in stages]
    compute = [1e3 * s["compute_seconds"] for s in stages]
    drive = [1e3 * s["drive_seconds"] for s in stages]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    axes.bar(names, compute, label="computing")
    bars = axes.bar(names, drive, bottom=compute, label="waiting for the drive")
    labels = [
        f"{a + b:.0f} ms\n{s['read_bytes'] / 1e6:.0f} MB"
        for a, b, s in zip(compute, drive, stages, strict=True)
    ]
    axes.bar_label(bars, labels, fontsize=7)
    axes.margins(y=0.15)
    axes.set_ylabel("ms per token")
    axes.set_title(f"{document['model']}, slots for {document['slot_share']:.0%} of the neurons", fontsize=10)
    report.save_figure(figure, axes, document, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench ablation", description=__doc__)
    parser.add_argument("pack", type=Path, help="a pack with neuron records of a ReLU model")
    parser.add_argument("--slots", type=float, default=0.24, help="share of each layer's neurons in memory")
    parser.add_argument(
        "--half-life", type=float, help="of use, in tokens; 0: the last tokens (default: the engine's)"
    )
    parser.add_argument("--tokens", type=int, default=16, help="tokens that are timed")
    parser.add_argument("--warm", type=int, default=32, help="tokens before them, which fill the slots")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    report.add_output(parser)
    args = parser.parse_args(argv)
    if not 0 <= args.slots <= 1 or min(args.tokens, args.warm, args.threads) < 1:
        parser.error("--slots: expected 0 to 1; --tokens, --warm, --threads: at least 1")
    try:
        document = measure(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    report.put_out(f"ablation-{args.pack.stem}", document, show, args, plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
