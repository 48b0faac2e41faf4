"""The cache of a node: right bytes always, one fetch for all, a bound that holds, damage mended."""

import fcntl
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from lumina.data import cache as cache_module
from lumina.data.cache import Cache
from lumina.data.sources import Retry, source_of
from tests.data.faulty_http import serving

BLOCK = 100_000
STORED = BLOCK + 16 * 4  # and a hash for each 32 KiB
CONTENT = np.random.default_rng(3).bytes(1_050_001)


@pytest.fixture
def server(tmp_path: Path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "x.tar").write_bytes(CONTENT)
    with serving(folder) as running:
        yield running


@pytest.fixture
def source(server):
    return source_of(
        f"{server.url}/x.tar", retry=Retry(attempts=4, seconds=600.0, first_pause=0.001, longest_pause=0.002)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def blocks(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.block"), key=lambda path: path.stat().st_mtime_ns)


def held(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in (".block", ".part"))


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*/*") if path.suffix != ".block"]


def test_every_range_is_right_and_fetched_once(server, source, folder: Path) -> None:
    cache = Cache(folder, 10**8, BLOCK)
    rng = np.random.default_rng(0)
    ranges = [
        (0, 1),
        (99_999, 2),
        (0, 1_050_001),
        (1_050_000, 1),
        (32_768, 32_768),
        (32_767, 2),
        (5, 0),
        (BLOCK, BLOCK),
    ]
    ranges += [(int(rng.integers(0, 10**6)), int(rng.integers(0, 50_001))) for _ in range(60)]
    for offset, size in ranges:
        assert cache.read(source, offset, size) == CONTENT[offset : offset + size]
    assert server.bytes["x.tar"] == 1 + len(CONTENT)
    assert sorted(first for _, first, _ in server.ranges[1:]) == list(range(0, 1_050_001, BLOCK))
    assert len(blocks(folder)) == 11
    assert held(folder) == len(CONTENT) + 16 * (10 * 4 + 2)
    assert leftovers(folder) == []
    for offset, size in ((1_050_000, 2), (-1, 1)):
        with pytest.raises(ValueError, match="do not lie in it"):
            cache.read(source, offset, size)


def test_the_next_process_finds_it_and_a_changed_shard_is_another(server, source, folder: Path) -> None:
    Cache(folder, 10**8, BLOCK).read(source, 0, 10)
    fresh = source_of(source.location)
    assert Cache(folder, 10**8, BLOCK).read(fresh, 50, 10) == CONTENT[50:60]
    assert server.requests["x.tar"] == 3, "size, block, size"
    (server.folder / "x.tar").write_bytes(CONTENT[::-1])
    server.etags["x.tar"] = '"new"'
    assert Cache(folder, 10**8, BLOCK).read(source_of(source.location), 50, 10) == CONTENT[::-1][50:60]


def test_local_files_are_not_copied(server, folder: Path) -> None:
    assert Cache(folder, 10**8, BLOCK).read(source_of(server.folder / "x.tar"), 5, 5) == CONTENT[5:10]
    assert list(folder.iterdir()) == []


def test_any_flipped_bit_is_noticed_and_mended(server, source, folder: Path) -> None:
    cache = Cache(folder, 10**8, BLOCK)
    cache.read(source, 0, BLOCK)
    (block,) = blocks(folder)
    good = block.read_bytes()
    rng = np.random.default_rng(1)
    places = [0, 15, 16, 63, 64, len(good) - 1, *rng.integers(0, len(good), 20).tolist()]
    for done, place in enumerate(places, 1):
        bad = bytearray(good)
        bad[place] ^= 1 << int(rng.integers(8))
        block.write_bytes(bad)
        assert cache.read(source, 0, BLOCK) == CONTENT[:BLOCK]
        assert block.read_bytes() == good
        assert server.requests["x.tar"] == 2 + done
    for size in (0, 10, len(good) - 1, len(good) + 1):
        block.write_bytes((good + b"x")[:size])
        assert cache.read(source, 90_000, 5) == CONTENT[90_000:90_005]
    assert server.requests["x.tar"] == 2 + len(places) + 4
    assert int((folder / "total").read_text()) == held(folder)


def test_a_block_in_the_place_of_another_is_damage(source, folder: Path) -> None:
    cache = Cache(folder, 10**8, BLOCK)
    for offset in (0, BLOCK):
        cache.read(source, offset, 10)
    first, second = blocks(folder)
    second.write_bytes(first.read_bytes())
    assert cache.read(source, BLOCK, 10) == CONTENT[BLOCK : BLOCK + 10]


def test_the_least_recently_used_go(server, source, folder: Path) -> None:
    cache = Cache(folder, 4 * STORED, BLOCK)

    def read(number: int) -> None:
        cache.read(source, number * BLOCK, 10)
        time.sleep(0.02)  # a file system's clock may stand still for longer than a fast read takes

    for number in range(4):
        read(number)
    read(0)  # so that block 1 is the oldest
    mine = folder / "notes.txt"
    mine.write_text("x" * 10**6)
    for number in (4, 5):
        read(number)
        assert held(folder) <= 4 * STORED
    fetched = server.requests["x.tar"]
    for number in (0, 3, 4, 5):
        read(number)
    assert server.requests["x.tar"] == fetched, "what was used last is still there"
    cache.read(source, BLOCK, 10)
    assert server.requests["x.tar"] == fetched + 1
    assert mine.stat().st_size == 10**6


def test_a_lost_or_wrong_count_does_not_break_the_bound(source, folder: Path) -> None:
    cache = Cache(folder, 3 * STORED, BLOCK)
    for number, count in enumerate([None, "", "junk", "999999999", "-5", None, "12x"]):
        if count is None:
            (folder / "total").unlink(missing_ok=True)
        else:
            (folder / "total").write_text(count)
        for more in range(3):
            assert cache.read(source, (number + more) * BLOCK, 10) == CONTENT[(number + more) * BLOCK :][:10]
            assert held(folder) <= 3 * STORED
        if count == "999999999":
            assert int((folder / "total").read_text()) == held(folder)


def test_abandoned_parts_are_cleared(source, folder: Path) -> None:
    cache = Cache(folder, 2 * STORED, BLOCK)
    cache.read(source, 0, 10)
    old, new = (blocks(folder)[0].with_name(name) for name in ("old.part", "new.part"))
    old.write_bytes(bytes(1000))
    new.write_bytes(bytes(1000))
    os.utime(old, (1, 1))
    for number in (1, 2):
        cache.read(source, number * BLOCK, 10)
    assert (old.exists(), new.exists()) == (False, True)
    assert held(folder) <= 2 * STORED


READER = """
import hashlib, sys
from lumina.data.cache import Cache
from lumina.data.sources import source_of
url, folder, bound, seed, content = sys.argv[1:]
import numpy as np
content = open(content, "rb").read()
source, cache = source_of(url), Cache(folder, int(bound), 100_000)
sys.stdin.readline()
for number in np.random.default_rng(int(seed)).permutation(40) % 11:
    start = int(number) * 100_000
    size = min(150_000, len(content) - start)
    assert cache.read(source, start, size) == content[start : start + size]
"""


def run_readers(server, folder: Path, bound: int, watch=lambda: None, count: int = 3) -> None:
    arguments = [f"{server.url}/x.tar", str(folder), str(bound)]
    content = str(server.folder / "x.tar")
    readers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", READER, *arguments, str(seed), content],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(count)
    ]
    for reader in readers:
        reader.stdin.write("\n")
        reader.stdin.flush()
    while any(reader.poll() is None for reader in readers):
        watch()
    watch()
    for reader in readers:
        errors = reader.communicate()[1]
        assert reader.returncode == 0, errors


def test_processes_fetch_a_block_once(server, folder: Path) -> None:
    run_readers(server, folder, 10**8)
    fetched = [first for _, first, last in server.ranges if last > 0]
    assert sorted(fetched) == list(range(0, 1_050_001, BLOCK))
    assert leftovers(folder) == []
    assert int((folder / "total").read_text()) == held(folder)


def test_the_bound_holds_among_processes(server, folder: Path) -> None:
    most = 0

    def look() -> dict[tuple[str, int], int]:
        """Bytes of each file, by its name and number."""
        found = {}
        for path in folder.rglob("*"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            if path.suffix in (".block", ".part"):
                found[path.name, stat.st_ino] = stat.st_size
        return found

    def watch() -> None:
        """A look takes a while, in which files come and go: those of two looks were there together between them."""
        nonlocal most
        first, second = look(), look()
        most = max(most, sum(min(first[file], second[file]) for file in first.keys() & second.keys()))

    run_readers(server, folder, 5 * STORED, watch)
    assert 4 * STORED <= most <= (5 + 3) * STORED
    assert held(folder) <= 5 * STORED
    assert server.requests["x.tar"] > 20, "blocks were evicted and fetched again"


def test_threads_fetch_a_block_once(server, source, folder: Path) -> None:
    server.fault = lambda name, count: "slow" if count == 2 else None
    source.size()
    cache, results = Cache(folder, 10**8, BLOCK), []
    threads = [threading.Thread(target=lambda: results.append(cache.read(source, 5, 5))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT[5:10]] * 6
    assert server.requests["x.tar"] == 2


def test_a_full_disk_is_said_once(server, source, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def full(self, mode="r", *args, **kwargs):
        if "x" in mode:
            raise OSError(28, "No space left on device")
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    cache = Cache(folder, 10**8, BLOCK)
    with pytest.warns(UserWarning, match=r"takes no more blocks \(No space left on device\); reading goes on"):
        assert cache.read(source, 5, 5) == CONTENT[5:10]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.read(source, 10, 5) == CONTENT[10:15]
        assert server.ranges[-1][1:] == (10, 14), "without the cache only what is asked comes"
        cache._no_writing_until = 0.0
        assert cache.read(source, 15, 5) == CONTENT[15:20]
        assert blocks(folder) == []
        monkeypatch.setattr(Path, "open", real)
        cache._no_writing_until = 0.0
        cache.read(source, 5, 5)
    assert len(blocks(folder)) == 1
    assert leftovers(folder) == []


def test_what_cannot_be_removed_stays(server, source, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(folder, 2 * STORED, BLOCK)
    for number in range(2):
        cache.read(source, number * BLOCK, 10)
    kept = set(blocks(folder))
    real = Path.unlink

    def refusing(self, missing_ok=False):
        if self in kept:
            raise PermissionError(13, "Permission denied")
        real(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refusing)
    with pytest.warns(UserWarning, match="takes no more blocks .*cannot be removed"):
        assert cache.read(source, 5 * BLOCK, 10) == CONTENT[5 * BLOCK :][:10]
    assert set(blocks(folder)) == kept
    kept.pop()
    cache._no_writing_until = 0.0
    cache.read(source, 6 * BLOCK, 10)
    assert len(blocks(folder)) == 2
    assert kept < set(blocks(folder))


def test_a_failing_server_is_an_error_and_leaves_no_lock(server, source, folder: Path) -> None:
    cache = Cache(folder, 10**8, BLOCK)
    source.size()
    server.fault = lambda name, count: 403
    with pytest.raises(ValueError, match=r"x.tar may not be read"):
        cache.read(source, 0, 5)
    assert leftovers(folder) == []
    server.fault = lambda name, count: None
    assert cache.read(source, 0, 5) == CONTENT[:5]


def test_a_lock_that_is_held_too_long(source, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(folder, 10**8, BLOCK)
    cache.read(source, 0, 5)
    (block,) = blocks(folder)
    block.unlink()
    monkeypatch.setattr(cache_module, "_LOCK_SECONDS", 0.05)
    with cache_module._locked(block.with_suffix(".lock")):
        with pytest.warns(UserWarning, match=r"has been locked for"):
            assert cache.read(source, 0, 5) == CONTENT[:5]
        assert not block.exists()


def test_bad_arguments(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a cache of 100000 bytes cannot hold one block of 100000 bytes"):
        Cache(folder, BLOCK, BLOCK)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be made"):
        Cache(tmp_path / "file/x", 10**8)


def test_a_lock_file_that_its_holder_removed_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken() -> int:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return descriptor

    def waits() -> None:
        with cache_module._locked(path):
            entered.set()

    path, polls, entered, real = tmp_path / "x.lock", threading.Semaphore(0), threading.Event(), time.sleep
    monkeypatch.setattr(cache_module.time, "sleep", lambda seconds: (polls.release(), real(0.001)))
    first = taken()
    waiter = threading.Thread(target=waits)
    waiter.start()
    assert polls.acquire(timeout=600)
    path.unlink()
    second = taken()
    os.close(first)
    for _ in range(20):
        assert polls.acquire(timeout=600), "it went in beside the second holder"
    assert not entered.is_set()
    os.close(second)
    waiter.join(600)
    assert entered.is_set()
    assert not path.exists()
