"""What one generated token must read of a model file: the denominator of every GB/s here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights by how often a token needs them.

    Attributes:
        file_bytes: of the whole file.
        always_bytes: read for every token (attention, norms, dense FFN, router, output matrix).
        expert_bytes: of all routed experts.
        active_expert_bytes: of the experts one token uses.
        table_bytes: of embedding tables, of which a token reads one row.
        vocab: tokens in the vocabulary.
        multiply_adds: of a prompt's token in all its matrices but the output matrix, which only the last token needs.
        extra_bytes: of gate copies, predictors and draft heads, which a run with memory for all does not load.
    """

    file_bytes: int
    always_bytes: int
    expert_bytes: int
    active_expert_bytes: int
    table_bytes: int
    vocab: int
    extra_bytes: int = 0
    multiply_adds: int = 0

    @property
    def model_bytes(self) -> int:
        """What memory limits are percent of: the file without what a plain run does not load."""
        return self.file_bytes - self.extra_bytes

    @property
    def token_bytes(self) -> int:
        return self.always_bytes + self.active_expert_bytes

    def streamed_bytes(self, budget_bytes: int) -> float:
        """Bytes per token that cannot be resident when weights may take ``budget_bytes``.

        The best any placement can do without sparsity: what every token needs is pinned first, experts share
        the rest, and each expert is as likely as another. Caches, activations and the process take nothing.
        """
        pinned = min(budget_bytes, self.always_bytes)
        share = 0.0
        if self.expert_bytes:
            share = min(1.0, (budget_bytes - pinned) / self.expert_bytes)
        return (self.always_bytes - pinned) + (1 - share) * self.active_expert_bytes


def read_weights(path: Path) -> Weights:
    """Accounts for every tensor of a GGUF file, a pack or a Hugging Face folder, from the headers alone.

    Raises:
        ValueError: a file of another kind, or a folder without safetensors.
    """
    if path.is_dir():
        return _from_folder(path)
    with open(path, "rb") as file:
        magic = file.read(8)
    if magic[:4] == b"GGUF":
        return _from_gguf(path)
    if magic == b"EDGEPACK":
        return _from_pack(path)
    raise ValueError(f"{path}: expected a GGUF file or a pack, found a file that begins with {magic!r}")


#: Matrices that a prompt's tokens do not multiply with, in GGUF and in packs.
_OUTER = {"token_embd.weight", "position_embd.weight", "output.weight"}
_OUTER |= {"embed.weight", "embed.position", "head.weight"}


def _from_gguf(path: Path) -> Weights:
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def number(key: str, default: int) -> int:
        field = reader.get_field(key)
        return default if field is None else int(field.contents())

    arch = str(reader.fields["general.architecture"].contents())
    n_experts = number(f"{arch}.expert_count", 0)
    used = number(f"{arch}.expert_used_count", 0)
    # A tied embedding is the output matrix too, and read whole.
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    rows = {"position_embd.weight"} | (set() if tied else {"token_embd.weight"})
    always = experts = tables = products = 0
    for tensor in reader.tensors:
        n_bytes = int(tensor.n_bytes)
        if tensor.name not in _OUTER and len(tensor.shape) > 1:
            n_values = int(tensor.n_elements)
            products += n_values * used // n_experts if "_exps." in tensor.name else n_values
        if "_exps." in tensor.name:
            experts += n_bytes
        elif tensor.name in rows:
            tables += n_bytes
        else:
            always += n_bytes
    return Weights(
        file_bytes=path.stat().st_size,
        always_bytes=always,
        expert_bytes=experts,
        active_expert_bytes=experts * used // n_experts if n_experts else 0,
        table_bytes=tables,
        vocab=len(reader.fields["tokenizer.ggml.tokens"].data),
        multiply_adds=products,
    )


def _from_pack(path: Path) -> Weights:
    from flashload.format import PackFile
    from flashload.plan_neurons import is_extra
    from quant.formats import WeightFormat

    with PackFile(path) as pack:
        config = pack.config
        tied = "head.weight" not in pack.entries
        rows = {"embed.position"} | (set() if tied else {"embed.weight"})
        n_experts = config.n_experts
        always = experts = tables = extra = products = 0
        for name, entry in pack.entries.items():
            if entry.format == WeightFormat.BYTES:
                continue
            n_values = 0 if name in _OUTER or entry.rows < 2 or is_extra(name) else entry.rows * entry.cols
            products += n_values * config.experts_per_token // n_experts if entry.expert >= 0 else n_values
            if is_extra(name) or name.endswith(".neurons.gates"):
                extra += entry.stored_bytes
            elif entry.expert >= 0:
                experts += entry.bytes
            elif name in rows:
                tables += entry.bytes
            else:
                always += entry.bytes
    return Weights(
        file_bytes=path.stat().st_size,
        always_bytes=always,
        expert_bytes=experts,
        active_expert_bytes=experts * config.experts_per_token // n_experts if n_experts else 0,
        table_bytes=tables,
        vocab=config.vocab_size,
        extra_bytes=extra,
        multiply_adds=products,
    )


def _from_folder(folder: Path) -> Weights:
    """A dense model's folder: vectors are small enough to leave out."""
    config = json.loads((folder / "config.json").read_text())
    always = tables = total = 0
    for path in sorted(folder.glob("*.safetensors")):
        if path.name.startswith("edge_"):
            continue
        total += path.stat().st_size
        with open(path, "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        names = {name for name in header if name != "__metadata__" and len(header[name]["shape"]) == 2}
        untied = any("lm_head" in name for name in names)
        for name in names:
            begin, end = header[name]["data_offsets"]
            if "position" in name or (untied and "embed" in name):
                tables += end - begin
            else:
                always += end - begin
    if not total:
        raise ValueError(f"{folder}: expected safetensors files, found none")
    return Weights(total, always, 0, 0, tables, int(config["vocab_size"]))
