"""From a path or a shipped model's name to an engine: pack once, plan, load."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import _edge

from flashload.errors import ArgumentError, BudgetError, DiskError
from flashload.format import PackFile
from flashload.machine import (
    available_bytes,
    cgroup_limit_bytes,
    cpu_count,
    parse_bytes,
    peak_rss_bytes,
    rss_bytes,
    trim_memory,
)
from flashload.plan import Directory, Plan, directory_of, place
from flashload.plan_kv import KV, KV_TYPES, choose_kv, kv_type_of
from flashload.plan_neurons import LEAN_KEEP, Guess

if TYPE_CHECKING:
    from edge.draft import DraftModel, Reserved
    from edge.engine import Engine
    from edge.sizing import Sizing
    from edge.tokenizer import Tokenizer

_T = TypeVar("_T")
_BUILTIN = Path(__file__).parent / "builtin"
_DEFAULT_CONTEXT = 4096
_SMALLEST_DEFAULT_CONTEXT = 512
#: What the same process holds at the same point differs by this much from run to run.
_JITTER_BYTES = 2 << 20
_DEVICES = ("auto", "cpu")
#: Names of who may decide which neurons are active.
PREDICTOR: dict[str, Guess] = {"auto": True, "on": "on", "off": False, "lean": LEAN_KEEP}
SPARSITY = ("off", "on")
_PRESSURE = ("auto", "off")

Progress = Callable[[int, int], None]


def builtin_models() -> list[str]:
    """Names of the models that ship with edge."""
    return sorted(path.stem for path in _BUILTIN.glob("*.edge"))


def resolve_model(model: str | os.PathLike[str]) -> Path:
    """A shipped model's bare name, or a path.

    Raises:
        ArgumentError: neither.
    """
    if isinstance(model, str) and model in builtin_models():
        return _BUILTIN / f"{model}.edge"
    path = Path(model).expanduser()
    if not path.exists():
        names = ", ".join(builtin_models()) or "none"
        raise ArgumentError(
            f"model: expected a file, a folder or a shipped model ({names}), found {str(model)!r}"
        )
    return path


def open_pack(
    model: str | os.PathLike[str], *, weights: str = "keep", on_pack: Progress | None = None
) -> PackFile:
    """The pack behind a model; other files are packed once into the cache."""
    from flashload.cache import ensure_packed

    return PackFile(ensure_packed(resolve_model(model), weights=weights, progress=on_pack))


def default_memory_bytes() -> int:
    """Nine tenths of what the machine (or the cgroup) still has."""
    limit = cgroup_limit_bytes()
    room = available_bytes()
    return int(0.9 * (room if limit is None else min(room, limit - rss_bytes())))


def scratch_folder() -> Path:
    """Where the core's temporary files go: ``EDGE_SCRATCH``, or edge's cache folder, which is made.

    Raises:
        DiskError: the folder cannot be made.
    """
    from flashload.cache import cache_folder

    named = os.environ.get("EDGE_SCRATCH")
    folder = Path(named) if named else cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"scratch folder {folder}: cannot be made: {error.strerror}") from error
    return folder


def watched(work: Callable[[_edge.LoadProgress], _T], on_load: Progress | None) -> _T:
    """Reads weights in a thread of its own, so that this one sees Ctrl-C and can show how far it is."""
    progress = _edge.LoadProgress()
    results: list[_T] = []
    failed: list[BaseException] = []
    # An event, because an interrupted Thread.join() may take a running thread for a finished one (CPython 3.11).
    done = threading.Event()

    def read() -> None:
        try:
            results.append(work(progress))
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    threading.Thread(target=read, name="edge-load").start()
    try:
        while not done.wait(0.05):
            if on_load is not None and progress.total_bytes:
                on_load(progress.done_bytes, progress.total_bytes)
    except BaseException:
        progress.cancel()
        done.wait()
        raise
    if failed:
        raise failed[0]
    return results[0]


@dataclass(frozen=True)
class Host:
    """A pack open for loading, its tokenizer, and the memory this process holds for them.

    Attributes:
        directory: the pack's, ready to be planned.
        host_bytes: held now: by the whole process, or only what opening added.
        outside_bytes: held by the process for other things than edge.
        peak_bytes: the most held until now, counted likewise.
    """

    pack: PackFile
    directory: Directory
    tokenizer: Tokenizer
    host_bytes: int
    peak_bytes: int
    pack_seconds: float
    outside_bytes: int = 0

    def holding(self, pack: PackFile) -> Host:
        """The same process with another pack."""
        directory = directory_of(pack)
        if self.directory.thresholds_bytes:
            directory = directory.with_thresholds(self.directory.neurons.active_share)
        directory = directory.with_kv_type(kv_type_of(self.directory.decoder))
        return replace(self, pack=pack, directory=directory)

    def with_kv_type(self, kv_type: str) -> Host:
        """The same with keys and values held as one of :data:`flashload.plan_kv.KV_TYPES`.

        Raises:
            ArgumentError: it is none of them.
        """
        if kv_type not in KV_TYPES:
            raise ArgumentError(f"kv_type: expected one of {', '.join(KV_TYPES)}, found {kv_type!r}")
        return replace(self, directory=self.directory.with_kv_type(kv_type))

    def sparse(self) -> Host:
        """The same with the pack's thresholds in use.

        Raises:
            ArgumentError: the pack has none.
        """
        from flashload.sparsity import kept_share

        return replace(self, directory=self.directory.with_thresholds(kept_share(self.pack)))


@dataclass(frozen=True)
class DraftRequest:
    """The draft model asked for, and how it is packed when it has to be."""

    model: str | os.PathLike[str]
    weights: str
    on_pack: Progress | None


def prepare(
    model: str | os.PathLike[str],
    *,
    weights: str = "keep",
    whole_process: bool = False,
    on_pack: Progress | None = None,
) -> Host:
    """Everything that comes before the weights: packing when it is needed, the tokenizer, the modules of an engine."""
    before_bytes, peak_before_bytes = rss_bytes(), peak_rss_bytes()
    start = time.perf_counter()
    pack = open_pack(model, weights=weights, on_pack=on_pack)
    pack_seconds = time.perf_counter() - start
    try:
        import edge.engine  # noqa: F401  its modules belong to what the process holds
        from edge.tokenizer import Tokenizer

        tokenizer = Tokenizer(pack.vocab())
    except BaseException:
        pack.close()
        raise
    # Building a tokenizer takes several times what it holds in the end.
    trim_memory()
    host_bytes, peak_bytes = rss_bytes(), peak_rss_bytes()
    if not whole_process:
        host_bytes = max(0, host_bytes - before_bytes)
        # An older peak of the process is not edge's.
        peak_bytes = peak_bytes - before_bytes if peak_bytes > peak_before_bytes else 0
    outside_bytes = 0 if whole_process else before_bytes
    return Host(pack, directory_of(pack), tokenizer, host_bytes, peak_bytes, pack_seconds, outside_bytes)


def plan_host(
    host: Host,
    *,
    memory: int | str | None = None,
    context: int | None = None,
    threads: int | None = None,
    kv: str = "auto",
    predictor: Guess = True,
) -> Plan:
    """Places the weights; see :func:`edge.plan`."""
    # What is free now comes on top of what opening the model took already.
    memory_bytes = default_memory_bytes() + host.host_bytes if memory is None else parse_bytes(memory)
    n_threads = cpu_count() if threads is None else threads
    if isinstance(n_threads, bool) or not isinstance(n_threads, int) or not 1 <= n_threads <= 1024:
        raise ArgumentError(f"threads: expected 1..1024, found {threads!r}")
    if kv not in KV:
        raise ArgumentError(f"kv: expected one of {', '.join(KV)}, found {kv!r}")

    def fit(n_context: int, host_bytes: int, host_peak_bytes: int) -> Plan:
        return choose_kv(
            kv,
            lambda where: place(
                host.directory,
                memory_bytes=memory_bytes,
                context=n_context,
                threads=n_threads,
                host_bytes=host_bytes,
                host_peak_bytes=host_peak_bytes,
                predictor=predictor,
                kv=where,
            ),
        )

    def plan(n_context: int) -> Plan:
        try:
            return fit(n_context, host.host_bytes, host.peak_bytes + _JITTER_BYTES)
        except BudgetError as refusal:
            missing_bytes = refusal.floor_bytes - memory_bytes
            if missing_bytes > min(_JITTER_BYTES, host.host_bytes):
                raise
            # The floor that one run names is enough for the next; the plan's margin covers the difference.
            return fit(n_context, host.host_bytes - missing_bytes, host.peak_bytes)

    longest = host.directory.decoder["max_positions"]
    if context is not None:
        if isinstance(context, bool) or not isinstance(context, int) or not 1 <= context <= 1 << 24:
            raise ArgumentError(f"context: expected 1..{1 << 24} tokens, found {context!r}")
        return plan(context)
    # Nobody asked for a length: take the longest usual one that fits memory whole, else the shortest usual.
    n_context = min(longest, _DEFAULT_CONTEXT)
    while True:
        shorter = n_context // 2
        try:
            chosen = plan(n_context)
        except BudgetError:
            if shorter < _SMALLEST_DEFAULT_CONTEXT:
                raise
        else:
            in_memory = chosen.placement == "resident" and chosen.kv_on_flash is None
            if in_memory or shorter < _SMALLEST_DEFAULT_CONTEXT:
                return chosen
        n_context = shorter


def place_host(
    host: Host,
    *,
    memory: int | str | None = None,
    context: int | None = None,
    threads: int | None = None,
    kv: str = "auto",
    predictor: Guess = True,
    draft: Callable[[Plan], DraftModel] | None = None,
) -> Reserved:
    """The whole budget shared out, as :func:`load` does it: the model, then what speculation takes.

    Args:
        draft: opens the draft model for a plan of the model alone.

    Raises:
        BudgetError: the budget is below the floor.
    """
    from edge.draft import reserve

    memory_bytes = default_memory_bytes() + host.host_bytes if memory is None else parse_bytes(memory)
    plan = plan_host(host, memory=memory_bytes, context=context, threads=threads, kv=kv, predictor=predictor)
    # A draft model is not worth a context that no longer fits memory.
    kv_beside = "memory" if plan.kv_on_flash is None else kv

    def replan(grown: Host, n_context: int) -> Plan:
        return plan_host(
            grown, memory=memory_bytes, context=n_context, threads=threads, kv=kv_beside, predictor=predictor
        )

    return reserve(host, plan, replan, None if draft is None else draft(plan))


def guess_of(predictor: str | float) -> Guess:
    """What a plan makes of the argument ``predictor`` of :func:`load`.

    Raises:
        ArgumentError: neither a name nor a share between 0 and 1.
    """
    if isinstance(predictor, str) and predictor in PREDICTOR:
        return PREDICTOR[predictor]
    if isinstance(predictor, float) and 0 < predictor < 1:
        return predictor
    names = ", ".join(PREDICTOR)
    raise ArgumentError(
        f"predictor: expected one of {names}, or a share between 0 and 1, found {predictor!r}"
    )


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
            energy, or a share given as a number. That is faster, and the text then depends on what memory holds, so on
            the budget and on the texts before.
        draft: a smaller model of the same vocabulary whose guesses speculation verifies; held in memory inside the
            same budget, or left out with a note (``Engine.notes``) where it does not fit. "self" takes a copy of the
            model itself at 4 bits, made once and kept in the cache folder, where its guesses save more than its
            memory costs: for weights of 8 bits and more that come from the drive.
        sparsity: "on" leaves out the neurons that the thresholds of the pack say count little (``edge sparsify`` makes
            them and says what they cost), unless memory is so short that more would have to be read from the drive,
            which ``Engine.notes`` says; "off" computes them all.
        pressure: "auto" looks, between tokens, at the memory that the machine and the process's cgroup have left, and
            gives some back for as long as others need it (:mod:`edge.pressure`); "off" keeps to the budget.
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
    if backend != "edge":
        given = (memory, device, weights, isa, io, kv, kv_type, predictor, sparsity, exact, draft, pressure)
        return _load_peer(model, backend, context, threads, given)
    if device not in _DEVICES:
        raise ArgumentError(f"device: expected one of {', '.join(_DEVICES)}, found {device!r}")
    if sparsity not in SPARSITY:
        raise ArgumentError(f"sparsity: expected one of {', '.join(SPARSITY)}, found {sparsity!r}")
    if pressure not in _PRESSURE:
        raise ArgumentError(f"pressure: expected one of {', '.join(_PRESSURE)}, found {pressure!r}")
    guess = guess_of(predictor)
    if exact:
        guess = False
    sparse = sparsity == "on" and not exact
    start = time.perf_counter()
    host = prepare(model, weights=weights, whole_process=whole_process, on_pack=on_pack)
    try:
        from edge.sizing import Sizing

        host = host.with_kv_type(kv_type)
        if sparse:
            host = host.sparse()
        drafts = None if draft is None else DraftRequest(draft, weights, on_pack)
        sizing = Sizing(host, context, threads, isa, io, kv, guess, drafts)
        return _load(sizing, start, memory, pressure == "auto", on_load)
    finally:
        host.pack.close()


_OF_EDGE_ALONE: dict[str, object] = {
    "memory": None,
    "device": "auto",
    "weights": "keep",
    "isa": "",
    "io": "auto",
    "kv": "auto",
    "kv_type": "f16",
    "predictor": "auto",
    "sparsity": "off",
    "exact": False,
    "draft": None,
    "pressure": "auto",
}


def _load_peer(
    model: str | os.PathLike[str],
    backend: str,
    context: int | None,
    threads: int | None,
    given: tuple[object, ...],
) -> Engine:
    from edge.backends import load_peer

    for (name, usual), value in zip(_OF_EDGE_ALONE.items(), given, strict=True):
        if value != usual:
            raise ArgumentError(f"{name}: only edge's own engine takes it; leave it out with {backend}")
    # Callers see one type; what a peer lacks it does not have.
    return cast("Engine", load_peer(model, backend, context=context, threads=threads))


def load_to_study(
    pack: Path, *, memory: int | str | None, threads: int | None, context: int, whole_process: bool
) -> Engine:
    """An engine that computes every neuron of a pack, and has room for thresholds that its core may be given."""
    start = time.perf_counter()
    host = prepare(pack, whole_process=whole_process)
    try:
        from edge.sizing import Sizing

        host = replace(host, directory=host.directory.with_thresholds(1.0))
        sizing = Sizing(host, context, threads, "", "auto", "auto", False, None)
        return _load(sizing, start, memory, False, None)
    finally:
        host.pack.close()


def _load(
    sizing: Sizing,
    start: float,
    memory: int | str | None,
    pressure: bool,
    on_load: Progress | None,
) -> Engine:
    from edge.draft import open_draft_core
    from edge.engine import Engine
    from edge.live import LiveMemory
    from edge.pressure import Pressure
    from flashload.estimate_neurons import thresholds_pay
    from flashload.sparsity import read_thresholds

    host = sizing.host
    sized = sizing.at(default_memory_bytes() + host.host_bytes if memory is None else memory)
    core = watched(lambda progress: _edge.Engine(sized.options, progress), on_load)
    notes: list[str] = []
    thresholds = read_thresholds(host.pack) if host.directory.thresholds_bytes else None
    if thresholds is not None:
        if thresholds_pay(sized.plan, host.directory.entries, host.directory.neurons.active_share):
            core.set_neuron_thresholds(thresholds)
        else:
            notes.append("no neuron is left out: with this little memory, more would be read from the drive")
    draft = None if sized.draft is None else open_draft_core(sized.draft, core)
    watcher = Pressure(sized.plan.memory_bytes, host.outside_bytes) if pressure else None
    engine = Engine(
        core,
        sized.plan,
        host.tokenizer,
        host.pack.metadata,
        0.0,
        sized.drafting(draft, *notes),
        LiveMemory(sizing, sized, watcher),
    )
    engine.prepare()
    engine.load_seconds = time.perf_counter() - start - host.pack_seconds
    return engine
