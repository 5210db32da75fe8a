"""What leaving out neurons costs and saves: ``python -m bench thresholds MODEL --data TEXT``.

A model is packed by neuron, its thresholds found for several shares (``edge sparsify``), and each share told with the
perplexity of text held back and with the bytes one token reads: from memory with everything resident, and from the
drive with half of the weights in memory, beside a pack of matrices, which streams what does not fit. Bytes are counted,
not timed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench import machine, report
from flashload.errors import EdgeError

SHARES = (0.3, 0.5, 0.6)
_PROMPT, _CONTEXT = 16, 128


def drive_bytes(
    pack: Path, share: float, tokens: list[int], n_tokens: int, sparse: bool
) -> tuple[float, str]:
    """(bytes read from the drive for one token of decode, the placement) with a share of the weights in memory.

    Args:
        share: of what everything takes in memory beyond keys, values and activations.
    """
    import _edge

    from flashload.format import PackFile
    from flashload.machine import cpu_count
    from flashload.plan import directory_of, place
    from flashload.sparsity import kept_share, read_thresholds

    with PackFile(pack) as file:
        model = directory_of(file)
        if sparse:
            model = model.with_thresholds(kept_share(file))
        thresholds = read_thresholds(file) if sparse else None

    def plan(memory_bytes: int) -> Any:
        return place(
            model,
            memory_bytes=memory_bytes,
            context=_CONTEXT,
            threads=cpu_count(),
            host_bytes=0,
            predictor=False,
        )

    whole = plan(1 << 59)
    weights = whole.resident_bytes + whole.neuron_bytes
    chosen = plan(whole.predicted_peak_bytes - int((1 - share) * weights))
    engine = _edge.Engine(chosen.engine_options(pack, model.decoder))
    if thresholds is not None:
        engine.set_neuron_thresholds(thresholds)
    sequence = _edge.Sequence(engine)
    sampler = _edge.Sampler({"temperature": 0.0}, model.decoder["vocab_size"])
    sequence.set_tokens(tokens[:_PROMPT])
    while sequence.n_pending > 1:
        sequence.advance()
    # The first tokens fill a window; they are not counted.
    for _ in range(8):
        sequence.next(sampler)
    before = engine.stats()["flash_bytes"]
    for _ in range(n_tokens):
        sequence.next(sampler)
    return (engine.stats()["flash_bytes"] - before) / n_tokens, chosen.placement


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rows for no thresholds and for each share; the pack of matrices beside them."""
    from edge.sparsify import sparsify
    from edge.tokenizer import Tokenizer
    from flashload.format import PackFile
    from flashload.pack import pack

    text = args.data.read_text("utf-8")
    source, rows = args.model, []
    tiles = folder / "matrices.edge"
    pack(source, tiles, args.weights, neurons="off")
    for share in args.shares:
        out = folder / f"{share}.edge"
        found = sparsify(
            source, out, data=text, share=share, weights=args.weights, held_out_tokens=args.held_out
        )
        with PackFile(out) as file:
            ids = Tokenizer(file.vocab()).encode(text[-20_000:], add_special_tokens=True)
        if not rows:
            streamed, placement = drive_bytes(tiles, args.memory_share, ids, args.tokens, False)
            rows.append({"what": "matrices", "drive_bytes": streamed, "placement": placement,
                         "perplexity": None, "skipped": 0.0, "memory_bytes": found.token_bytes})  # fmt: skip
            read, placement = drive_bytes(out, args.memory_share, ids, args.tokens, False)
            rows.append({"what": "records", "drive_bytes": read, "placement": placement,
                         "perplexity": found.chosen.dense_perplexity, "skipped": 0.0,
                         "memory_bytes": found.token_bytes})  # fmt: skip
        read, placement = drive_bytes(out, args.memory_share, ids, args.tokens, True)
        one = found.chosen
        rows.append({"what": f"share {share:.0%}", "drive_bytes": read, "placement": placement,
                     "perplexity": one.perplexity, "skipped": one.skipped, "layers": one.layers,
                     "memory_bytes": found.token_bytes - one.dense_ffn_bytes + one.ffn_bytes})  # fmt: skip
        out.unlink()
    return {
        "model": args.name or args.model.name,
        "weights": args.weights,
        "memory_share": args.memory_share,
        "calibration_tokens": found.calibration_tokens,
        "held_out_tokens": found.held_out_tokens,
        "rows": rows,
    }


def show(document: dict[str, Any]) -> None:
    none = document["rows"][1]["perplexity"]
    rows = []
    for row in document["rows"]:
        loss = "-" if row["perplexity"] is None else f"{row['perplexity'] / none - 1:+.2%}"
        rows.append(
            [
                row["what"],
                f"{row['skipped']:.1%}",
                "-" if row["perplexity"] is None else f"{row['perplexity']:.3f}",
                loss,
                f"{row['memory_bytes'] / 2**20:.2f}",
                f"{row['drive_bytes'] / 2**20:.2f}",
                row["placement"],
            ]
        )
    columns = [
        "by", "left out", "perplexity", "loss", "resident: MiB read/token",
        f"{document['memory_share']:.0%} in memory: MiB from the drive/token", "placement",
    ]  # fmt: skip
    notes = [
        f"Weights {document['weights']}; calibrated on {document['calibration_tokens']} tokens, perplexity of "
        f"{document['held_out_tokens']} others; bytes are counted.",
        report.machine_line(document["machine"]),
    ]
    report.print_table(f"neurons left out of {document['model']}", columns, rows, notes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench thresholds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="a GGUF file or a Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="text (UTF-8); its last tenth is held back")
    parser.add_argument("--name", help="what to call the model")
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES), help="of the neurons")
    parser.add_argument("--memory-share", type=float, default=0.5, help="of the weights that fit memory")
    parser.add_argument("--weights", default="keep", choices=("keep", "q8", "q4"))
    parser.add_argument("--tokens", type=int, default=32, help="decoded to count bytes")
    parser.add_argument("--held-out", type=int, default=4096, help="most tokens of perplexity")
    parser.add_argument("--folder", type=Path, help="where packs are made, and removed; a temporary one")
    report.add_output(parser)
    args = parser.parse_args(argv)
    document: dict[str, Any] = {"machine": machine.facts()}
    try:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            document |= measure(args, Path(folder))
    except (EdgeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report.put_out(f"thresholds-{document['model']}", document, show, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
