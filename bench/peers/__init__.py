"""The systems that are timed, each in a process of its own, and how one run of one of them is asked for.

``edge`` and the naive baseline run in this interpreter; llama.cpp (through llama-cpp-python) in the one that
``EDGE_PEER_PYTHON`` names, torch in that of ``EDGE_TORCH_PYTHON``, this one by default. A system that is not installed
costs one line, never the rest of a comparison.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.cgroup import CgroupResult, Finished, run_in_cgroup, run_measured
from bench.machine import ROOT, busy_seconds
from bench.weights import Weights, read_weights

CHILDREN = Path(__file__).resolve().parent.parent / "children"


@dataclass(frozen=True)
class System:
    """How one contestant is started: child script, the package its interpreter must have, its own options.

    ``lossy`` ones may leave out what a predictor calls inactive: their text is not that of the whole model.
    """

    child: str
    package: str
    options: dict[str, Any] = field(default_factory=dict)
    says: str = ""
    lossy: bool = False


#: Tokens of context, and so of text, where a perplexity is asked for.
_TEXT_TOKENS = 512

#: Environment variables that name another interpreter than this one, by package.
_INTERPRETERS = {
    "llama_cpp": "EDGE_PEER_PYTHON",
    "onnxruntime": "EDGE_PEER_PYTHON",
    "torch": "EDGE_TORCH_PYTHON",
}

#: What an interpreter must be able to run, by package: a folder of that name is a package without contents.
_NEEDED = {
    "edge": "import edge; edge.load",
    "llama_cpp": "import llama_cpp; llama_cpp.llama_decode",
    "onnxruntime": "import numpy, onnx, onnxruntime; onnxruntime.InferenceSession",
    "torch": "import numpy, safetensors.torch, torch; torch.nn",
}

SYSTEMS = {
    "edge": System(
        "edge_decode.py",
        "edge",
        {"predictor": "auto"},
        "its own placement inside the limit; a sparse model's predictor may decide where memory is short",
        lossy=True,
    ),
    "edge-lean": System(
        "edge_decode.py",
        "edge",
        {"predictor": "lean"},
        "where memory is short, of what the predictor names only what counts most is read (edge-lean:0.9: as keeps "
        "that share of a layer's energy)",
        lossy=True,
    ),
    "edge-exact": System(
        "edge_decode.py", "edge", {"predictor": "off"}, "the same, and the text is that of the whole model"
    ),
    "edge-predictor": System(
        "edge_decode.py",
        "edge",
        {"predictor": "on"},
        "the same, and a sparse model's predictor decides however much memory there is",
        lossy=True,
    ),
    "llama.cpp": System(
        "llama_cpp_decode.py",
        "llama_cpp",
        {"load_mode": "mmap", "repack": True},
        "default: mmap, weights repacked into RAM",
    ),
    "llama.cpp-mmap": System(
        "llama_cpp_decode.py", "llama_cpp", {"load_mode": "mmap", "repack": False}, "mmap, repacking off"
    ),
    "llama.cpp-none": System(
        "llama_cpp_decode.py", "llama_cpp", {"load_mode": "none", "repack": True}, "no mmap"
    ),
    "llama.cpp-direct": System(
        "llama_cpp_decode.py", "llama_cpp", {"load_mode": "direct", "repack": True}, "O_DIRECT load"
    ),
    "naive": System(
        "naive_reload.py",
        "edge",
        says="baseline: every weight read again for each token, one after the other",
    ),
    "layer-streaming": System(
        "layer_streaming.py",
        "torch",
        says="as accelerate's disk offload and airllm do it: each layer loaded into torch, run and dropped",
    ),
}


def system_of(name: str) -> System:
    """One of :data:`SYSTEMS`; ``edge-lean:0.9`` is the lean one with another share.

    Raises:
        ValueError: there is none of that name.
    """
    base, _, share = name.partition(":")
    if share and base == "edge-lean":
        with contextlib.suppress(ValueError):
            keep = float(share)
            if 0 < keep < 1:
                return replace(SYSTEMS[base], options={"predictor": keep})
    elif name in SYSTEMS:
        return SYSTEMS[name]
    raise ValueError(
        f"{name!r} is not one of {', '.join(SYSTEMS)}, or edge-lean:SHARE with a share between 0 and 1"
    )


@dataclass(frozen=True)
class Request:
    """One run: a prompt of random ids (the same for every system and run), then greedy decoding.

    ``limit_bytes`` 0 means no memory limit; of ``text``, a file, edge gives the perplexity too.
    """

    model: Path
    threads: int
    vocab: int
    prompt_tokens: int = 64
    tokens: int = 64
    seed: int = 1
    limit_bytes: int = 0
    timeout_seconds: float = 1800.0
    text: Path | None = None

    @property
    def context(self) -> int:
        """Tokens that the run has room for."""
        return max(self.prompt_tokens + self.tokens + 16, _TEXT_TOKENS if self.text else 0)

    def json(self, options: dict[str, Any]) -> str:
        keys: dict[str, Any] = {
            "model": str(self.model.resolve()),
            "threads": self.threads,
            "vocab": self.vocab,
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.tokens,
            "seed": self.seed,
            "limit_bytes": self.limit_bytes,
            "context": self.context,
        }
        if self.text:
            keys["text"] = str(self.text.resolve())
        return json.dumps(keys | options)


@dataclass(frozen=True)
class Run:
    """What came of one run.

    Attributes:
        result: the child's figures (``decode_tokens_per_second``, ...); None when it did not reach the end.
        failure: why not, in one line; None when it did.
        outcome: "done", "refused" (edge said that the memory is too little), "killed", "late" (stopped when its time
            was over) or "failed".
        partial_tokens_per_second: of one that was late, as far as it came; None when it decoded nothing.
        foreign_cpus: CPUs that other processes kept busy meanwhile, on average.
    """

    system: str
    finished: Finished
    loaded: dict[str, Any] | None
    result: dict[str, Any] | None
    failure: str | None
    foreign_cpus: float
    outcome: str = "done"
    partial_tokens_per_second: float | None = None


def interpreter(system: System) -> str:
    return os.environ.get(_INTERPRETERS.get(system.package, ""), sys.executable)


def absent(name: str, system: System | None = None) -> str | None:
    """Why a system (one of :data:`SYSTEMS` unless given) cannot take part, in one line; None when it can."""
    system = system or system_of(name)
    python = interpreter(system)
    try:
        done = subprocess.run(
            [python, "-c", _NEEDED[system.package]],
            capture_output=True,
            text=True,
            env=environment(system),
            timeout=120,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{name}: {python} does not run ({error})"
    if done.returncode == 0:
        return None
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    variable = _INTERPRETERS.get(system.package)
    hint = f"; {variable} names an interpreter that has it" if variable else ""
    return f"{name}: not available to {python}: {last}{hint}"


def environment(system: System) -> dict[str, str]:
    env = dict(os.environ)
    if system.package == "edge":
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    else:
        env.pop("PYTHONPATH", None)
    return env


@dataclass(frozen=True)
class Entry:
    """The file a system runs, and what a token reads of it."""

    path: Path
    weights: Weights


_PACK = """import sys
from flashload.cache import ensure_packed
print(ensure_packed(sys.argv[1], weights=sys.argv[2]))"""


def _edge_entry(model: Path, pack_weights: str) -> Entry:
    """The pack of a model, made now if there is none yet; what is timed later is every load after that."""
    command = [sys.executable, "-c", _PACK, str(model), pack_weights]
    done = run_measured(command, env=environment(SYSTEMS["edge"]))
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or ["no message"])[-1])
    path = Path(done.stdout.splitlines()[-1])
    return Entry(path, read_weights(path))


def _peer_entry(model: Path) -> Entry:
    with open(model, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError("needs a GGUF file of the same shape; --peer-model names one")
    return Entry(model, read_weights(model))


def _folder_entry(model: Path, folder: Path | None) -> Entry:
    found = folder or model
    if not found.is_dir():
        raise ValueError("needs a Hugging Face folder of the same shape; --folder names one")
    return Entry(found, read_weights(found))


def entries(
    model: Path,
    systems: Iterable[str],
    peer_model: Path | None = None,
    pack_weights: str = "keep",
    folder: Path | None = None,
) -> tuple[dict[str, Entry], dict[str, str]]:
    """What each system runs, and why the others cannot take part (one line each).

    Args:
        model: a GGUF file, or for edge also a pack or a Hugging Face folder.
        peer_model: the GGUF file for the peers, where ``model`` is none.
        pack_weights: how edge packs a checkpoint (``weights`` of ``edge.load``).
        folder: the Hugging Face folder for layer streaming, where ``model`` is none.
    """
    present: dict[str, Entry] = {}
    missing: dict[str, str] = {}
    for name in systems:
        why = absent(name)
        if why is None:
            try:
                package = system_of(name).package
                if package == "edge":
                    present[name] = _edge_entry(model, pack_weights)
                elif package == "torch":
                    present[name] = _folder_entry(model, folder)
                else:
                    present[name] = _peer_entry(peer_model or model)
            except (ValueError, OSError) as error:
                why = f"{name}: {error}"
        if why is not None:
            missing[name] = why
            print(why, file=sys.stderr)
    return present, missing


def add_model_options(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """The model arguments that every benchmark of whole models shares."""
    parser.add_argument(
        "models" if several else "model",
        nargs="*" if several else None,
        type=Path,
        help="a GGUF file; for edge also a pack or a Hugging Face folder",
    )
    parser.add_argument("--peer-model", type=Path, help="the GGUF file for the peers, where MODEL is none")
    parser.add_argument(
        "--weights", default="keep", choices=("keep", "q8", "q4"), help="how edge packs MODEL"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with one line when a count is not positive or a model is not there."""
    for name in ("threads", "tokens", "prompt", "runs"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name}: expected at least 1, found {getattr(args, name)}")
    for path in filter(None, (*getattr(args, "models", ()), getattr(args, "model", None), args.peer_model)):
        if not path.exists():
            parser.error(f"{path}: no such file")


def _failure(done: Finished, events: list[dict[str, Any]]) -> str:
    stage = "while loading"
    for event in events:
        if event["event"] == "loaded":
            stage = "after loading"
        elif event["event"] == "token":
            stage = f"after {event['n']} tokens"
        elif event["event"] == "error":
            return str(event["message"]).partition("\n")[0]
    if isinstance(done, CgroupResult) and done.killed:
        return f"killed for memory {stage}"
    if done.timed_out:
        return f"longer than {done.seconds:.0f} s, stopped {stage}"
    if done.returncode < 0:
        return f"died of {signal.Signals(-done.returncode).name} {stage}"
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"exit {done.returncode} {stage}: {last}"


def _outcome(done: Finished, failure: str | None) -> str:
    if failure is None:
        return "done"
    if failure.startswith("BudgetError"):
        return "refused"
    if isinstance(done, CgroupResult) and done.killed:
        return "killed"
    return "late" if done.timed_out else "failed"


def _partial_rate(events: list[dict[str, Any]]) -> float | None:
    """Of the last token that was told with its time."""
    told = [event for event in events if event["event"] == "token" and event.get("seconds")]
    return told[-1]["n"] / told[-1]["seconds"] if told else None


def events_of(stdout: str) -> list[dict[str, Any]]:
    events = []
    for line in stdout.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # a library's own print, or a line cut off by a kill
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


def run(name: str, request: Request) -> Run:
    """Runs a system once. Its failure is a result, not an exception.

    Raises:
        CgroupError: a limit was asked for and cannot be set here.
    """
    system = system_of(name)
    command = [interpreter(system), str(CHILDREN / system.child), request.json(system.options)]
    env, before = environment(system), busy_seconds()
    done: Finished
    if request.limit_bytes:
        done = run_in_cgroup(command, request.limit_bytes, env=env, timeout_seconds=request.timeout_seconds)
    else:
        done = run_measured(command, env=env, timeout_seconds=request.timeout_seconds)
    foreign = max(0.0, busy_seconds() - before - done.cpu_seconds) / done.seconds
    events = events_of(done.stdout)
    found = {event["event"]: event for event in events}
    result = found.get("result") if done.returncode == 0 else None
    failure = None if result else _failure(done, events)
    outcome = _outcome(done, failure)
    return Run(
        system=name,
        finished=done,
        loaded=found.get("loaded"),
        result=result,
        failure=failure,
        foreign_cpus=foreign,
        outcome=outcome,
        partial_tokens_per_second=_partial_rate(events) if outcome == "late" else None,
    )


def brief(run: Run) -> str:
    """One run in a few words, for progress lines."""
    if run.result is None:
        return str(run.failure)
    return f"{run.result['decode_tokens_per_second']:.3g} tok/s"
