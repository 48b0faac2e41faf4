"""Sources: exact bytes, what is retried and what is final, and what a command may do."""

import gc
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lumina.data import remote, sources
from lumina.data.find import find_shards
from lumina.data.sources import LocalSource, MissingSourceError, PipeSource, Retry, Source, source_of
from tests.data.faulty_http import serving

QUICK = Retry(attempts=4, seconds=600.0, first_pause=0.001, longest_pause=0.002, silence=300.0)
CONTENT = np.random.default_rng(3).bytes(300_001)


@pytest.fixture
def server(tmp_path: Path):
    (tmp_path / "x.tar").write_bytes(CONTENT)
    with serving(tmp_path) as running:
        yield running


@pytest.fixture
def http(server):
    return source_of(f"{server.url}/x.tar", retry=QUICK)


def sent(source: Source) -> Source:
    return pickle.loads(pickle.dumps(source))  # noqa: S301 - as on the way to another process


def descriptors(kind: str) -> int:
    """Open files whose name begins so; what other tests and threads hold is of other kinds."""
    gc.collect()  # what other tests have dropped
    found = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{descriptor}").startswith(kind)
        except FileNotFoundError:  # that of the listing itself
            continue
    return found


def test_local(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(CONTENT)
    source = source_of(str(path))
    assert (source.size(), source.name, source.remote, str(source)) == (300_001, "x.tar", False, str(path))
    assert source.read(100, 50) == CONTENT[100:150]
    assert descriptors(str(path)) == 1
    copy = sent(source)
    assert copy == source
    assert copy.read(300_000, 1) == CONTENT[-1:]
    assert source.identity() == copy.identity()
    with pytest.raises(ValueError, match=r"x.tar ends at byte 300001, before byte 300010"):
        source.read(300_000, 10)
    source.close()
    assert source.read(0, 3) == CONTENT[:3]
    source.close()
    del copy
    assert descriptors(str(path)) == 0
    identity = source.identity()
    os.utime(path, ns=(1, 10**18))
    assert source.identity() != identity
    for missing in (tmp_path / "y.tar", path / "y.tar"):
        with pytest.raises(MissingSourceError, match=r"y.tar is missing"):
            LocalSource(missing).read(0, 1)


def test_http_reads_what_is_asked_and_no_more(server, http) -> None:
    assert http.size() == 300_001
    assert http.read(1000, 500) == CONTENT[1000:1500]
    assert http.read(300_000, 1) == CONTENT[-1:]
    assert http.read(7, 0) == b""
    assert server.ranges == [("x.tar", 0, 0), ("x.tar", 1000, 1499), ("x.tar", 300_000, 300_000)]
    assert server.bytes["x.tar"] == 1 + 500 + 1
    with pytest.raises(ValueError, match=r"x.tar has 300001 bytes; bytes 300000 to 300002 do not lie in it"):
        http.read(300_000, 2)
    copy = sent(http)
    assert copy.identity() == http.identity()
    assert copy.read(5, 5) == CONTENT[5:10]
    assert server.requests["x.tar"] == 4, "size and identity travel with a source"
    assert http.identity().startswith("300001-")


def test_http_stream(server, http, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "STREAM_BLOCK", 70_000)
    server.fault = lambda name, count: "drop" if count % 3 == 0 else None
    with http.stream() as stream:
        assert stream.read(512) == CONTENT[:512]
        assert stream.read() == CONTENT[512:]
        assert stream.read(1) == b""
    assert {(first, last) for _, first, last in server.ranges[1:]} == {
        (start, min(start + 69_999, 300_000)) for start in range(0, 300_001, 70_000)
    }


@pytest.mark.parametrize("fault", [500, 503, 429, 408, 502, 504, "drop", "short", "shift"])
def test_http_tries_again(server, http, fault) -> None:
    http.size()
    server.fault = lambda name, count: fault if count in (2, 3) else None
    assert http.read(1000, 5000) == CONTENT[1000:6000]
    assert server.requests["x.tar"] == 4


def test_http_tries_again_after_silence(server) -> None:
    """A good answer may be slow too on a busy machine: then it is asked for once more."""
    source = source_of(
        f"{server.url}/x.tar",
        retry=Retry(attempts=50, seconds=600.0, first_pause=0.001, longest_pause=0.2, silence=0.3),
    )
    source.size()
    first = server.requests["x.tar"] + 1
    server.fault = lambda name, count: "silent" if count in (first, first + 1) else None
    assert source.read(1000, 5000) == CONTENT[1000:6000]
    assert server.requests["x.tar"] >= first + 2


@pytest.mark.parametrize("fault", [500, "drop", "short"])
def test_http_gives_up_in_a_sentence(server, http, fault) -> None:
    http.size()
    server.fault = lambda name, count: fault
    said = {500: "the server answers 500", "short": "2500 bytes came instead of 5000", "drop": "ClientPayloadError"}
    with pytest.raises(
        ValueError, match=rf"{http} cannot be read \(4 attempts in .* s; the last: {said[fault]}"
    ) as caught:
        http.read(0, 5000)
    assert "\n" not in str(caught.value)
    assert server.requests["x.tar"] == 5


def test_http_gives_up_when_time_is_up(server, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own, on which a pause takes as long as it is and nothing else takes any time."""
    now = [1000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    server.fault = lambda name, count: 503
    source = source_of(
        f"{server.url}/x.tar", retry=Retry(attempts=10**6, seconds=60.0, first_pause=6.0, longest_pause=15.0)
    )
    with pytest.raises(
        ValueError, match=r"cannot be read \(\d+ attempts in \d\d\.\d s; the last: the server answers 503\)"
    ):
        source.size()
    # Pauses of 3 to 6 s, 6 to 12, and then 7.5 to 15; none that would end after the last moment.
    assert 5 <= server.requests["x.tar"] <= 9
    assert 1060 - 15 < now[0] < 1060


def test_http_escapes_are_kept_and_blanks_escaped(server) -> None:
    asked = []
    server.fault = lambda name, count: asked.append(name)
    for name in ("a%2Fb%2B.tar", "a b.tar"):
        with pytest.raises(MissingSourceError):
            source_of(f"{server.url}/{name}", retry=QUICK).size()
    assert asked == ["a%2Fb%2B.tar", "a%20b.tar"]


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "x.tar is missing"), (403, "x.tar may not be read"), (400, "the server answers 400"), (501, "answers 501")],
)
def test_http_final_answers_are_not_repeated(server, http, status: int, message: str) -> None:
    server.fault = lambda name, count: status
    with pytest.raises(ValueError, match=message) as caught:
        http.size()
    assert server.requests["x.tar"] == 1
    assert isinstance(caught.value, MissingSourceError) == (status in (403, 404))


def test_http_without_ranges_is_refused(server, http) -> None:
    server.fault = lambda name, count: "whole"
    with pytest.raises(ValueError, match=r"x.tar is on a server that ignores range requests \(status 200\)"):
        http.size()
    assert server.requests["x.tar"] == 1


def test_http_that_changes_is_refused(server, http, tmp_path: Path) -> None:
    http.read(0, 10)
    server.etags["x.tar"] = '"other"'
    with pytest.raises(ValueError, match=r"x.tar changed while it was in use"):
        http.read(20, 10)
    assert source_of(http.location).identity() != http.identity()


def test_http_small_files(server, tmp_path: Path) -> None:
    for size in (0, 1):
        (tmp_path / "small").write_bytes(CONTENT[:size])
        small = source_of(f"{server.url}/small", retry=QUICK)
        assert small.size() == size
        assert small.stream().read() == CONTENT[:size]
    server.fault = lambda name, count: "whole"
    assert source_of(f"{server.url}/small", retry=QUICK).read(0, 1) == CONTENT[:1]


def test_no_server_is_retried_and_said() -> None:
    with serving(Path("/nowhere")) as server:
        url = server.url
    with pytest.raises(ValueError, match=r"127.0.0.1:\d+/x.tar cannot be read \(4 attempts in"):
        source_of(f"{url}/x.tar", retry=QUICK).size()


def test_secrets_stay_out_of_messages() -> None:
    source = source_of("https://user:secret@host/a/x.tar?signature=hidden")
    assert (str(source), source.name) == ("https://host/a/x.tar?…", "x.tar")
    assert source.beside("y").location == "https://user:secret@host/a/y?signature=hidden"


def test_pauses_double_with_jitter() -> None:
    retry = Retry(first_pause=0.5, longest_pause=20.0)
    for attempt, full in ((1, 0.5), (2, 1.0), (4, 4.0), (9, 20.0)):
        pauses = {retry.pause(attempt) for _ in range(50)}
        assert full / 2 <= min(pauses) < max(pauses) <= full
        assert len(pauses) > 40


def test_objects_of_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe_file("/bucket/x.tar", CONTENT)
    source = source_of("memory://bucket/x.tar", retry=QUICK)
    assert (source.size(), source.name) == (300_001, "x.tar")
    assert source.read(10, 5) == CONTENT[10:15]
    assert sent(source).stream().read() == CONTENT
    with pytest.raises(MissingSourceError, match=r"memory://bucket/y.tar is missing"):
        source_of("memory://bucket/y.tar", retry=QUICK).size()
    failures = iter([OSError("throttled"), TimeoutError("slow")])
    real = type(files).cat_file

    def failing(self, *args, **kwargs):
        if (error := next(failures, None)) is not None:
            raise error
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(files), "cat_file", failing)
    assert source.read(20, 5) == CONTENT[20:25]
    assert next(failures, None) is None
    files.pipe_file("/bucket/x.tar", CONTENT[:100])
    with pytest.raises(ValueError, match="the last: 0 bytes came instead of 10"):
        source.read(200, 10)
    monkeypatch.setattr(type(files), "cat_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        source.read(0, 1)


def test_other_protocols_are_said() -> None:
    with pytest.raises(ValueError, match="there is no file system for nothing://"):
        source_of("nothing://x.tar").size()


def command(path: Path) -> str:
    return f"{sys.executable} -c \"import sys;sys.stdout.buffer.write(open('{path}','rb').read())\""


def test_pipes_run_only_what_is_allowed(tmp_path: Path) -> None:
    for given, message in (
        ("touch {}", "would run touch, which data.pipe_programs does not allow .allowed: cat, aws.; add touch to it"),
        ("/bin/cat {}", "would run /bin/cat, which"),
        ("cat {} | touch {}", r"uses '\|', but no shell runs it"),
        ("cat x; touch {}", "uses 'x;', but no shell runs it"),
        ("", "names no program"),
        ('cat "x', "is no command"),
    ):
        with pytest.raises(ValueError, match=message):
            source_of(f"pipe:{given.format(tmp_path / 'made', tmp_path / 'made')}", pipe_programs=["cat", "aws"])
    with pytest.raises(ValueError, match=r"allowed: none is\)"):
        find_shards(["pipe:cat x.tar"])
    # Without a shell this is an argument and nothing more.
    source = source_of(f"pipe:echo $(touch {tmp_path}/made)", pipe_programs=["echo"])
    assert source.stream().read() == f"$(touch {tmp_path}/made)\n".encode()
    assert not (tmp_path / "made").exists()


def test_pipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(CONTENT)
    before = descriptors("pipe:")
    source = PipeSource(f"cat {path}", ["cat"])
    assert source.name == "x.tar"
    started = []
    real = sources._Command.__init__

    def counting(self, *args):
        started.append(1)
        real(self, *args)

    monkeypatch.setattr(sources._Command, "__init__", counting)
    assert source.read(1000, 500) == CONTENT[1000:1500]
    assert source.read(200_000, 500) == CONTENT[200_000:200_500]
    assert len(started) == 1, "reading on goes on in the same stream"
    assert source.read(0, 5) == CONTENT[:5]
    assert len(started) == 2
    assert sent(source).size() == 300_001
    with pytest.raises(ValueError, match="ends at byte 300001, before byte 300010"):
        source.read(300_000, 10)
    source.close()
    with source.stream() as stream:
        assert stream.read(10) == CONTENT[:10]
    del stream
    assert descriptors("pipe:") == before
    for words, message in (
        (f"cat {tmp_path}/none", r"ended with code 1 \(cat: .*No such file"),
        ("nothing-of-that-name x", "cannot be started"),
    ):
        with pytest.raises(ValueError, match=message):
            PipeSource(words, [words.split()[0]]).stream().read()
    monkeypatch.setattr(sources, "PIPE_SILENCE", 0.1)
    with pytest.raises(ValueError, match="gave nothing for 0 s"):
        PipeSource("sleep 60", ["sleep"]).stream().read()


# Finding shards.


def names(patterns: list, **options: object) -> list[str]:
    return [source.name for source in find_shards(patterns, **options)]


def test_braces(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"a-{number:03d}.tar").touch()
    assert names([f"{tmp_path}/a-{{002..011}}.tar"]) == [f"a-{number:03d}.tar" for number in range(2, 12)]
    assert names([f"{tmp_path}/a-{{000,007}}.tar", f"{tmp_path}/a-007.tar"]) == ["a-000.tar", "a-007.tar"]
    with pytest.raises(ValueError, match=r"a-012.tar is missing"):
        find_shards([f"{tmp_path}/a-{{010..012}}.tar"])
    urls = find_shards(["https://h/{a,b}-{8..11}.tar"])
    assert [source.location for source in urls] == [
        f"https://h/{w}-{n}.tar" for w in "ab" for n in ("10", "11", "8", "9")
    ]
    assert names(["pipe:cat b-{0..1}.tar -"], pipe_programs=["cat"]) == ["b-0.tar", "b-1.tar"]
    (tmp_path / "l{0..1}.tar").touch()
    assert names([f"{tmp_path}/l{{0..1}}.tar"]) == ["l{0..1}.tar"]
    for wrong, message in (
        ("{9..1}", "must count up"),
        ("{x}", "neither a range"),
        ("{0..9999999}", "must count up, by"),
    ):
        with pytest.raises(ValueError, match=message):
            find_shards([f"https://h/{wrong}.tar"])


def test_urls_are_sorted_by_name_with_the_local_ones(tmp_path: Path) -> None:
    (tmp_path / "b.tar").touch()
    assert names([str(tmp_path), "https://z/a.tar", "https://a/c.tar?x=y/d", "https://z/a.tar"]) == [
        "a.tar",
        "b.tar",
        "c.tar",
    ]
    assert names([f"file://{tmp_path}/b.tar"]) == ["b.tar"]


def test_listing_remote_folders(server, tmp_path: Path) -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    (tmp_path / "set").mkdir()
    for name in ("a-0.tar", "a-1.tar", "a-2.tar", "b.tar", "a-0.index.safetensors", "readme.txt"):
        files.pipe_file(f"/set/{name}", b"")
        (tmp_path / "set" / name).touch()
    for folder in ("memory://set", f"{server.url}/set"):
        assert names([folder]) == names([f"{folder}/"]) == ["a-0.tar", "a-1.tar", "a-2.tar", "b.tar"]
        assert names([f"{folder}/a-*.tar"]) == ["a-0.tar", "a-1.tar", "a-2.tar"]
        assert find_shards([folder])[0].location == f"{folder}/a-0.tar"
        with pytest.raises(ValueError, match=rf"{folder}/c\*.tar matches no .tar file"):
            find_shards([f"{folder}/c*.tar"])
    files.rm_file("/set/a-1.tar")
    (tmp_path / "set/a-1.tar").unlink()
    for folder in ("memory://set", f"{server.url}/set"):
        with pytest.raises(ValueError, match=rf"{folder}/a-1.tar is missing \(1 of 3 numbers are\)"):
            find_shards([folder])
        assert len(find_shards([f"{folder}/a-*.tar"])) == 2
    files.rm_file("/set/a-0.tar")
    with pytest.raises(ValueError, match=r"memory://set/a-0.tar is missing: its index is there"):
        find_shards(["memory://set/*.tar"])
    with pytest.raises(ValueError, match=r"cannot be listed .*is missing.*; name the shards one by one"):
        find_shards([f"{server.url}/nowhere"])
    with pytest.raises(ValueError, match="a folder or glob cannot have a query"):
        find_shards([f"{server.url}/set?x=1"])
