"""Memory that others need: read from simulated machines and cgroups, given back in steps, taken again with patience."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

import edge
from edge import host
from edge.errors import ArgumentError
from edge.live import describe
from edge.pressure import Pressure
from flashload.machine import cgroup_folders
from flashload.plan import Plan
from flashload.room import Room, RoomReader
from tests.tiny import tiny_llama_gguf

MIB = 1 << 20
MEMINFO = "MemTotal:       {total} kB\nMemFree:        1 kB\nMemAvailable:   {left} kB\n"
PSI = "some avg10={0} avg60=0.00 avg300=0.00 total=1\nfull avg10={0} avg60=0.00 avg300=0.00 total=1\n"
V1, V2 = "/sys/fs/cgroup/memory/a/b", "/sys/fs/cgroup/user/job"


def reader(**files: Any) -> RoomReader:
    texts = {path.replace("__", "/"): str(text) for path, text in files.items()}
    return RoomReader(texts.__getitem__)


def machine(left: int, total: int = 1000 * MIB) -> dict[str, str]:
    return {"/proc/meminfo": MEMINFO.format(total=total >> 10, left=left >> 10)}


def group_v2(limit: int | str, used: int, inactive: int = 0, active: int = 0, high: int | str = "max") -> Any:
    return {
        "/proc/self/cgroup": "0::/user/job\n",
        f"{V2}/memory.max": f"{limit}\n",
        f"{V2}/memory.high": f"{high}\n",
        f"{V2}/memory.current": f"{used}\n",
        f"{V2}/memory.stat": f"anon 5\nfile 7\ninactive_file {inactive}\nactive_file {active}\n",
    }


# -- what is left -----------------------------------------------------------------------------------------------------


def test_the_machine() -> None:
    assert reader(**machine(100 * MIB)).tightest() == Room(100 * MIB, 1000 * MIB, "machine")
    assert reader().tightest() is None
    stalled = reader(**machine(9 * MIB), **{"/proc/pressure/memory": PSI.format("12.50")}).tightest()
    assert stalled is not None and stalled.stalled


def test_a_group_of_version_2() -> None:
    files = machine(900 * MIB) | group_v2(300 * MIB, 250 * MIB, inactive=20 * MIB, active=10 * MIB)
    assert reader(**files).tightest() == Room(80 * MIB, 300 * MIB, V2)
    high = files | group_v2("max", 250 * MIB, high=280 * MIB)
    assert reader(**high).tightest() == Room(30 * MIB, 280 * MIB, V2)
    calm = high | {f"{V2}/memory.pressure": PSI.format("0.30")}
    assert not (reader(**calm).tightest() or Room(0, 0, "", True)).stalled
    # A limit that is nobody's, and files that are not there.
    assert reader(**files | group_v2("max", 250 * MIB)).tightest() == Room(900 * MIB, 1000 * MIB, "machine")
    assert reader(**machine(5 * MIB), **{"/proc/self/cgroup": "0::/gone\n"}).tightest() == Room(
        5 * MIB, 1000 * MIB, "machine"
    )


def test_groups_of_version_1_and_their_parents() -> None:
    files = machine(900 * MIB) | {
        "/proc/self/cgroup": "5:cpu:/x\n4:memory:/a/b\n",
        f"{V1}/memory.limit_in_bytes": 9223372036854771712,
        f"{V1}/memory.usage_in_bytes": 10 * MIB,
        "/sys/fs/cgroup/memory/a/memory.limit_in_bytes": 64 * MIB,
        "/sys/fs/cgroup/memory/a/memory.usage_in_bytes": 60 * MIB,
        "/sys/fs/cgroup/memory/a/memory.stat": f"inactive_file 1\ntotal_inactive_file {3 * MIB}\ntotal_active_file 0\n",
    }
    assert reader(**files).tightest() == Room(7 * MIB, 64 * MIB, "/sys/fs/cgroup/memory/a")
    folders = cgroup_folders(lambda path: str(files.get(path, "")))
    assert folders == [
        (Path(V1), 1),
        (Path("/sys/fs/cgroup/memory/a"), 1),
        (Path("/sys/fs/cgroup/memory"), 1),
    ]


def test_the_real_files() -> None:
    room = RoomReader().tightest()
    assert room is None or (0 < room.left_bytes <= room.limit_bytes and room.limit_bytes > 8 * MIB)


# -- what is done about it --------------------------------------------------------------------------------------------

PLAN = Plan(
    memory_bytes=1000 * MIB,
    context=64,
    threads=1,
    max_rows=8,
    placement="stream",
    host_bytes=100 * MIB,
    resident_bytes=810 * MIB,
    stream_bytes=0,
    ring_bytes=0,
    demand_bytes=0,
    kv_bytes=90 * MIB,
    activation_bytes=0,
    floor_bytes=300 * MIB,
    placements=[],
    stream_order=[],
)


@dataclass
class World:
    """A machine of 4000 MiB with other tenants, and an engine that has touched all of its plan but `untouched`."""

    others: int = 0
    untouched: int = 0
    plan: Plan = PLAN
    stalled: bool = False
    now: float = 0.0
    changes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pressure = Pressure(
            self.plan.memory_bytes, 7 * MIB, room=self, held=self.held, clock=lambda: self.now
        )  # type: ignore[arg-type]

    def held(self) -> int:
        return self.plan.predicted_peak_bytes - self.untouched + 7 * MIB

    def tightest(self) -> Room:
        mine = self.plan.predicted_peak_bytes - self.untouched
        return Room(4000 * MIB - self.others - mine, 4000 * MIB, "machine", self.stalled)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds * 50)):
            self.now += 0.02
            change = self.pressure.check(self.plan)
            if change is None:
                continue
            assert change.memory_bytes <= 1000 * MIB and change.reason
            self.changes.append(change.memory_bytes)
            used = max(change.memory_bytes, self.plan.floor_bytes)
            self.plan = replace(self.plan, memory_bytes=used, resident_bytes=used - 190 * MIB)


def test_enough_room_changes_nothing() -> None:
    world = World(others=2000 * MIB)
    world.run(3)
    world.others = 2870 * MIB  # 3 % of 4000 are 120
    world.run(20)
    assert world.changes == []


def test_shrinks_in_steps_and_grows_back() -> None:
    world = World(others=2000 * MIB)
    world.run(1)
    world.others = 3200 * MIB
    world.run(5)
    assert world.changes and world.changes == sorted(world.changes, reverse=True)
    assert len(world.changes) <= 3  # as much as is missing, not a little each time
    assert world.tightest().left_bytes >= 120 * MIB
    shrunk = len(world.changes)
    world.run(30)
    assert len(world.changes) == shrunk  # no swinging
    world.others = 2000 * MIB
    world.run(4)
    assert len(world.changes) == shrunk  # room has to last
    world.run(10)
    assert len(world.changes) == shrunk + 1 and world.plan.memory_bytes == 1000 * MIB
    world.run(20)
    assert len(world.changes) == shrunk + 1


def test_grows_as_far_as_there_is_room() -> None:
    world = World(others=2000 * MIB)
    world.run(1)
    world.others = 3500 * MIB
    world.run(5)
    low = world.plan.memory_bytes
    world.others = 3150 * MIB
    world.run(30)
    assert low < world.plan.memory_bytes < 1000 * MIB
    assert world.tightest().left_bytes >= 180 * MIB


def test_never_below_the_floor() -> None:
    world = World(others=2000 * MIB)
    world.run(1)
    world.others = 3990 * MIB
    world.run(30)
    assert world.plan.memory_bytes == 300 * MIB
    n_changes = len(world.changes)
    world.run(30)
    assert len(world.changes) == n_changes


def test_what_is_not_touched_yet_counts() -> None:
    world = World(others=2400 * MIB, untouched=500 * MIB)
    world.run(2)
    assert world.changes == []
    world.others = 2900 * MIB  # 600 are left, of which 500 are spoken for
    world.run(2)
    assert world.changes


def test_a_budget_of_all_there_is_stays() -> None:
    """A cgroup as large as the budget: nothing is left from the start, and nobody else is there."""
    world = World(others=3020 * MIB)
    world.run(30)
    world.others += 4 * MIB
    world.run(10)
    assert world.changes == []
    world.others += 60 * MIB
    world.run(5)
    assert world.changes
    world.others -= 64 * MIB
    world.run(20)
    assert world.plan.memory_bytes == 1000 * MIB
    n_changes = len(world.changes)
    world.run(30)
    assert len(world.changes) == n_changes


def test_a_stall_asks_for_more() -> None:
    world = World(others=2000 * MIB)
    world.run(1)
    world.others = 2800 * MIB
    world.run(3)
    assert world.changes == []
    world.stalled = True
    world.run(3)
    assert world.changes


def test_a_budget_larger_than_the_model() -> None:
    plan = replace(PLAN, memory_bytes=3900 * MIB)
    world = World(others=2000 * MIB, plan=plan)
    world.pressure.restart(1000 * MIB)
    world.run(1)
    world.others = 3000 * MIB
    world.run(2)
    assert world.changes and world.changes[0] < plan.predicted_peak_bytes


def test_files_are_read_at_most_ten_times_a_second() -> None:
    reads = []

    class Counting(World):
        def tightest(self) -> Room:
            reads.append(self.now)
            return super().tightest()

    Counting(others=2000 * MIB).run(10)
    assert 80 <= len(reads) <= 101


# -- inside an engine -------------------------------------------------------------------------------------------------


@pytest.fixture
def pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host, "rss_bytes", lambda: 0)
    monkeypatch.setattr(host, "peak_rss_bytes", lambda: 0)
    source = tiny_llama_gguf(tmp_path / "m.gguf", type="q8_0", seed=5, num_hidden_layers=6, hidden_size=128)
    edge.pack(source, tmp_path / "m.edge")
    return tmp_path / "m.edge"


GREEDY: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "speculation": "off"}


def test_an_engine_gives_way_and_comes_back(pack: Path) -> None:
    with edge.load(pack, memory="1GiB", context=64, threads=2, pressure="off") as engine:
        want = engine.generate([1, 17, 5], **GREEDY)
        full = engine.plan.predicted_peak_bytes
        assert want.stats["memory_changes"] == []
    others, now = [0], [0.0]

    class Crowd:
        def tightest(self) -> Room:
            return Room(200 * MIB - others[0] - engine.plan.predicted_peak_bytes, 200 * MIB, "machine")

    with edge.load(pack, memory=full, context=64, threads=2) as engine:
        watcher = Pressure(
            full,
            room=Crowd(),  # type: ignore[arg-type]
            held=lambda: engine.plan.predicted_peak_bytes,
            clock=lambda: now[0],
        )
        assert engine._memory is not None
        engine._memory._pressure = watcher
        tokens = []
        for n, chunk in enumerate(engine.stream([1, 17, 5], **GREEDY)):
            tokens += [] if chunk.token is None else [chunk.token]
            now[0] += 2
            others[0] = 185 * MIB if 5 < n < 12 else 0
        assert tokens == want.tokens
        changes = chunk.stats["memory_changes"]
        assert len(changes) >= 2 and changes[0]["to_bytes"] < full == changes[-1]["to_bytes"]
        assert "pressure" in changes[0]["reason"] and "room" in changes[-1]["reason"]
        assert changes[0]["placement"] == "stream" and "\n" not in describe(changes[0])


def test_a_change_that_fails_does_not_end_the_text(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        n = 0

        def tightest(self) -> Room:
            self.n += 1
            return Room(200 * MIB if self.n == 1 else 0, 400 * MIB, "machine")

    with edge.load(pack, memory="1GiB", context=64, threads=2) as engine:
        want = engine.generate([1, 17, 5], **GREEDY).tokens
        ticks = iter(range(1 << 20))
        assert engine._memory is not None
        engine._memory._pressure = Pressure(1 << 30, room=Full(), clock=lambda: float(next(ticks)))  # type: ignore[arg-type]
        monkeypatch.setattr(
            "edge.live.watched", lambda *_: (_ for _ in ()).throw(edge.errors.DiskError("no drive"))
        )
        completion = engine.generate([1, 17, 5], **GREEDY)
        assert completion.tokens == want
        assert "no drive" in completion.stats["memory_changes"][0]["error"]
        assert engine.plan.memory_bytes == 1 << 30


@pytest.mark.parametrize("pressure", ["on", "", None])
def test_the_settings(pressure: Any, pack: Path) -> None:
    with pytest.raises(ArgumentError, match="pressure"):
        edge.load(pack, pressure=pressure)
