"""What speculation takes of the budget: a draft model, or a copy of the model at fewer bits; the model's own heads,
look-up tables. A draft model of another vocabulary brings its tokenizer.

None of it may cost the model its place: what would move weights to the drive, or does not fit, is left out with a note.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edge.speculation import LOOKUP_WINDOW_TOKENS
from flashload.errors import ArgumentError, BudgetError
from flashload.format import TOKENIZER, PackFile
from flashload.machine import format_bytes, rss_bytes, trim_memory
from flashload.plan import STREAM, Directory, Plan, directory_of, place

if TYPE_CHECKING:
    import _edge

    from edge.host import Host
    from edge.options import LoadOptions
    from edge.tokenizer import Tokenizer
    from edge.watch import Progress

PlanHost = Callable[["Host", int], Plan]

#: What ``draft=`` is for a model that drafts for itself.
SELF = "self"
#: How often a copy at 4 bits is taken to be right, how deep it guesses, and what the memory bus brings in the time of a
#: byte from a fast drive.
_COPY_ACCEPTANCE, _COPY_DEPTH, _BUS_OVER_DRIVE = 0.85, 8, 8
#: A copy must promise this much: it takes memory that other things could have.
_WORTHWHILE = 1.1
#: A suffix automaton has at most two states and three edges of 16 bytes for a token, and 8 places of 4 to find them.
_LOOKUP_TOKEN_BYTES = 112
#: Rounding of blocks, and the state of a drafter.
_SLACK_BYTES = 64 << 10
#: The kernel charges a page table of 4 KiB for every 2 MiB.
_PAGE_TABLE_SHARE = 512


@dataclass(frozen=True)
class DraftModel:
    """A draft model's pack, closed again, and where its weights go.

    Attributes:
        options: what the core's engine is opened with.
        bytes: its share of the budget.
        weight_bytes: read for a guess.
        is_copy: it is the model itself at fewer bits.
        has_own_words: its vocabulary is another, so that its guesses pass through text.
        tokenizer: that vocabulary, while there is room for it.
    """

    name: str
    options: dict[str, Any]
    bytes: int
    weight_bytes: int
    is_copy: bool
    has_own_words: bool = False
    tokenizer: Tokenizer | None = None

    def words(self) -> Tokenizer | None:
        """Its own tokenizer; None where it shares the model's."""
        if not self.has_own_words or self.tokenizer is not None:
            return self.tokenizer
        from edge.tokenizer import Tokenizer

        with PackFile(self.options["pack_path"]) as pack:
            return Tokenizer(pack.vocab())


@dataclass(frozen=True)
class Reserved:
    """What was found room for.

    Attributes:
        plan: the model's own, with ``host_bytes`` counting what follows.
        core_bytes: tables and heads, in the model's own core.
        draft: None when there is none, or no room for it.
        medusa: whether the pack's heads may be loaded.
        notes: one sentence for everything left out.
    """

    plan: Plan
    core_bytes: int = 0
    draft: DraftModel | None = None
    medusa: bool = False
    notes: list[str] = field(default_factory=list)


def _digest(pack: PackFile) -> str:
    return hashlib.sha256(pack.read(TOKENIZER)).hexdigest()


def _tokens(pack: PackFile) -> dict[str, int]:
    """Token -> id, added ones included."""
    tokenizer = json.loads(pack.vocab().tokenizer_json)
    vocab = tokenizer["model"]["vocab"]
    ids = dict(vocab) if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
    return ids | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}


def same_vocabulary(target: PackFile, draft: PackFile) -> bool:
    """Whether ids mean the same in both models."""
    return _digest(target) == _digest(draft) or _tokens(target) == _tokens(draft)


def own_words(target: Tokenizer, target_pack: PackFile, draft_pack: PackFile) -> tuple[Tokenizer | None, int]:
    """The draft model's tokenizer where its vocabulary is another, and the bytes it takes.

    Raises:
        ArgumentError: guesses cannot pass through text either.
    """
    if same_vocabulary(target_pack, draft_pack):
        return None, 0
    from edge.tokenizer import Tokenizer
    from edge.translation import spells_text

    trim_memory()
    before_bytes = rss_bytes()
    tokenizer = Tokenizer(draft_pack.vocab())
    trim_memory()
    taken = max(0, rss_bytes() - before_bytes)
    for path, found in ((target_pack.path, target), (draft_pack.path, tokenizer)):
        if not spells_text(found):
            raise ArgumentError(
                f"draft: {draft_pack.path}: expected the vocabulary of {target_pack.path}, or two that give text back "
                f"as it was, found that {path} does not"
            )
    return tokenizer, taken


def open_draft(
    target: PackFile, words: Tokenizer, plan: Plan, options: LoadOptions, on_pack: Progress | None = None
) -> DraftModel:
    """The draft model of ``options``, placed in memory whole; "self" is a copy of the model, made once.

    Args:
        words: the target's tokenizer.

    Raises:
        ArgumentError: no such model, or another vocabulary that text does not pass through.
        UnsupportedModelError: no copy can be made that is smaller.
    """
    from edge.models import open_pack
    from flashload.cache import ensure_copied

    assert options.draft is not None
    is_copy = options.draft == SELF
    path = ensure_copied(target, on_pack) if is_copy else options.draft
    with open_pack(path, weights=options.weights, on_pack=on_pack) as pack:
        tokenizer, tokenizer_bytes = own_words(words, target, pack)
        model = directory_of(pack)
        decoder = model.decoder
        placed = place(
            model,
            memory_bytes=1 << 60,
            context=min(plan.context, decoder["max_positions"]),
            threads=plan.threads,
            host_bytes=0,
        )
        opened = placed.engine_options(pack.path, decoder, io_engine=options.io, isa=options.isa)
    taken = placed.core_bytes + placed.core_bytes // _PAGE_TABLE_SHARE + tokenizer_bytes
    own = tokenizer is not None
    return DraftModel(str(options.draft), opened, taken, placed.resident_bytes, is_copy, own, tokenizer)


def copy_pays(alone: Plan, beside: Plan, copy_bytes: int) -> bool:
    """Whether a copy wins back what its memory costs: the model has less, and reads more from the drive.

    Args:
        alone, beside: the model's plans without a copy and with one.
        copy_bytes: what one guess reads from memory.
    """

    def pass_cost(plan: Plan) -> float:
        return max(_BUS_OVER_DRIVE * plan.flash_bytes_per_token, plan.resident_bytes + plan.stream_bytes)

    tokens, best = 1.0, 0.0
    for depth in range(1, _COPY_DEPTH + 1):
        tokens += _COPY_ACCEPTANCE**depth
        best = max(best, tokens / (pass_cost(beside) + depth * copy_bytes))
    return best * pass_cost(alone) > _WORTHWHILE


def open_draft_core(draft: DraftModel, target: _edge.Engine) -> _edge.Engine:
    """Reads a draft model, which shares the threads of the model it drafts for."""
    import _edge

    from edge.watch import watched

    return watched(lambda progress: _edge.Engine(draft.options, progress, target), None)


def heads_bytes(model: Directory) -> int:
    """What a pack's Medusa heads take in memory; 0 without any."""
    heads = [w for w in model.entries if w.name.startswith("medusa.")]
    n_heads = sum(w.name.endswith(".weight") for w in heads)
    state_bytes = 16 * (n_heads + 1) * int(model.decoder["hidden_size"])
    return sum(w.stored_bytes for w in heads) + state_bytes + _SLACK_BYTES if n_heads else 0


def reserve(host: Host, plan: Plan, replan: PlanHost, draft: DraftModel | None) -> Reserved:
    """Finds room for a draft model, heads and look-up tables, in this order.

    Args:
        plan: of the model alone.
        replan: plans a host for a context.
    """
    reserved = Reserved(plan)
    taken = 0

    def fits(n_bytes: int) -> Plan | None:
        grown = replace(host, host_bytes=host.host_bytes + taken + n_bytes)
        try:
            found = replan(grown, plan.context)
        except BudgetError:
            return None
        # Less would do: what is reserved here is left out first.
        found = replace(found, floor_bytes=plan.floor_bytes)
        return None if plan.placement == "resident" != found.placement else found

    if draft is not None:
        found = fits(draft.bytes)
        if found is not None and draft.is_copy and not copy_pays(plan, found, draft.weight_bytes):
            reserved.notes.append(
                f"draft {draft.name} left out: with {format_bytes(draft.bytes)} less for the model, more would be "
                "read from the drive than its guesses save"
            )
        elif found is not None:
            taken += draft.bytes
            reserved = replace(reserved, plan=found, draft=draft)
        else:
            reserved.notes.append(
                f"draft {draft.name} left out: its {format_bytes(draft.bytes)} do not fit beside the model"
            )
    if n_bytes := heads_bytes(host.directory):
        found = fits(n_bytes)
        head = next((i for i, name in enumerate(host.pack.entries) if name == "head.weight"), None)
        if head is None:
            head = next(i for i, name in enumerate(host.pack.entries) if name == "embed.weight")
        if found is not None and found.placements[head] != STREAM:
            taken += n_bytes
            reserved = replace(reserved, plan=found, medusa=True, core_bytes=reserved.core_bytes + n_bytes)
        else:
            reserved.notes.append(
                f"Medusa heads left out: their {format_bytes(n_bytes)} and the output head do not fit in memory"
            )
    n_bytes = _LOOKUP_TOKEN_BYTES * min(plan.context, LOOKUP_WINDOW_TOKENS) + 4096
    if (found := fits(n_bytes)) is not None:
        reserved = replace(reserved, plan=found, core_bytes=reserved.core_bytes + n_bytes)
    return reserved
