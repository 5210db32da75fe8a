"""The benchmarks' own machinery: memory cgroups, accounting, peers, reports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

gguf = pytest.importorskip("gguf", reason="the benchmarks write GGUF files with the gguf package")

from bench import __main__ as menu  # noqa: E402
from bench import budget, cgroup, contest, decode, machine, peers, prefill, report, weights  # noqa: E402
from bench import open as opening  # noqa: E402
from bench.budget_figure import plot_speed_over_memory  # noqa: E402

MB = 1 << 20


# --- what a token reads


def test_weights_of_a_dense_model(tiny: Callable[..., Path]) -> None:
    found = weights.read_weights(tiny("tiny", "q8_0"))
    d, ff, kv = 256, 512, 128
    matrices = 2 * (2 * d * d + 2 * kv * d + 3 * d * ff) + 512 * d
    assert found.always_bytes == matrices * 34 // 32 + 5 * d * 4
    assert found.table_bytes == 512 * d * 34 // 32
    assert found.expert_bytes == 0 and found.vocab == 512 and found.token_bytes == found.always_bytes


def test_weights_of_an_moe_count_only_active_experts(tiny: Callable[..., Path]) -> None:
    found = weights.read_weights(tiny("tiny-moe", "q4_0"))
    assert found.expert_bytes == 2 * 3 * 4 * 256 * 256 * 18 // 32
    assert found.active_expert_bytes == found.expert_bytes // 2


def test_weights_of_a_tied_embedding_are_read_whole(tiny: Callable[..., Path]) -> None:
    found = weights.read_weights(tiny("tiny-opt", as_mpt=True))
    assert found.table_bytes == 0


def test_weights_of_another_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"something else")
    with pytest.raises(ValueError, match="GGUF file or a pack"):
        weights.read_weights(tmp_path / "x")


def test_pin_and_stream_arithmetic() -> None:
    dense = weights.Weights(1000, 900, 0, 0, 100, 10)
    assert dense.streamed_bytes(0) == 900
    assert dense.streamed_bytes(300) == 600
    assert dense.streamed_bytes(5000) == 0
    moe = weights.Weights(1000, 100, 800, 200, 100, 10)
    assert moe.streamed_bytes(50) == 50 + 200
    assert moe.streamed_bytes(500) == pytest.approx(
        100
    )  # half of the experts resident: half of the active miss
    assert moe.streamed_bytes(900) == 0
    assert budget.ceiling(dense, 300, drive_rate=60, memory_rate=1e9) == pytest.approx(0.1)
    assert budget.ceiling(dense, 900, drive_rate=60, memory_rate=1800) == pytest.approx(2.0)


# --- running commands


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def test_run_measured_reports_exit_output_and_time() -> None:
    done = cgroup.run_measured(python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"))
    assert (done.returncode, done.stdout, done.stderr, done.timed_out) == (3, "out\n", "err\n", False)
    assert done.seconds > 0 and done.max_rss_bytes > MB


def test_run_measured_stops_children_too_when_time_is_over() -> None:
    done = cgroup.run_measured(["/bin/sh", "-c", "sleep 600 & echo $!; wait"], timeout_seconds=2)
    assert done.timed_out and done.returncode == -signal.SIGKILL
    state = Path(f"/proc/{int(done.stdout)}/stat")

    def runs() -> bool:
        try:
            return state.read_text().split()[2] not in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return False

    for _ in range(1000):  # a killed process may take a moment to die
        if not runs():
            break
        time.sleep(0.01)
    assert not runs()


def test_run_measured_of_a_missing_program() -> None:
    with pytest.raises(FileNotFoundError):
        cgroup.run_measured(["/no/such/program"])


ALLOCATE = (
    "import sys; b = bytearray(int(sys.argv[1]) << 20); b[::4096] = b'x' * len(b[::4096]); print('alive')"
)


@pytest.mark.usefixtures("limited")
class TestInCgroup:
    def test_below_the_limit_survives(self) -> None:
        done = budget.run_in_cgroup(python(ALLOCATE, "20"), 96 * MB)
        assert (done.returncode, done.stdout, done.killed) == (0, "alive\n", False)
        assert 20 * MB <= done.peak_bytes <= done.limit_bytes == 96 * MB

    def test_above_the_limit_is_killed(self) -> None:
        done = budget.run_in_cgroup(python(ALLOCATE, "200"), 96 * MB)
        assert done.killed and done.returncode == -signal.SIGKILL and done.stdout == ""
        assert done.peak_bytes <= 96 * MB

    def test_page_cache_is_held_to_the_limit_without_a_kill(self, tmp_path: Path) -> None:
        file = tmp_path / "big"
        with open(file, "wb") as out:
            for _ in range(128):
                out.write(os.urandom(MB))
            os.fsync(out.fileno())
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        code = "import sys; f = open(sys.argv[1], 'rb'); print(sum(map(len, f)))"
        done = budget.run_in_cgroup(python(code, str(file)), 64 * MB)
        assert (done.returncode, done.killed, int(done.stdout)) == (0, False, 128 * MB)
        assert done.peak_bytes <= 64 * MB

    def test_an_ordinary_failure_is_not_called_a_kill(self) -> None:
        done = budget.run_in_cgroup(python("raise SystemExit(5)"), 96 * MB)
        assert (done.returncode, done.killed) == (5, False)

    def test_groups_are_removed_with_what_still_runs_in_them(self) -> None:
        with cgroup.make_group(64 * MB) as group:
            path = group.path
            enter = ["/bin/sh", "-c", 'echo $$ > "$0" && exec sleep 60', str(group.procs)]
            child = subprocess.Popen(enter)
            while str(child.pid) not in group.procs.read_text().split():
                assert child.poll() is None
        assert child.wait(timeout=10) == -signal.SIGKILL
        assert not path.exists()

    def test_a_failed_command_leaves_no_group(self) -> None:
        before = {
            p.name for parent, _ in cgroup._parents() for p in parent.glob(f"edge-bench-{os.getpid()}-*")
        }
        done = budget.run_in_cgroup(["/no/such/program"], 64 * MB)
        assert done.returncode == 127 and "such" in done.stderr
        after = {
            p.name for parent, _ in cgroup._parents() for p in parent.glob(f"edge-bench-{os.getpid()}-*")
        }
        assert after == before == set()


def test_v2_groups_get_the_files_that_v2_names(tmp_path: Path) -> None:
    (tmp_path / "cgroup.subtree_control").write_text("cpu")
    group = cgroup.MemoryGroup(tmp_path, 2, 5 * MB)
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory"
    assert (group.path / "memory.max").read_text() == str(5 * MB)
    assert (group.path / "memory.swap.max").read_text() == "0"
    (group.path / "memory.peak").write_text("77\n")
    (group.path / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    assert (group.peak_bytes(), group.oom_kills()) == (77, 2)


def test_without_permission_the_refusal_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cgroup, "_parents", lambda: [(tmp_path, 1)])
    monkeypatch.setattr(cgroup, "MemoryGroup", refuse)
    assert "Permission denied" in str(cgroup.cgroup_refusal())
    monkeypatch.setattr(cgroup, "_parents", list)
    with pytest.raises(cgroup.CgroupError, match="no memory cgroup is mounted"):
        budget.run_in_cgroup(["true"], 64 * MB)


def test_budget_command_ends_where_no_cgroup_is_allowed(
    monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(budget, "cgroup_refusal", lambda: "not permitted here")
    assert budget.main([str(tiny())]) == 3
    assert "not permitted here" in capsys.readouterr().err


# --- one run of one system


@pytest.fixture
def pretend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], peers.Run]:
    """Runs a child script of the test's own as a system."""

    def go(code: str, **request: Any) -> peers.Run:
        script = tmp_path / "child.py"
        script.write_text(code)
        monkeypatch.setitem(peers.SYSTEMS, "pretend", peers.System(str(script), "edge", {"extra": 1}))
        return peers.run("pretend", peers.Request(tmp_path, 2, 100, **request))

    return go


def test_a_run_gives_its_figures(pretend: Callable[..., peers.Run]) -> None:
    code = """
import json, sys
request = json.loads(sys.argv[1])
print('a library speaks')
print(json.dumps({"event": "loaded", "seconds": 0.5, "version": "9"}))
print(json.dumps({"event": "result", "decode_tokens_per_second": request["tokens"] + request["extra"]}))
"""
    run = pretend(code, tokens=6)
    assert run.failure is None and run.result is not None and run.loaded is not None
    assert run.result["decode_tokens_per_second"] == 7 and run.loaded["version"] == "9"
    assert peers.brief(run) == "7 tok/s"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.kill(os.getpid(), 11)", "died of SIGSEGV while loading"),
        ("raise SystemExit('no such thing')", "exit 1 while loading: no such thing"),
        (
            'print(\'{"event": "token", "n": 3}\', flush=True); import os; os.kill(os.getpid(), 6)',
            "died of SIGABRT after 3 tokens",
        ),
        (
            'print(\'{"event": "error", "message": "ValueError: bad\\\\nmore"}\'); raise SystemExit(1)',
            "ValueError: bad",
        ),
        (
            'print(\'{"event": "loaded"\', flush=True); raise SystemExit(2)',
            "exit 2 while loading: no message",
        ),
    ],
)
def test_failures_are_told_in_one_line(pretend: Callable[..., peers.Run], code: str, said: str) -> None:
    run = pretend(code)
    assert run.result is None and run.failure == said and peers.brief(run) == said


def test_a_run_over_its_time_is_a_failure(pretend: Callable[..., peers.Run]) -> None:
    run = pretend("import time; time.sleep(60)", timeout_seconds=0.5)
    assert run.failure is not None and run.failure.startswith("longer than") and run.outcome == "late"


@pytest.mark.usefixtures("limited")
def test_a_kill_for_memory_says_how_far_it_came(pretend: Callable[..., peers.Run]) -> None:
    code = 'print(\'{"event": "loaded", "seconds": 1}\', flush=True); b = b"x" * (300 << 20)'
    run = pretend(code, limit_bytes=96 * MB)
    assert run.failure == "killed for memory after loading"


def test_an_absent_peer_is_one_line(monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., Path]) -> None:
    monkeypatch.setenv("EDGE_PEER_PYTHON", "/no/such/python")
    present, missing = peers.entries(tiny(), ["llama.cpp"])
    assert not present and "/no/such/python does not run" in missing["llama.cpp"]
    assert "\n" not in missing["llama.cpp"]


def test_a_peer_needs_a_gguf_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "absent", lambda name: None)
    (tmp_path / "x.edge").write_bytes(b"EDGEPACK")
    _, missing = peers.entries(tmp_path / "x.edge", ["llama.cpp"])
    assert "--peer-model" in missing["llama.cpp"]


def test_every_child_of_a_system_exists() -> None:
    for system in peers.SYSTEMS.values():
        assert (peers.CHILDREN / system.child).is_file()


@pytest.mark.parametrize("command", [decode.main, budget.main])
@pytest.mark.parametrize(
    "arguments", [["/no/such/model.gguf"], [__file__, "--runs", "0"], [__file__, "--threads", "-1"]]
)
def test_bad_arguments_end_with_usage(command: Callable[[list[str]], int], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command(arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize("wrong", ["--budgets=x", "--budgets=-1", "--systems=nothing"])
def test_budget_refuses_wrong_lists(wrong: str) -> None:
    with pytest.raises(SystemExit):
        budget.main([__file__, wrong])


def test_agreement_is_the_common_beginning() -> None:
    assert decode.agreement([1, 2, 3], [1, 2, 4]) == 2
    assert decode.agreement([1, 2], [1, 2, 3]) == 2
    assert decode.agreement([5], [6]) == 0


# --- the machine


def test_facts_name_machine_commit_and_date() -> None:
    facts = machine.facts()
    assert (
        facts["cpus"] >= 1
        and facts["memory_bytes"] > 0
        and facts["commit"]
        and facts["date"].endswith("+00:00")
    )
    json.dumps(facts)


def test_bandwidth_and_drive_give_rates(tmp_path: Path) -> None:
    rates = machine.measure_bandwidth(2, n_bytes=4 * MB, passes=2)
    assert 0 < rates["median"] <= rates["best"]
    file = tmp_path / "f"
    file.write_bytes(os.urandom(5 * MB + 17))
    rate = machine.drive_rate(file, threads=3)
    assert rate["bytes"] == 5 * MB and rate["bytes_per_second"] > 0
    (tmp_path / "small").write_bytes(b"x")
    with pytest.raises(ValueError, match="smaller than one page"):
        machine.drive_rate(tmp_path / "small")


def test_a_file_just_written_is_cached(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(os.urandom(MB))
    assert file.read_bytes() and machine.cached_share(file) > 0.9


# --- reports


def test_spread() -> None:
    spread = report.Spread.of([3.0, 1.0, 2.0])
    assert spread == report.Spread(2.0, 1.0, 3.0, 3) and spread is not None
    assert spread.text() == "2.00 [1.00..3.00]"
    assert report.Spread.of([]) is None and report.spread_json([]) is None and report.spread_text(None) == "-"
    assert report.spread_text(report.spread_json([5e9]), 1e9) == "5.00"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.2571, "0.257"), (5.831, "5.83"), (17.04, "17.0"), (203.4, "203")]
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert report.figure(value) == text


def test_tables_show_brackets_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_table("[bold]t", ["a", "b"], [["[red]x", "1.0 [0.9..1.1]"]], ["note [/]"])
    out = capsys.readouterr().out
    assert all(text in out for text in ("[bold]t", "[red]x", "1.0 [0.9..1.1]", "note [/]"))


def point(system: str, limit: int, rate: float | None) -> dict[str, Any]:
    return {
        "system": system,
        "percent": limit / 10,
        "limit_bytes": limit,
        "runs": 2,
        "survived": 2 if rate else 0,
        "outcome": "survived" if rate else "killed for memory while loading",
        "tokens_per_second": report.spread_json([rate, rate * 1.1]) if rate else None,
        "read_bytes_per_token": None,
        "read_bytes": report.spread_json([7e9]),
        "peak_bytes": report.spread_json([1e9]),
        "drive_bytes_per_second": report.spread_json([2e9]),
        "foreign_cpus": report.spread_json([0.0]),
        "ceiling_tokens_per_second": 3.0,
        "cache_emptied_by": "drop_caches",
        "cached_share_before": 0.0,
    }


def document_of(points: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "machine": machine.facts(),
        "model": "m.gguf",
        "full_bytes": 1000,
        "threads": 2,
        "prompt_tokens": 8,
        "tokens": 8,
        "read_ahead_kib": 128,
        "points": points,
    }


def test_budget_report_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = [point("edge", 500, 2.0) | {"neuron_mode": "predictor"}, point("edge", 750, 3.0)]
    document = document_of([*points, point("llama.cpp", 500, None), point("llama.cpp-mmap", 750, 0.5)])
    budget.show(document)
    out = capsys.readouterr().out
    assert (
        "0/2" in out
        and "50 % = 0.00 GB, llama.cpp: killed for memory while loading" in out
        and "128 KiB" in out
    )
    saved = report.save("budget m/1", document, tmp_path)
    assert saved.parent == tmp_path and json.loads(saved.read_text())["full_bytes"] == 1000
    pytest.importorskip("matplotlib")
    picture = tmp_path / "p.png"
    plot_speed_over_memory(document, picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"


# --- the command


def test_the_menu_lists_what_can_be_run() -> None:
    names = menu.names()
    assert {"synth", "decode", "budget", "machine"} <= set(names) and "report" not in names
    assert all(names.values())


def test_an_unknown_benchmark_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench", "nothing"],
        cwd=machine.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and "nothing" in done.stderr and "decode" in done.stdout


@pytest.mark.slow
def test_decode_of_a_tiny_model(
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("_edge")
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    assert decode.main([str(tiny()), "--tokens", "4", "--prompt", "4", "--runs", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (system,) = document["systems"]
    assert (system["system"], system["survived"], len(system["generated"])) == ("edge", 2, 5)
    assert system["decode_tokens_per_second"]["median"] > 0 and document["read_bandwidth"]["median"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("limited")
def test_budget_of_a_tiny_model(
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("_edge")
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    # 4 MB of model under 1000 % = 40 MB: less than the interpreter needs, so edge has to say no or die.
    assert (
        budget.main([str(tiny(mix="f16")), "--budgets", "1000", "--systems", "edge", "--runs", "1", "--json"])
        == 1
    )
    (found,) = json.loads(capsys.readouterr().out)["points"]
    assert found["survived"] == 0 and found["outcome"] != "survived"


# --- comparisons


def test_competitors_compute_while_the_runs_last() -> None:
    before = machine.busy_seconds()
    with contest.competitors(1):
        while machine.busy_seconds() == before:
            time.sleep(0.01)


def test_who_competes_is_compared_with_its_own_single_thread() -> None:
    entry = peers.Entry(Path("x"), weights.Weights(1, 1, 0, 0, 0, 1))
    both = decode.with_one_thread(contest.contestants({"edge": entry, "naive": entry}, 2))
    assert [(one.label, one.threads) for one in both] == [
        ("edge", 2),
        ("edge, 1 thread", 1),
        ("naive", 2),
        ("naive, 1 thread", 1),
    ]
    alone = contest.contestants({"edge": entry}, 1)
    assert decode.with_one_thread(alone) == alone


def test_multiply_adds_leave_out_the_tables_and_the_output_matrix(tiny: Callable[..., Path]) -> None:
    d, ff, kv = 256, 512, 128
    assert weights.read_weights(tiny("tiny", "q8_0")).multiply_adds == 2 * (
        2 * d * d + 2 * kv * d + 3 * d * ff
    )
    tied = weights.read_weights(tiny("tiny-opt", as_mpt=True))
    assert tied.multiply_adds == 2 * (4 * d * d + 2 * d * ff)


def test_multiply_adds_of_an_moe_count_the_experts_of_a_token(tiny: Callable[..., Path]) -> None:
    found = weights.read_weights(tiny("tiny-moe", "q8_0"))
    assert found.multiply_adds < found.always_bytes + found.expert_bytes
    assert found.multiply_adds > 32 * found.active_expert_bytes // 34


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "figure"), [(prefill, "prefill_tokens_per_second"), (opening, "first_token_seconds")]
)
def test_prefill_and_open_of_a_tiny_model(
    command: Any,
    figure: str,
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("_edge")
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    assert command.main([str(tiny()), "--runs", "2", "--json"]) == 0
    (system,) = json.loads(capsys.readouterr().out)["systems"]
    assert system["survived"] == 2 and system[figure]["median"] > 0
