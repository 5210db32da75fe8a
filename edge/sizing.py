"""What a budget becomes: when an engine is loaded, and whenever its budget changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edge.draft import DraftModel, Reserved, open_draft
from edge.host import Host
from edge.options import LoadOptions
from edge.placing import place_host
from edge.speculation import Drafting
from edge.watch import Progress
from flashload.cache import scratch_folder
from flashload.plan import Plan

if TYPE_CHECKING:
    import _edge

    from edge.tokenizer import Tokenizer

_NOT_MEASURED = (
    "lean leaves out more than it might: how fast this drive is was not measured (edge plan does it)"
)


@dataclass(frozen=True)
class Sized:
    """One budget, spent.

    Attributes:
        plan: where the weights live.
        options: what the core's engine is opened with, or resized to.
        reserved: what drafting takes beside the model.
        words: the model's tokenizer.
    """

    plan: Plan
    options: dict[str, Any]
    reserved: Reserved
    words: Tokenizer

    @property
    def draft(self) -> DraftModel | None:
        """The draft model, where there is room for it."""
        return self.reserved.draft

    def drafting(self, draft: _edge.Engine | None, *notes: str) -> Drafting:
        """What the engine drafts with; ``draft`` is the open core of :attr:`draft`."""
        own = self.draft.words() if self.draft is not None and draft is not None else None
        return Drafting(
            draft,
            self.reserved.medusa,
            bool(self.plan.stream_order),
            (*self.reserved.notes, *notes),
            self.draft is not None and self.draft.is_copy,
            None if own is None else (self.words, own),
        )


class Sizing:
    """One model on one host: turns budgets into plans. The context is that of the first one.

    Args:
        on_pack: called while a draft model is packed.
    """

    def __init__(self, host: Host, options: LoadOptions, on_pack: Progress | None = None) -> None:
        self.host = host
        self._options = options
        self._wanted = options.plan
        self._on_pack = on_pack
        self._draft: DraftModel | None = None

    def at(self, memory: int | str, kv: str | None = None) -> Sized:
        """Spends one budget.

        Args:
            kv: where keys and values go, whatever was asked for at first.

        Raises:
            BudgetError: it is below the floor.
        """
        reserved = place_host(
            self.host,
            replace(self._wanted, memory=memory, kv=kv or self._wanted.kv),
            None if self._options.draft is None else self._draft_beside,
        )
        # From now on; and what was held while the tokenizer was built is history.
        plan = reserved.plan
        self._wanted = replace(self._wanted, context=plan.context, threads=plan.threads)
        self.host = replace(self.host, peak_bytes=0)
        if self._draft is not None and reserved.draft is None:
            # What was left out must not be held either.
            self._draft = replace(self._draft, tokenizer=None)
        reserved = self._with_free_reads(reserved)
        return Sized(reserved.plan, self._engine_options(reserved), reserved, self.host.tokenizer)

    def _with_free_reads(self, reserved: Reserved) -> Reserved:
        """Where a predictor is lean: with the reads that cost no time, as far as the machine was measured."""
        if reserved.plan.neuron_mode != "lean":
            return reserved
        from flashload.lean import with_free_reads
        from flashload.probe import known

        machine = known(self.host.pack.path.parent, reserved.plan.threads)
        plan = with_free_reads(reserved.plan, self.host.directory, machine)
        notes = [] if machine is not None else [_NOT_MEASURED]
        return replace(reserved, plan=plan, notes=[*reserved.notes, *notes])

    def _draft_beside(self, plan: Plan) -> DraftModel:
        """The draft model, opened when first needed: later the files are closed."""
        if self._draft is None:
            self._draft = open_draft(self.host.pack, self.host.tokenizer, plan, self._options, self._on_pack)
        return self._draft

    def _engine_options(self, reserved: Reserved) -> dict[str, Any]:
        plan = reserved.plan
        return plan.engine_options(
            self.host.pack.path,
            self.host.directory.decoder,
            scratch=scratch_folder() if plan.kv_on_flash else "",
            io_engine=self._options.io,
            isa=self._options.isa,
            budget_bytes=plan.core_bytes + reserved.core_bytes,
        )
