"""The directory a pack has or would have, from headers alone: what a plan needs of a model that is not packed yet.

A model may be a pack, a GGUF file, a Hugging Face folder, or such a folder before its weights have arrived:
``config.json`` and ``model.safetensors.index.json`` say every name, the configuration every shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flashload.arch import DecoderConfig, Family, Keys, family_of_hf
from flashload.bind import Bound, Slot, bind, slots_of
from flashload.checkpoint import Checkpoint, open_checkpoint
from flashload.errors import ArgumentError, ModelFileError, UnsupportedModelError
from flashload.extras import Extras
from flashload.format import PackFile, is_pack
from flashload.ggml import BF16, F16, F32
from flashload.pack import WEIGHTS, _extra_steps, _plan, choose_format
from flashload.pack_layout import HEADER_BYTES, MAX_ENTRIES, Entry, chunk_bytes_for, payload_bytes
from flashload.pack_neurons import neuron_format, neuron_layers
from flashload.plan_neurons import is_extra
from flashload.tensors import TensorInfo, read_json, tensor_bytes
from quant.formats import TILE_FORMATS, WeightFormat
from quant.formats.neuron import NEURON_FORMATS

_INDEX, _SINGLE, _CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
_DTYPES = {"float32": F32, "float16": F16, "bfloat16": BF16}
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt*", "*.gguf")
_HALVES = ("[0/2]", "[1/2]")


@dataclass(frozen=True)
class VirtualPack:
    """What a plan reads of a :class:`flashload.format.PackFile`, without the file."""

    path: Path
    config: DecoderConfig
    entries: dict[str, Entry]
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outline:
    """A model as the plan and the cost model see it.

    Attributes:
        kind: "pack", "gguf", "hf", or "config" (no weights at hand, shapes from the configuration).
        packs: per ``--weights`` option, the pack the model is or would become.
        largest_file: the largest file of weights, for timing the drive; None without one.
        vocab_bytes: (held, at most while it is built) by a tokenizer of this size; a pack tells them better.
        notes: what was assumed.
    """

    path: Path
    kind: str
    packs: dict[str, VirtualPack]
    largest_file: Path | None
    vocab_bytes: tuple[int, int]
    notes: list[str] = field(default_factory=list)

    @property
    def config(self) -> DecoderConfig:
        return self.packs["keep"].config


def outline(path: str | Path) -> Outline:
    """Reads headers; no byte of a weight is touched.

    Raises:
        ModelFileError: the file is malformed or incomplete.
        UnsupportedModelError: an architecture, type or option edge does not run.
        ArgumentError: ``path`` does not exist.
        DiskError: the drive fails.
    """
    path = Path(path)
    if path.name in (_CONFIG, _INDEX) and path.is_file():
        path = path.parent
    if not path.exists():
        raise ArgumentError(f"{path}: no such file or folder")
    if is_pack(path):
        return _of_pack(path)
    missing = path.is_dir() and _lacks_weights(path)
    checkpoint = ConfigCheckpoint(path) if missing else open_checkpoint(path)
    with checkpoint, Extras(path) as extras:
        bound = bind(checkpoint)
        packs = {
            option: VirtualPack(path, bound.config, _entries(_planned(checkpoint, bound, extras, option)))
            for option in WEIGHTS
        }
        files = sorted(checkpoint.files, key=lambda file: file.stat().st_size)
        notes = list(checkpoint.notes) if isinstance(checkpoint, ConfigCheckpoint) else []
        kind = "config" if missing else checkpoint.kind
        vocab_bytes = _vocab_bytes(bound.config.vocab_size, checkpoint.metadata.get("tokenizer.ggml.model"))
        return Outline(path, kind, packs, files[-1] if files else None, vocab_bytes, notes)


def _planned(
    checkpoint: Checkpoint, bound: Bound, extras: Extras, weights: str
) -> list[tuple[Slot, WeightFormat, int]]:
    """The entries the packer would write, in order and without blobs: slot, format, rows to a record of neurons."""
    layers = neuron_layers(bound, weights, "auto", extras.has_predictor, {})
    steps = _plan(checkpoint, bound, weights, layers) + _extra_steps(extras, bound.config, layers)[0]
    return [(step.slot, step.format, step.neuron_parts) for step in steps]


def _of_pack(path: Path) -> Outline:
    with PackFile(path) as pack:
        packs = {"keep": VirtualPack(path, pack.config, pack.entries, pack.metadata)}
        for option in WEIGHTS[1:]:
            packs[option] = VirtualPack(path, pack.config, _converted(pack.entries, option), pack.metadata)
        return Outline(path, "pack", packs, path, _vocab_bytes(pack.config.vocab_size, None))


def _converted(entries: Mapping[str, Entry], option: str) -> dict[str, Entry]:
    """The entries there would be, were the pack's own formats packed again."""
    out: dict[str, Entry] = {}
    for name, entry in entries.items():
        traits = TILE_FORMATS.get(entry.format) or NEURON_FORMATS.get(entry.format)
        code, parts = entry.format, 1
        if entry.format in NEURON_FORMATS and traits is not None:
            code, parts = neuron_format([traits.ggml_type], option), entry.neuron_parts
        elif traits is not None and not is_extra(name):
            code = choose_format(name, traits.ggml_type, entry.cols, option)
        if code is entry.format:
            out[name] = entry
            continue
        n_bytes = payload_bytes(code, entry.rows, entry.cols, parts)
        chunk = _chunk_bytes(name, code, entry.rows, n_bytes)
        out[name] = replace(entry, format=code, bytes=n_bytes, chunk_bytes=chunk)
    return out


def _chunk_bytes(name: str, code: WeightFormat, rows: int, n_bytes: int) -> int:
    return n_bytes // rows if code in NEURON_FORMATS else chunk_bytes_for(name, n_bytes)


def _entries(slots: Iterable[tuple[Slot, WeightFormat, int]]) -> dict[str, Entry]:
    out: dict[str, Entry] = {}
    end, n_chunks = HEADER_BYTES, 0
    for slot, code, parts in slots:
        n_bytes = payload_bytes(code, slot.rows, slot.cols, parts)
        chunk = _chunk_bytes(slot.name, code, slot.rows, n_bytes)
        entry = Entry(
            slot.name, code, slot.rows, slot.cols, end, n_bytes, chunk, n_chunks, slot.layer, slot.expert
        )
        out[slot.name] = entry
        end += entry.stored_bytes
        n_chunks += entry.n_chunks
    return out


def _vocab_bytes(size: int, gguf_model: object) -> tuple[int, int]:
    """Measured on vocabularies of 512 to 151,936 words, within 4 MB (held) and a tenth (while it is built).

    A SentencePiece vocabulary is built from merges that are longer than those of byte-level BPE.
    """
    build = 1000 if gguf_model == "gpt2" else 1800
    held = 2_400_000 + 430 * size
    return held, max(held, 2_400_000 + build * size)


def _lacks_weights(folder: Path) -> bool:
    """Whether files of weights that the folder's index names, or that it should have, are not there."""
    if not (folder / _CONFIG).is_file():
        return False
    if (folder / _INDEX).is_file():
        places = read_json(folder / _INDEX).get("weight_map")
        shards = places.values() if isinstance(places, dict) else ()
        return any(isinstance(s, str) and not (folder / Path(s).name).is_file() for s in shards)
    return not any(file for kind in _WEIGHT_FILES for file in folder.glob(kind))


class ConfigCheckpoint(Checkpoint):
    """A folder whose weights are not there: names from its index, shapes from its configuration.

    Nothing can be read from it; :func:`flashload.bind.bind` takes it like any other checkpoint. Without an index
    the names are those the architecture requires.
    """

    kind = "hf"

    def __init__(self, path: Path) -> None:
        """Raises ModelFileError or UnsupportedModelError as opening the complete folder would."""
        super().__init__()
        self.path = path
        self.notes: list[str] = []
        config = read_json(path / _CONFIG)
        if config.get("quantization_config") is not None:
            raise UnsupportedModelError(
                f"{path / _CONFIG}: quantization_config: expected F32, F16 or BF16 weights, found a quantised model"
            )
        self.metadata = {"config": config, "generation_config": {}}
        keys = Keys(str(path / _CONFIG), config)
        family = family_of_hf(keys)
        decoder = family.from_hf(keys)
        names, total_bytes = self._index()
        shapes = _shapes(decoder, family, names)
        kind = self._dtype(config, shapes, total_bytes)
        self.tensors = {
            name: TensorInfo(
                name, kind, kind_name(kind), shape, 0, tensor_bytes(name, kind, shape), path / _SINGLE
            )
            for name, shape in shapes.items()
        }

    def _index(self) -> tuple[set[str] | None, int]:
        """Names of all tensors (None: nobody says) and the bytes they take (0: nobody says)."""
        file = self.path / _INDEX
        if not file.is_file():
            self.notes.append("no index: the weights are taken to be those the architecture requires")
            return None, 0
        index = read_json(file)
        places, about = index.get("weight_map"), index.get("metadata")
        if not isinstance(places, dict) or not places:
            raise ModelFileError(f"{file}: weight_map: expected an object, found {type(places).__name__}")
        total = about.get("total_size") if isinstance(about, dict) else None
        return set(places), total if type(total) is int and total > 0 else 0

    def _dtype(self, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], total_bytes: int) -> int:
        """What the configuration says, unless the index's total says otherwise."""
        said = config.get("dtype") or config.get("torch_dtype")
        kind = _DTYPES.get(said.removeprefix("torch.")) if isinstance(said, str) else None
        values = sum(_product(shape) for shape in shapes.values())
        value_bytes = round(total_bytes / values) if values else 0
        if value_bytes == 4:
            return F32
        if kind is None or (value_bytes == 2 and kind == F32):
            self.notes.append("the weights are taken to be BF16")
            return BF16
        return kind

    def describe(self) -> str:
        return "config"


def kind_name(kind: int) -> str:
    """The name safetensors gives a float type."""
    return {F32: "F32", F16: "F16", BF16: "BF16"}[kind]


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for size in shape:
        out *= size
    return out


def _shapes(config: DecoderConfig, family: Family, names: set[str] | None) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> the shape the architecture expects there, for all of ``names`` it has a place for."""
    shapes: dict[str, tuple[int, ...]] = {}
    # A layer may be dense or a mixture; which one, its names tell.
    kinds = (False, True) if config.n_experts and config.intermediate_size else (config.n_experts > 0,)
    for sparse in kinds:
        for count, slot in enumerate(slots_of(config, [sparse] * config.n_layers)):
            if count > MAX_ENTRIES:
                raise UnsupportedModelError(f"expected at most {MAX_ENTRIES} weights, found more")
            templates = family.hf_names.get(slot.key, ())
            if slot.key == "embed.weight" and config.tied_head:
                templates = (*templates, *family.hf_names.get("head.weight", ()))
            if names is None:
                templates = templates[:1] if slot.required or slot.key in family.required else ()
            for template in templates:
                name, shape = _place(template, slot, config)
                if names is None or name in names:
                    shapes.setdefault(name, shape)
    return shapes


def _place(template: str, slot: Slot, config: DecoderConfig) -> tuple[str, tuple[int, ...]]:
    half = template.endswith(_HALVES)
    name = template[:-5] if half else template
    stacked = slot.expert >= 0 and "{e}" not in name
    shape: tuple[int, ...] = (slot.rows * (2 if half else 1), slot.cols) if slot.is_matrix else (slot.cols,)
    if stacked:
        shape = (config.n_experts, *shape)
    return name.replace("{i}", str(slot.layer)).replace("{e}", str(slot.expert)), shape
