"""The decoder of the built-in family and what its training minimises, by their definitions."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the recipe needs torch (pip install edge[train])")
pytest.importorskip("safetensors", reason="the recipe needs safetensors (pip install edge[train])")

from edge.builtin.evaluate import ffn_sparsity  # noqa: E402
from edge.builtin.model import Attention, Decoder, dropout, rope_tables, rotate  # noqa: E402
from edge.builtin.muon import orthogonalise  # noqa: E402
from edge.builtin.objectives import Balanced, Distil, Plain, Sparse, SparsitySettings  # noqa: E402
from edge.builtin.tokens import train_tokenizer  # noqa: E402
from edge.builtin.upcycle import upcycle  # noqa: E402
from flashload.errors import ArgumentError  # noqa: E402
from tests.builtin_family import one_thread, random_decoder, story, tiny_config  # noqa: E402, F401

pytestmark = pytest.mark.usefixtures("one_thread")


def test_sparsity_rises_in_a_line_and_comes_to_rest() -> None:
    ramp = SparsitySettings(target=0.9, begin=0.2, end=0.6, rest=0.8, settled=0.8)
    sparse = Sparse(ramp, Plain())
    sparse.state["first"] = 0.5
    wanted = [round(sparse.wanted(p), 3) for p in (0.2, 0.4, 0.6, 0.7, 0.8, 1.0)]
    assert wanted == [0.5, 0.7, 0.9, 0.85, 0.8, 0.8]


def test_sparsity_leaves_what_it_is_added_to_as_it_was_before_it_begins() -> None:
    model, tokens = random_decoder(hidden_act="relu"), torch.arange(60).view(2, 30)
    sparse = Sparse(SparsitySettings(begin=0.4), Plain())
    early, value = sparse.loss(model, tokens, 0.39)
    assert torch.equal(early, value) and sparse.state["first"] == -1
    late, again = sparse.loss(model, tokens, 0.4)
    assert torch.equal(again, value) and late.item() > value.item()
    assert sparse.state["first"] == sparse.state["zeros"] == pytest.approx(0.5, abs=0.2)


def test_distillation_of_the_teacher_itself_has_nothing_to_learn() -> None:
    teacher, tokens = random_decoder(), torch.arange(60).view(2, 30)
    minimised, loss = Distil(teacher, text_share=0.1).loss(teacher, tokens, 0.0)
    assert minimised.item() == pytest.approx(0.1 * loss.item(), rel=1e-4)
    assert loss.item() == pytest.approx(Plain().loss(teacher, tokens, 0.0)[1].item(), rel=1e-4)
    other, _ = Distil(random_decoder(1), text_share=0.1).loss(teacher, tokens, 0.0)
    assert other.item() > minimised.item() + 1.0
    later = Distil(random_decoder(1), text_share=0.1, begin=0.5)
    assert torch.equal(*later.loss(teacher, tokens, 0.49))
    assert later.loss(teacher, tokens, 0.5)[0].item() == pytest.approx(other.item())


def test_experts_are_mixed_as_defined() -> None:
    """Each token by itself: softmax of all logits, the best kept and made to add up to one, their outputs summed."""
    moe = random_decoder(num_local_experts=4, intermediate_size=16).layers[0].block_sparse_moe
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        found = moe(x).view(-1, 32)
        balance = moe.balance.item()
        counts = torch.zeros(4)
        chances = torch.zeros(4)
        for row, value in zip(found, x.view(-1, 32), strict=True):
            shares = torch.softmax(moe.gate.weight @ value, 0)
            best = shares.topk(2)
            want = torch.zeros(32)
            for share, e in zip(best.values / best.values.sum(), best.indices, strict=True):
                inner = torch.nn.functional.silu(moe.w1[e] @ value) * (moe.w3[e] @ value)
                want += share * (moe.w2[e] @ inner)
                counts[e] += 1
            chances += shares / 18
            assert torch.allclose(row, want, atol=1e-5)
    assert balance == pytest.approx(4 * (counts / 36 * chances).sum().item(), rel=1e-4)


def test_upcycled_experts_hold_every_dense_neuron_alike_often() -> None:
    dense = random_decoder(intermediate_size=64)
    experts = random_decoder(1, num_local_experts=8, intermediate_size=16)
    routers = [layer.block_sparse_moe.gate.weight.clone() for layer in experts.layers]
    upcycle(experts, dense, seed=0)
    assert torch.equal(experts.embed_tokens.weight, dense.embed_tokens.weight)
    for layer, old, router in zip(experts.layers, dense.layers, routers, strict=True):
        assert torch.equal(layer.self_attn.q_proj.weight, old.self_attn.q_proj.weight)
        moe, mlp = layer.block_sparse_moe, old.mlp
        assert torch.equal(moe.gate.weight, router)
        slots = (moe.w1[:, :, None] == mlp.gate_proj.weight).all(-1).int().argmax(-1)  # [experts, width]
        assert torch.equal(slots.flatten().bincount(), torch.full((64,), 2))
        assert torch.equal(moe.w3, mlp.up_proj.weight[slots])
        assert torch.allclose(moe.w2, 0.5 * 64 / 16 * mlp.down_proj.weight.T[slots].transpose(1, 2))
    with pytest.raises(ArgumentError, match="8 experts of 15 neurons to hold whole copies of 64"):
        upcycle(random_decoder(num_local_experts=8, intermediate_size=15), dense, seed=0)


def test_expert_balance_is_part_of_what_is_minimised() -> None:
    model, objective = random_decoder(num_local_experts=4, intermediate_size=16), Balanced(weight=0.5)
    minimised, loss = objective.loss(model, torch.arange(60).view(2, 30), 0.0)
    assert minimised.item() == pytest.approx(loss.item() + 0.5 * objective.state["balance"], rel=1e-4)
    assert 1.0 < objective.state["balance"] < 4.0  # random routers are uneven


def test_decoder_is_causal() -> None:
    model = random_decoder()
    tokens = torch.randint(0, 300, (1, 20))
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 300
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    assert torch.allclose(before[:12], after[:12], atol=1e-5)
    assert not torch.allclose(before[12:], after[12:], atol=1e-3)


def test_attention_in_blocks_is_attention() -> None:
    """Over more tokens than one block of queries holds."""
    config = tiny_config(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=300)
    torch.manual_seed(0)
    attention = Attention(config)
    cos, sin = rope_tables(config)
    x = torch.randn(2, 300, 32)
    with torch.no_grad():
        found = attention(x, cos, sin)
        q = rotate(attention.q_proj(x).view(2, 300, 4, 16).transpose(1, 2), cos, sin)
        k = rotate(attention.k_proj(x).view(2, 300, 2, 16).transpose(1, 2), cos, sin)
        v = attention.v_proj(x).view(2, 300, 2, 16).transpose(1, 2)
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        want = attention.o_proj(mixed.transpose(1, 2).reshape(2, 300, 64))
    assert torch.allclose(found, want, atol=1e-5)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.ones(1001, 33)
    dropped = dropout(x, 0.15, training=True)
    zero_share = (dropped == 0).float().mean().item()
    assert zero_share == pytest.approx(38 / 256, abs=0.01)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)
    assert len(dropped.unique()) == 2
    assert dropout(x, 0.15, training=False) is x


def test_muon_update_is_nearly_orthogonal() -> None:
    torch.manual_seed(0)
    for shape in ((64, 32), (32, 64), (48, 48), (3, 40, 16)):
        singular = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert singular.min() > 0.3 and singular.max() < 1.5


def test_decoder_starts_with_small_residual_writers() -> None:
    torch.manual_seed(0)
    layer = Decoder(tiny_config(hidden_size=128, intermediate_size=256)).layers[0]
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(
        0.01, rel=0.05
    )  # 0.02 / sqrt(2 * 2 layers)
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_zero_share_is_counted_per_layer() -> None:
    model = random_decoder(hidden_act="relu")
    with torch.no_grad():
        model.layers[1].mlp.gate_proj.weight.zero_()
    shares = ffn_sparsity(model, train_tokenizer([story(1)], 300), story(3))
    assert 0.2 < shares[0] < 0.8 and shares[1] == 1.0
