"""How sparse the sparse target is on held-out text: closed neurons, hot neurons, and use over windows of tokens.

    python -m edge.builtin.neuron_facts --family DIR --corpora DIR [--json FILE] [--figure PNG]

The figures are those of LLM in a flash (arXiv 2312.11514): sparsity per layer, and its figure 4 on windows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edge.builtin.activations import Trained, ffn_inputs, held_out_ids
from edge.builtin.facts_command import run
from flashload.errors import ArgumentError

WINDOWS = tuple(range(1, 11))  # tokens
HOT_SHARE = 0.8  # of all activations, carried by the hot neurons


def open_neurons(trained: Trained, text: str) -> list[list[Tensor]]:
    """Per layer and held-out story, which neurons open at each token: [T, F] bool."""
    config = trained.model.config
    if config.hidden_act != "relu" or config.num_local_experts:
        raise ArgumentError(f"neuron facts: expected a dense ReLU model, found {config.hidden_act}")
    gates = [layer.mlp.gate_proj.weight.detach() for layer in trained.model.layers]
    per_story = [
        [x @ gate.T > 0 for x, gate in zip(inputs, gates, strict=True)]
        for inputs in ffn_inputs(trained.model, held_out_ids(trained, text))
    ]
    return [list(layer) for layer in zip(*per_story, strict=True)]


def hot_share(stories: Sequence[Tensor], carried: float = HOT_SHARE) -> float:
    """Smallest share of the neurons that carry this share of all activations; [T, F] bool each."""
    counts = torch.stack([active.sum(0) for active in stories]).sum(0).sort(descending=True).values
    reached = counts.cumsum(0) >= carried * counts.sum()
    return (int(reached.int().argmax()) + 1) / len(counts)


def window_use(stories: Sequence[Tensor], window: int) -> tuple[float, float]:
    """Shares of the neurons: open at any of the last `window` tokens; open now, but at none of the window before.

    Means over the tokens that have a whole window (and for the second one token more) before them in their story.
    """
    used = new = used_tokens = new_tokens = 0
    for active in stories:
        if len(active) < window:
            continue
        union = active.unfold(0, window, 1).any(-1)  # [T - window + 1, F]; row t covers t .. t + window - 1
        used += int(union.sum())
        used_tokens += len(union)
        fresh = active[window:] & ~union[:-1]
        new += int(fresh.sum())
        new_tokens += len(fresh)
    n_neurons = stories[0].shape[1]
    return used / max(1, used_tokens * n_neurons), new / max(1, new_tokens * n_neurons)


def facts(trained: Trained, text: str) -> dict[str, Any]:
    """What the command prints, as numbers; shares of the neurons of a layer."""
    layers = []
    for stories in open_neurons(trained, text):
        n_open, n_all = sum(int(a.sum()) for a in stories), sum(a.numel() for a in stories)
        use = [window_use(stories, window) for window in WINDOWS]
        layers.append(
            {
                "zeros": round(1 - n_open / n_all, 4),
                "hot": round(hot_share(stories), 4),
                "used": [round(used, 4) for used, _ in use],
                "new": [round(new, 4) for _, new in use],
            }
        )
    mean: dict[str, Any] = {
        key: round(sum(layer[key] for layer in layers) / len(layers), 4) for key in ("zeros", "hot")
    }
    for key in ("used", "new"):
        columns = zip(*(layer[key] for layer in layers), strict=True)
        mean[key] = [round(sum(column) / len(layers), 4) for column in columns]
    tokens = sum(len(ids) for ids in held_out_ids(trained, text))
    return {
        "held_out_tokens": tokens,
        "hot_carry": HOT_SHARE,
        "windows": list(WINDOWS),
        "layers": layers,
        "mean": mean,
    }


def draw(figures: dict[str, Any], png: Path) -> None:
    """Two panels over the window's length: neurons used, and neurons to read per token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    titles = {"used": "open in the last k tokens", "new": "open now, not in the k tokens before"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for index, layer in enumerate(figures["layers"]):
            axis.plot(figures["windows"], [100 * v for v in layer[key]], linewidth=1, label=f"layer {index}")
        axis.plot(figures["windows"], [100 * v for v in figures["mean"][key]], "k", linewidth=2, label="mean")
        axis.set(title=title, xlabel="window k (tokens)", ylabel="share of neurons (%)", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(png, dpi=100)
    pyplot.close(figure)


def show(figures: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = ["layer  zeros  hot (80 % of use)  used in 5 tokens  new per token after 5"]
    at = figures["windows"].index(5)
    for name, row in [*enumerate(figures["layers"]), ("mean", figures["mean"])]:
        lines.append(
            f"{name!s:>5}  {row['zeros']:5.1%}  {row['hot']:16.1%}  {row['used'][at]:16.1%}  {row['new'][at]:21.1%}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    return run(argv, prog="edge.builtin.neuron_facts", model="story", facts=facts, show=show, draw=draw)


if __name__ == "__main__":
    sys.exit(main())
