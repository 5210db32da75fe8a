"""From a path or a shipped model's name to an engine: pack once, plan, load."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import _edge

from edge.host import Host, prepare
from edge.options import LoadOptions
from edge.watch import Progress, watched
from flashload.errors import ArgumentError

if TYPE_CHECKING:
    from edge.engine import Engine


def load(
    model: str | os.PathLike[str],
    *,
    memory: int | str | None = None,
    device: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    weights: str = "keep",
    isa: str = "",
    io: str = "auto",
    kv: str = "auto",
    kv_type: str = "f16",
    predictor: str | float = "auto",
    sparsity: str = "off",
    exact: bool = False,
    draft: str | os.PathLike[str] | None = None,
    pressure: str = "auto",
    prefix_disk: int | str | None = None,
    backend: str = "edge",
    whole_process: bool = False,
    on_pack: Progress | None = None,
    on_load: Progress | None = None,
) -> Engine:
    """Loads a model inside a memory budget.

    Args:
        model: a pack, a GGUF file, a Hugging Face folder, or the bare name of a shipped model.
        memory: ceiling as ``"2GiB"`` or bytes, for all that edge adds to this process; None takes most of what is free.
        device: "auto" or "cpu".
        threads: compute threads; None takes the cores this process may use.
        context: tokens of KV cache; None takes what the model was trained for, at most 4096, less if it crowds out
            the weights.
        weights: "keep", "q8" or "q4": how a checkpoint is packed, when it has to be.
        isa: force a kernel set (see ``edge doctor``); also the environment variable EDGE_ISA.
        io: "auto", "io_uring" or "pread".
        kv: "memory" holds the keys and values of the whole context; "flash" a part of them, and the rest in a nameless
            file in EDGE_SCRATCH (a folder on a drive; the cache folder when unset); "auto" takes what
            reads less from the drive for a token.
        kv_type: what keys and values are held as: "f16"; "int8" takes half the memory and is read faster, at a loss
            that is hardly measurable; "int4" takes little more than a quarter, rotated, the last tokens as f16. Where
            they are does not change the text.
        predictor: "auto" lets the predictor that came with a sparse model guess which neurons are active where memory
            is too short to know (a small loss); "on" lets it guess wherever memory is, "off" never. "lean" reads, of
            what it names and memory does not hold, only the neurons that count most: those that keep 95 % of a layer's
            energy, or a share given as a number, and those whose reads cost no time on this machine (as far as
            :func:`edge.plan` has measured it). That is faster, and the text then depends on what memory holds, so on
            the budget and on the texts before.
        draft: a smaller model whose guesses speculation verifies (as text, where its vocabulary is another); held in
            memory inside the same budget, or left out with a note (``Engine.notes``) where it does not fit. "self"
            takes a copy of the model itself at 4 bits, made once and kept in the cache folder, where its guesses save
            more than its memory costs: for weights of 8 bits and more that come from the drive.
        sparsity: "on" leaves out the neurons that the thresholds of the pack say count little (``edge sparsify`` makes
            them and says what they cost), unless memory is so short that more would have to be read from the drive,
            which ``Engine.notes`` says; "off" computes them all.
        pressure: "auto" looks, between tokens, at the memory that the machine and the process's cgroup have left, and
            gives some back for as long as others need it (:mod:`edge.pressure`); "off" keeps to the budget.
        prefix_disk: bytes (or a size) of files for keys and values of earlier requests that memory no longer has room
            for; a request that begins alike reads them where that is quicker than computing them, and its text is the
            same. They lie in a folder of their own, readable by their owner alone, in EDGE_SCRATCH (the cache folder
            when unset), and go with the engine. None writes nothing.
        backend: "edge", or another runtime that is installed, "llama.cpp", "onnxruntime" or "mlc": then an
            :class:`edge.backends.peer.Peer` comes back, which answers the same calls but keeps no budget; of all other
            parameters it takes ``context`` and ``threads`` alone.
        exact: nothing that changes the text, whatever it costs; the same as ``predictor="off", sparsity="off"``.
        whole_process: the ceiling bounds the whole process, as on the command line.
        on_pack: called with (bytes done, bytes) while a checkpoint is packed.
        on_load: called with (bytes done, bytes) while weights are read.

    Returns:
        Engine: use it as a context manager, or close it.

    Raises:
        BudgetError: the budget is too small; nothing was loaded.
        ModelFileError: the file is malformed, corrupt or not supported.
        ArgumentError: a parameter is out of range.
    """
    options = LoadOptions(
        memory=memory,
        device=device,
        threads=threads,
        context=context,
        weights=weights,
        isa=isa,
        io=io,
        kv=kv,
        kv_type=kv_type,
        predictor=predictor,
        sparsity=sparsity,
        exact=exact,
        draft=draft,
        pressure=pressure,
        prefix_disk=prefix_disk,
        backend=backend,
        whole_process=whole_process,
    )
    if backend != "edge":
        return _load_peer(model, options)
    options.check()
    start = time.perf_counter()
    host = prepare(model, weights=weights, whole_process=whole_process, on_pack=on_pack)
    try:
        host = host.with_kv_type(kv_type)
        if options.leaves_out_neurons:
            host = host.sparse()
        return _load(host, options, start, on_pack, on_load)
    finally:
        host.pack.close()


def _load_peer(model: str | os.PathLike[str], options: LoadOptions) -> Engine:
    from edge.backends import load_peer

    for name in options.of_edge_alone():
        raise ArgumentError(f"{name}: only edge's own engine takes it; leave it out with {options.backend}")
    peer = load_peer(model, options.backend, context=options.context, threads=options.threads)
    # Callers see one type; what a peer lacks it does not have.
    return cast("Engine", peer)


def load_to_study(
    pack: Path, *, memory: int | str | None, threads: int | None, context: int, whole_process: bool
) -> Engine:
    """An engine that computes every neuron of a pack, and has room for thresholds that its core may be given."""
    start = time.perf_counter()
    options = LoadOptions(memory=memory, threads=threads, context=context, predictor="off", pressure="off")
    host = prepare(pack, whole_process=whole_process)
    try:
        host = replace(host, directory=host.directory.with_thresholds(1.0))
        return _load(host, options, start, None, None)
    finally:
        host.pack.close()


def _load(
    host: Host, options: LoadOptions, start: float, on_pack: Progress | None, on_load: Progress | None
) -> Engine:
    from edge.draft import open_draft_core
    from edge.engine import Engine
    from edge.live import LiveMemory
    from edge.parked import parking
    from edge.prefixes import Prefixes
    from edge.pressure import Pressure
    from edge.sizing import Sizing
    from flashload.estimate_neurons import thresholds_pay
    from flashload.sparsity import read_thresholds

    sizing = Sizing(host, options, on_pack)
    sized = sizing.at(host.budget_bytes(options.memory))
    core = watched(lambda progress: _edge.Engine(sized.options, progress), on_load)
    notes: list[str] = []
    thresholds = read_thresholds(host.pack) if host.directory.thresholds_bytes else None
    if thresholds is not None:
        if thresholds_pay(sized.plan, host.directory.entries, host.directory.neurons.use.active_share):
            core.set_neuron_thresholds(thresholds)
        else:
            notes.append("no neuron is left out: with this little memory, more would be read from the drive")
    draft = None if sized.draft is None else open_draft_core(sized.draft, core)
    watcher = Pressure(sized.plan.memory_bytes, host.outside_bytes) if options.pressure == "auto" else None
    engine = Engine(
        core,
        sized.plan,
        host.tokenizer,
        host.pack.metadata,
        0.0,
        sized.drafting(draft, *notes),
        LiveMemory(sizing, sized, watcher),
        Prefixes(parking(options.prefix_disk)),
    )
    engine.prepare()
    engine.load_seconds = time.perf_counter() - start - host.pack_seconds
    return engine
