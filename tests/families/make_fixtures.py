"""Writes tests/families/data: `python -m tests.families.make_fixtures`. Needs torch and transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.families.cases import CASES, EXPECTED, N_POSITIONS, SMALL
from tests.hf_models import make

DATA = Path(__file__).parent / "data"


def main() -> None:
    for seed, (case, (family, overrides)) in enumerate(CASES.items()):
        path = DATA / case
        path.mkdir(parents=True, exist_ok=True)
        values = SMALL | ({"intermediate_size": 64} if family != "opt" else {"ffn_dim": 64}) | overrides
        model = make(path, family, seed=seed, dtype="float16", **values)
        tokens = np.random.default_rng(seed).integers(3, values["vocab_size"], N_POSITIONS)
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
        np.savez_compressed(path / EXPECTED, tokens=tokens, logits=logits.astype(np.float32))
        print(
            f"{case}: {sum(p.numel() for p in model.parameters())} parameters, |logit| <= {np.abs(logits).max():.2f}"
        )


if __name__ == "__main__":
    main()
