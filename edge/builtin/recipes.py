"""The built-in family: one entry per trained model, with every setting of its run."""

from __future__ import annotations

from dataclasses import dataclass, field

from edge.builtin.model import ModelConfig
from edge.builtin.objectives import SparsitySettings


@dataclass(frozen=True)
class Settings:
    """One training run; everything but the machine's speed follows from these."""

    model: ModelConfig = field(default_factory=ModelConfig)
    steps: int = 1500
    rows: int = 16  # sequences per step, each max_position_embeddings tokens
    seed: int = 1234
    dropout: float = 0.15
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.1
    warmup: float = 0.02  # shares of the run
    plateau: float = 0.35
    book_share: float = 0.5  # of the rows at the start, falling in a line to none...
    book_end: float = 0.6  # ...at this share of the run
    fork: float = 0.0  # share of the run at which fork.bin is saved for the model that starts from it
    start: str = ""  # model whose fork.bin this one starts from
    upcycle: str = ""  # dense model whose finished weights the experts are made of
    teacher: str = ""  # model this one is distilled from...
    teacher_from: float = 0.0  # ...from this share of the run on
    text_share: float = 0.1  # weight of the text's own next token beside the teacher's distribution
    own_share: float = 0.0  # of the rows, text that the teacher wrote itself
    sparsity: SparsitySettings | None = None
    eval_steps: int = 100
    save_seconds: float = 120.0


RECIPES: dict[str, Settings] = {
    # The dense twin: what `story` would be without its sparsity. Both share their first 35 %, and the twin teaches
    # `story` while its gates settle.
    "twin": Settings(fork=0.35),
    "story": Settings(
        model=ModelConfig(hidden_act="relu"),
        start="twin",
        sparsity=SparsitySettings(),
        teacher="twin",
        teacher_from=0.79,
        text_share=0.3,
    ),
    "draft": Settings(
        model=ModelConfig(
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=320,
        ),
        steps=700,
        dropout=0.0,
        book_share=0.0,
        teacher="story",
        own_share=0.5,
    ),
    "moe": Settings(
        model=ModelConfig(intermediate_size=192, num_local_experts=16, num_experts_per_tok=2),
        steps=400,
        upcycle="twin",
        book_share=0.0,
        muon_lr=0.01,
        adam_lr=1.5e-3,
    ),
}
