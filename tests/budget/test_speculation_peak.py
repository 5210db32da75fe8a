"""Draft models, heads and tables lie inside the budget: where it is short, speculation shrinks, not the budget."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edge.models import resolve_model
from tests.budget.conftest import Model

_CONTEXT, _TOKENS = 256, 60
_PROMPT = "Once upon a time there was a little dog. Once upon a time"
#: The first has the words of the model, the second others, so that its tokenizer counts too.
DRAFTS = ("story-draft", "tied")


def _drafted(one: Model, draft: object, memory: int, limit: int = 0) -> tuple[dict[str, object], set[str]]:
    """The answer inside a budget, and who guessed."""
    setting = ("--draft", draft, "--speculation", "auto")
    run = one.run(memory, _CONTEXT, prompt=_PROMPT, tokens=_TOKENS, limit=limit, options=setting)
    assert not run.killed and run.returncode == 0, run
    assert run.result["peak_memory_bytes"] <= memory
    return run.result, set(run.result["speculation"]["drafters"])


@pytest.mark.slow
@pytest.mark.usefixtures("cgroups")
@pytest.mark.parametrize("draft", DRAFTS)
def test_speculation_shrinks_and_the_budget_holds(draft: str, model: Callable[[str], Model]) -> None:
    one = Model("story", resolve_model("story"))
    named = draft if draft == "story-draft" else model(draft).pack
    plain = one.run("1GiB", _CONTEXT, prompt=_PROMPT, tokens=_TOKENS).result["tokens"]
    floor = one.run(1, _CONTEXT).floor_bytes
    drafters = []
    for more in (0, 2 << 20, 6 << 20, 64 << 20):
        result, found = _drafted(one, named, floor + more, limit=floor + more)
        assert result["tokens"] == plain
        drafters.append(found)
    assert "draft" not in drafters[0] and {"draft", "medusa", "lookup"} <= drafters[-1]
