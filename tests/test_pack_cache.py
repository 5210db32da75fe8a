"""The pack cache: one pack per checkpoint and option, made once, made again when it is damaged."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from flashload import cache
from flashload.cache import cache_folder, cache_key, ensure_packed
from flashload.errors import ArgumentError, DiskError, ModelFileError
from flashload.format import PackFile
from flashload.pack import pack
from tests.tiny import tiny_gguf, tiny_hf

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def packed_times(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every source that was packed."""
    times: list[Path] = []

    def counted(source: Path, *rest: object) -> object:
        times.append(source)
        return pack(source, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "pack", counted)
    return times


def packs(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.endswith(".edge"))


def test_packs_on_first_use_only(tmp_path: Path, folder: Path, packed_times: list[Path]) -> None:
    source = tiny_gguf(tmp_path / "model.gguf")
    one = ensure_packed(source)
    assert one.parent == folder
    assert one.name.startswith("model-keep-")
    assert ensure_packed(str(source)) == one
    assert packed_times == [source]
    with PackFile(one) as file:
        file.verify()


def test_a_pack_is_returned_as_it_is(tmp_path: Path, folder: Path) -> None:
    pack(tiny_hf(tmp_path / "hf"), tmp_path / "own.edge")
    assert ensure_packed(tmp_path / "own.edge", "q4") == tmp_path / "own.edge"
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["empty", "header", "directory", "short"])
def test_a_damaged_pack_is_made_again(damage: str, tmp_path: Path, packed_times: list[Path]) -> None:
    source = tiny_hf(tmp_path / "hf")
    path = ensure_packed(source)
    whole = path.read_bytes()
    changed = {
        "empty": b"",
        "header": bytes([whole[0] ^ 1]) + whole[1:],
        "directory": whole[:-4000] + bytes([whole[-4000] ^ 1]) + whole[-3999:],
        "short": whole[:-4096],
    }
    path.write_bytes(changed[damage])
    assert ensure_packed(source) == path
    assert path.read_bytes() == whole
    assert len(packed_times) == 2


def test_options_have_packs_of_their_own(tmp_path: Path, folder: Path) -> None:
    source = tiny_hf(tmp_path / "hf")
    assert len({ensure_packed(source, weights) for weights in ("keep", "q8", "q4")}) == 3
    assert len(packs(folder)) == 3


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]
)
def test_a_changed_folder_is_packed_again(file: str, tmp_path: Path) -> None:
    source = tiny_hf(tmp_path / "hf")
    before = cache_key(source, "keep")
    status = (source / file).stat()
    data = (source / file).read_bytes()
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    (source / file).write_bytes(changed)
    os.utime(source / file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert cache_key(source, "keep") != before


def test_a_touched_file_is_packed_again(tmp_path: Path) -> None:
    source = tiny_gguf(tmp_path / "m.gguf")
    before = cache_key(source, "keep")
    os.utime(source, ns=(1, 1))
    assert cache_key(source, "keep") != before


def test_another_place_is_another_key(tmp_path: Path) -> None:
    one = tiny_gguf(tmp_path / "m.gguf")
    other = tmp_path / "elsewhere" / "m.gguf"
    other.parent.mkdir()
    other.write_bytes(one.read_bytes())
    os.utime(other, ns=(one.stat().st_atime_ns, one.stat().st_mtime_ns))
    assert cache_key(one, "keep") != cache_key(other, "keep")


def test_ways_to_the_same_file_share_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_gguf(tmp_path / "m.gguf")
    monkeypatch.chdir(tmp_path)
    assert cache_key(Path("m.gguf"), "keep") == cache_key(source, "keep")


def test_names_of_models_are_made_safe(tmp_path: Path) -> None:
    source = tiny_hf(tmp_path / "mödel name$ (1)")
    name = ensure_packed(source).name
    assert name.startswith("m_del_name___1_-keep-")


def test_a_changed_shard_is_packed_again(tmp_path: Path) -> None:
    from tests.test_checkpoint_gguf import split

    paths = split(tmp_path)
    before = cache_key(paths[0], "keep")
    paths[2].write_bytes(paths[2].read_bytes()[:-1] + b"x")
    assert cache_key(paths[0], "keep") != before


def test_a_bad_model_leaves_no_pack(tmp_path: Path, folder: Path) -> None:
    source = tiny_hf(tmp_path / "hf")
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "vocab_size": 7}))
    with pytest.raises(ModelFileError):
        ensure_packed(source)
    assert packs(folder) == []


def test_a_missing_model(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file or folder"):
        ensure_packed(tmp_path / "none")
    assert not folder.exists()


def test_unknown_options(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="weights"):
        ensure_packed(tiny_hf(tmp_path / "hf"), "q3")


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("EDGE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DiskError, match="cache folder"):
        ensure_packed(tiny_hf(tmp_path / "hf"))


def test_the_cache_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGE_CACHE")
    assert cache_folder().name == "edge"


def test_who_waits_is_told_and_may_give_up(tmp_path: Path, folder: Path) -> None:
    class GaveUp(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert (done, total) == (0, 0)
        raise GaveUp

    source = tiny_hf(tmp_path / "hf")
    folder.mkdir()
    lock = (folder / cache_key(source, "keep")).with_suffix(".lock")
    with open(lock, "ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(GaveUp):
            ensure_packed(source, progress=stop)
    assert packs(folder) == []


def test_threads_pack_once(tmp_path: Path, packed_times: list[Path]) -> None:
    source = tiny_hf(tmp_path / "hf")
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(ensure_packed(source))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(packed_times) == 1


def test_processes_pack_once(tmp_path: Path, folder: Path) -> None:
    source = tiny_hf(tmp_path / "hf")
    code = f"""
        import sys
        sys.path[:0] = {[str(ROOT), *sys.path]!r}
        from flashload import cache
        from flashload.pack import pack
        def counted(*args):
            print("packed", flush=True)
            return pack(*args)
        cache.pack = counted
        cache.ensure_packed(sys.argv[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(source)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert "".join(outputs).split() == ["packed"]
    assert len(packs(folder)) == 1
