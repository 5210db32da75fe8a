"""The decoder of the built-in family, as Hugging Face's LlamaForCausalLM and MixtralForCausalLM compute it.

Parameter names are Hugging Face's, so that export is a copy (`edge.builtin.hf`). Shapes: B sequences, T tokens,
D hidden, H heads, G key/value heads, C head_dim, F intermediate, V vocabulary.
"""

# mypy: allow-subclassing-any, no-warn-return-any
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge.builtin.moe import SparseMoe

_ACTIVATIONS = {"relu": F.relu, "silu": F.silu}


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions, named as in Hugging Face's LlamaConfig and MixtralConfig (`num_local_experts` 0: dense)."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    hidden_act: str = "silu"
    num_local_experts: int = 0
    num_experts_per_tok: int = 2


class RmsNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin [max_positions, head_dim]; the second half repeats the first (rotate-half)."""
    inverse = config.rope_theta ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    angles = torch.outer(torch.arange(config.max_position_embeddings).float(), inverse).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE over the last dimension of x [B, heads, T, C]; cos and sin [T, C]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-high, low), dim=-1) * sin.to(x.dtype)


def dropout(x: Tensor, share: float, training: bool) -> Tensor:
    """As F.dropout to 1/256 of the share; one random byte per value is ten times cheaper than Bernoulli draws."""
    cut = round(256 * share)
    if not training or not cut:
        return x
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= cut
    return x * kept.to(x.dtype).mul_(256 / (256 - cut))


_QUERY_BLOCK = 256  # queries that share one product with all keys up to the last of them


class Attention(nn.Module):
    """Causal grouped-query attention with RoPE."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, c = config.hidden_size, config.head_dim
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, c
        self.q_proj = nn.Linear(d, self.heads * c, bias=False)
        self.k_proj = nn.Linear(d, self.kv_heads * c, bias=False)
        self.v_proj = nn.Linear(d, self.kv_heads * c, bias=False)
        self.o_proj = nn.Linear(self.heads * c, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        g, c = self.kv_heads, self.head_dim
        share = self.heads // g  # query heads of one key/value head
        q = self.q_proj(x).view(b, t, self.heads, c).transpose(1, 2)  # [B, H, T, C]
        k = self.k_proj(x).view(b, t, g, c).transpose(1, 2)  # [B, G, T, C]
        v = self.v_proj(x).view(b, t, g, c).transpose(1, 2)
        q, k = rotate(q * c**-0.5, cos, sin), rotate(k, cos, sin)
        if x.is_cuda:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)
            return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))
        # Plain products are twice as fast as torch's fused attention on a CPU at these sizes.
        q, k, v = q.reshape(b * g, share, t, c), k.reshape(b * g, t, c), v.reshape(b * g, t, c)
        blocks: list[Tensor] = []
        for start in range(0, t, _QUERY_BLOCK):
            stop = min(t, start + _QUERY_BLOCK)
            scores = torch.bmm(q[:, :, start:stop].reshape(b * g, -1, c), k[:, :stop].transpose(1, 2))
            later = torch.full((stop - start, stop), float("-inf"), dtype=scores.dtype).triu_(start + 1)
            shares = torch.softmax(scores.view(b * g, share, stop - start, stop) + later, dim=-1)
            shares = shares.to(v.dtype).view(b * g, -1, stop)
            blocks.append(torch.bmm(shares, v[:, :stop]).view(b * g, share, stop - start, c))
        out = torch.cat(blocks, dim=2).view(b, self.heads, t, c)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class FeedForward(nn.Module):
    """down(act(gate(x)) * up(x)): with ReLU most of the F neurons are exactly zero for a token.

    `gates` holds act(gate(x)) [B, T, F] of the last call while `keep_gates` is set.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=False)
        self.up_proj = nn.Linear(d, f, bias=False)
        self.down_proj = nn.Linear(f, d, bias=False)
        self.act = _ACTIVATIONS[config.hidden_act]
        self.keep_gates, self.gates = False, torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.act(self.gate_proj(x))
        if self.keep_gates:
            self.gates = gates
        return self.down_proj(gates * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        if config.num_local_experts:
            self.block_sparse_moe = SparseMoe(
                config.hidden_size,
                config.intermediate_size,
                config.num_local_experts,
                config.num_experts_per_tok,
            )
        else:
            self.mlp = FeedForward(config)
        self.dropout = dropout

    @property
    def ffn(self) -> nn.Module:
        return self.block_sparse_moe if hasattr(self, "block_sparse_moe") else self.mlp

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + dropout(self.self_attn(self.input_layernorm(x), cos, sin), self.dropout, self.training)
        return x + dropout(self.ffn(self.post_attention_layernorm(x)), self.dropout, self.training)


class Decoder(nn.Module):
    """Tokens [B, T] -> logits [B, T, V]; input and output embedding are one matrix."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config, self.dropout = config, dropout
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, dropout) for _ in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim >= 2:
                # Residual writers start smaller, so that depth does not raise the stream's variance (GPT-2).
                writes = name.endswith(("o_proj.weight", "down_proj.weight", "moe.w2"))
                scale = (2 * config.num_hidden_layers) ** -0.5 if writes else 1.0
                nn.init.normal_(weight, std=0.02 * scale)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Final-normed hidden states [B, T, D]."""
        t = tokens.shape[1]
        x = dropout(self.embed_tokens(tokens), self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, self.cos[:t], self.sin[:t])
        return self.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final-normed states [..., D]."""
        return F.linear(hidden, self.embed_tokens.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))
