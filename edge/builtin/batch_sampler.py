"""Many texts of one length sampled at once by a built-in model, with a key/value cache.

Shapes: B rows, P prompt tokens, N new tokens, L layers, G key/value heads, C head_dim, V vocabulary.
"""

# mypy: allow-untyped-decorators, no-warn-return-any
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from edge.builtin.model import Attention, Decoder, rotate
from edge.builtin.tokens import Ids
from flashload.errors import ContextOverflowError

_DROP_SHARE = 8  # finished rows are dropped once they are one in so many; each drop copies the cache


def gumbel_noise(seed: int, rows: int, step: int, vocab_size: int) -> Tensor:
    """Standard Gumbel variates [rows, V] of one step; argmax(logits / T + noise) draws from softmax(logits / T).

    A function of its arguments alone, so that another model can be drawn from with the same noise.
    """
    generator = torch.Generator().manual_seed(((seed << 20) + step) % (1 << 63))
    return -torch.empty(rows, vocab_size).exponential_(generator=generator).clamp_min_(1e-30).log_()


class _Cache:
    """Keys and values [L, B, G, P + N, C] of the tokens so far."""

    def __init__(self, model: Decoder, rows: int, length: int) -> None:
        c = model.config
        shape = (c.num_hidden_layers, rows, c.num_key_value_heads, length, c.head_dim)
        weight = model.embed_tokens.weight
        self.keys = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


def _attend(layer: Attention, x: Tensor, model: Decoder, cache: _Cache, index: int) -> Tensor:
    """Attention of x [B, T, D], the tokens after those in the cache, to all tokens up to each of them."""
    b, t, _ = x.shape
    g, c, start = layer.kv_heads, layer.head_dim, cache.length
    stop, share = start + t, layer.heads // layer.kv_heads
    cos, sin = model.cos[start:stop], model.sin[start:stop]
    q = layer.q_proj(x).view(b, t, layer.heads, c).transpose(1, 2)
    k = layer.k_proj(x).view(b, t, g, c).transpose(1, 2)
    cache.keys[index, :, :, start:stop] = rotate(k, cos, sin)
    cache.values[index, :, :, start:stop] = layer.v_proj(x).view(b, t, g, c).transpose(1, 2)
    keys = cache.keys[index, :, :, :stop].view(b * g, stop, c)
    values = cache.values[index, :, :, :stop].view(b * g, stop, c)
    q = rotate(q * c**-0.5, cos, sin).reshape(b * g, share * t, c)
    scores = torch.bmm(q, keys.transpose(1, 2)).view(b * g, share, t, stop)
    if t > 1:
        later = torch.full((t, stop), float("-inf"), dtype=scores.dtype, device=x.device)
        scores = scores + later.triu_(start + 1)
    out = torch.bmm(torch.softmax(scores, dim=-1).view(b * g, share * t, stop), values)
    return layer.o_proj(out.view(b, layer.heads, t, c).transpose(1, 2).reshape(b, t, -1))


def _logits(model: Decoder, tokens: Tensor, cache: _Cache) -> Tensor:
    """Logits [B, V] after the last of tokens [B, T], which join the cache."""
    x = model.embed_tokens(tokens)
    for index, layer in enumerate(model.layers):
        x = x + _attend(layer.self_attn, layer.input_layernorm(x), model, cache, index)
        x = x + layer.ffn(layer.post_attention_layernorm(x))
    cache.length += tokens.shape[1]
    return model.head(model.norm(x[:, -1])).float()


@dataclass(frozen=True)
class Continuation:
    """The new tokens of one row [<= N], without the end token; `ended` says that it came."""

    ids: Ids
    ended: bool


@torch.inference_mode()
def continue_batch(
    model: Decoder,
    prompts: Ids,
    tokens: int,
    temperature: float,
    seed: int = 0,
    end_id: int = 0,
    show: Callable[[int], None] = lambda _: None,
) -> list[Continuation]:
    """Continues prompts [B, P] until the end token or `tokens` more; temperature 0 is greedy.

    `show` is told the number of tokens of every step. The noise of a draw is `gumbel_noise` of the seed, B rows
    and the step, whatever rows have ended. ContextOverflowError when P + tokens exceed the model's positions.
    """
    rows, prompt_tokens = prompts.shape
    limit = model.config.max_position_embeddings
    if prompt_tokens + tokens > limit + 1:
        raise ContextOverflowError(
            f"sampling: expected at most {limit + 1} tokens with the prompt, found {prompt_tokens} + {tokens}"
        )
    device = model.embed_tokens.weight.device
    cache = _Cache(model, rows, prompt_tokens + tokens)
    new = torch.full((rows, tokens), end_id)
    lengths = torch.full((rows,), tokens)
    held = torch.arange(rows)  # row of `new` that each row of the cache belongs to
    alive = torch.ones(rows, dtype=torch.bool)  # of the held rows
    inputs = torch.from_numpy(prompts)
    for step in range(tokens):
        logits = _logits(model, inputs.to(device), cache).cpu()
        if temperature > 0:
            noise = gumbel_noise(seed, rows, step, logits.shape[1])
            logits = logits / temperature + (noise if len(held) == rows else noise[held])
        drawn = logits.argmax(dim=-1)
        new[held[alive], step] = drawn[alive]
        show(int(alive.sum()))
        ended = alive & (drawn == end_id)
        lengths[held[ended]] = step
        alive &= ~ended
        if not alive.any():
            break
        if int((~alive).sum()) * _DROP_SHARE >= len(held):
            cache.keep(alive.nonzero()[:, 0].to(device))
            held, drawn, alive = held[alive], drawn[alive], alive[alive]
        inputs = drawn[:, None]
    return [
        Continuation(new[row, :length].numpy(), length < tokens)
        for row, length in enumerate(lengths.tolist())
    ]
