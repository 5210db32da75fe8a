"""Starts a mixture of experts from a trained dense model (sparse upcycling, Komatsuzaki et al. 2022, arXiv 2212.05055).

Attention, norms and embeddings are copied. The fine-grained experts are dealt the dense model's neurons: as many
copies of each as fill them, each copy shuffled by itself.
"""

from __future__ import annotations

import torch

from edge.builtin.model import Decoder
from flashload.errors import ArgumentError


def upcycle(model: Decoder, dense: Decoder, seed: int) -> None:
    """Overwrites every weight of `model` but its routers with those of `dense`.

    Raises:
        ArgumentError: the experts of a layer do not hold a whole number of copies of the dense neurons.
    """
    n_neurons, config = dense.config.intermediate_size, model.config
    n_experts, width = config.num_local_experts, config.intermediate_size
    copies, rest = divmod(n_experts * width, n_neurons)
    share = width // max(copies, 1)  # of an expert, dealt from one copy
    if rest or not copies or share * copies != width:
        raise ArgumentError(
            f"upcycling: expected {n_experts} experts of {width} neurons to hold whole copies of {n_neurons}"
        )
    source = dense.state_dict()
    kept = {name: w for name, w in source.items() if ".mlp." not in name}
    model.load_state_dict(kept, strict=False)
    order = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer, old in zip(model.layers, dense.layers, strict=True):
            # Neuron of every slot: [experts, width], one shuffle of all neurons per copy.
            deals = [torch.randperm(n_neurons, generator=order).view(n_experts, share) for _ in range(copies)]
            slots = torch.cat(deals, dim=1)
            moe, mlp = layer.block_sparse_moe, old.mlp
            moe.w1.copy_(mlp.gate_proj.weight[slots])
            moe.w3.copy_(mlp.up_proj.weight[slots])
            # A token's experts hold few of the dense neurons, and their weights add up to one.
            scale = 0.5 * n_neurons / width
            moe.w2.copy_(scale * mlp.down_proj.weight.T[slots].transpose(1, 2))
