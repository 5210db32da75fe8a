"""What a budget becomes: when an engine is loaded, and whenever its budget changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edge.draft import DraftModel, Reserved, open_draft
from edge.loading import DraftRequest, Host, place_host, scratch_folder
from edge.speculation import Drafting
from flashload.plan import Plan
from flashload.plan_neurons import Guess

if TYPE_CHECKING:
    import _edge


@dataclass(frozen=True)
class Sized:
    """One budget, spent.

    Attributes:
        plan: where the weights live.
        options: what the core's engine is opened with, or resized to.
        reserved: what drafting takes beside the model.
    """

    plan: Plan
    options: dict[str, Any]
    reserved: Reserved

    @property
    def draft(self) -> DraftModel | None:
        """The draft model, where there is room for it."""
        return self.reserved.draft

    def drafting(self, draft: _edge.Engine | None, *notes: str) -> Drafting:
        """What the engine drafts with; ``draft`` is the open core of :attr:`draft`."""
        return Drafting(
            draft,
            self.reserved.medusa,
            bool(self.plan.stream_order),
            (*self.reserved.notes, *notes),
            self.draft is not None and self.draft.is_copy,
        )


class Sizing:
    """One model on one host: turns budgets into plans. The context is that of the first one."""

    def __init__(
        self,
        host: Host,
        context: int | None,
        threads: int | None,
        isa: str,
        io: str,
        kv: str,
        predictor: Guess,
        drafts: DraftRequest | None,
    ) -> None:
        self.host = host
        self._context = context
        self._threads = threads
        self._isa = isa
        self._io = io
        self._kv = kv
        self._predictor = predictor
        self._drafts = drafts
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
            memory=memory,
            context=self._context,
            threads=self._threads,
            kv=kv or self._kv,
            predictor=self._predictor,
            draft=None if self._drafts is None else self._draft_beside,
        )
        # From now on; and what was held while the tokenizer was built is history.
        self._context, self._threads = reserved.plan.context, reserved.plan.threads
        self.host = replace(self.host, peak_bytes=0)
        return Sized(reserved.plan, self._options(reserved), reserved)

    def _draft_beside(self, plan: Plan) -> DraftModel:
        """The draft model, opened when first needed: later the files are closed."""
        assert self._drafts is not None
        if self._draft is None:
            self._draft = open_draft(
                self.host.pack,
                self._drafts.model,
                plan,
                weights=self._drafts.weights,
                io=self._io,
                isa=self._isa,
                on_pack=self._drafts.on_pack,
            )
        return self._draft

    def _options(self, reserved: Reserved) -> dict[str, Any]:
        plan = reserved.plan
        return plan.engine_options(
            self.host.pack.path,
            self.host.directory.decoder,
            scratch=scratch_folder() if plan.kv_on_flash else "",
            io_engine=self._io,
            isa=self._isa,
            budget_bytes=plan.core_bytes + reserved.core_bytes,
        )
