"""What goes over the wire between a supervisor and its hosts, and what is taken for the end of it."""

import json
import socket
import subprocess
import sys
import threading
import time

import pytest

from lumina.launch.messages import (
    Beat,
    Channel,
    End,
    Ended,
    Error,
    Forget,
    Hello,
    Line,
    Message,
    Over,
    Prepare,
    Prepared,
    Refused,
    Signal,
    Start,
    decode,
    encode,
)

PATIENCE = 120.0
"""Seconds after which something hangs."""
MESSAGES = [
    Beat(),
    Prepare("/runs/a b"),
    Start(["-m", "lumina", "train", "x'\"$.yaml"], "/r", 3, 8, 4, 16, "10.0.0.1", 29500, [0, 2], {"A": "b=c"}),
    Start([], "/r", 0, 0, 1, 1, "127.0.0.1", 1),
    Signal(15),
    End(1.5),
    Forget("/r", 3),
    Hello("ab", 7, 1700000000.25, ["10.0.0.2"], "0.1.0"),
    Prepared(2, "/r/logs/attempt_2", 40000, 812, 800, False),
    Line("loss · 1\u2028\n\\ and more"),
    Error(3, "the disk is full"),
    Ended(1, 99, -9, "words"),
    Over(5, 4),
    Refused("run.dir is a file", True),
]


@pytest.fixture
def ends():
    """A channel, and the bare socket at the other end of its TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        other = socket.create_connection(listener.getsockname())
        connection, _ = listener.accept()
    channel = Channel(connection)
    yield channel, other
    channel.close()
    other.close()


def received(channel, count=1):
    """So many messages, or what there is at the end."""
    found, deadline = [], time.monotonic() + PATIENCE
    while len(found) < count and not channel.closed and time.monotonic() < deadline:
        found += channel.receive()
        time.sleep(0.005)
    return found


def ended(channel):
    deadline = time.monotonic() + PATIENCE
    while not channel.closed and time.monotonic() < deadline:
        assert channel.receive() == []
        time.sleep(0.005)
    return channel.closed


def test_every_kind_is_read_back():
    assert {type(message) for message in MESSAGES} == set(Message.kinds.values()) - {lost_kind()}
    for message in MESSAGES:
        line = encode(message)
        assert line.count(b"\n") == 1
        assert line.endswith(b"\n")
        assert decode(line) == message


def lost_kind():
    """A host that is lost is told within the supervisor alone."""
    from lumina.launch.hosts import Lost

    return Lost


@pytest.mark.parametrize(
    "line",
    [
        b"GET / HTTP/1.1",
        b"",
        b"7",
        b"[]",
        b"{}",
        b'{"kind": "Nothing"}',
        b'{"kind": ["Line"]}',
        b'{"kind": "Line"}',
        b'{"kind": "Line", "text": "x", "more": 1}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
    ],
)
def test_what_is_no_message(line):
    with pytest.raises(ValueError, match="no message"):
        decode(line)


def test_fields_of_another_type_are_no_message():
    """In a process of its own: here jaxtyping's hook would refuse them too."""
    hello = '{"kind": "Hello", "token": %s, "pid": 1, "born": %s, "addresses": %s, "version": ""}'
    lines = {
        hello % ('"x"', "1", "[]"): None,
        hello % ("5", "1.0", "[]"): "token",
        hello % ('"x"', '"1"', "[]"): "born",
        hello % ('"x"', "1.0", "{}"): "addresses",
        '{"kind": "Signal", "number": null}': "number",
    }
    script = (
        "import sys; from lumina.launch.messages import decode\nfor line in sys.stdin:\n  try: decode(line.encode())\n"
    )
    script += "  except ValueError as error: print(error)\n  else: print()\n"
    done = subprocess.run([sys.executable, "-c", script], input="\n".join(lines), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for said, field in zip(done.stdout.splitlines(), lines.values(), strict=True):
        assert said.startswith(f"no message, by its {field}: ") if field else not said


def test_lines_come_in_pieces(ends):
    channel, other = ends
    first, second = encode(Line("a · b")), encode(Over(2, 1))
    middle = len(first) // 2
    other.sendall(first[:middle])
    deadline = time.monotonic() + PATIENCE
    while not channel._partial:  # it is under way
        assert channel.receive() == []
        assert time.monotonic() < deadline
    other.sendall(first[middle:] + second[:5])
    assert received(channel) == [Line("a · b")]
    other.sendall(second[5:])
    assert received(channel) == [Over(2, 1)]
    assert not channel.closed


def test_beats_are_heard_and_not_returned(ends):
    channel, other = ends
    channel.heard, began = 0.0, time.monotonic()
    other.sendall(encode(Beat()) + encode(Line("x")) + encode(Beat()))
    assert received(channel) == [Line("x")]
    assert channel.heard >= began
    channel.heard = 0.0
    assert channel.receive() == []
    assert channel.heard == 0.0  # silence is not heard


def test_whatever_else_talks_to_the_port_is_left(ends):
    channel, other = ends
    other.sendall(encode(Line("x")) + b"GET / HTTP/1.1\r\n\r\n")
    assert ended(channel)


def test_a_line_without_end_is_not_kept(ends):
    """4 MiB are the limit: a talker without line ends must not fill the memory."""
    channel, other = ends
    other.setblocking(False)
    block, sent, deadline = b"x" * (1 << 16), 0, time.monotonic() + PATIENCE
    while not channel.closed and time.monotonic() < deadline:
        try:
            sent += other.send(block)
        except BlockingIOError:
            pass
        except OSError:
            break
        assert channel.receive() == []
    assert channel.closed
    assert sent >= 1 << 22
    assert sent < (1 << 22) + (1 << 24)  # and what the system holds on the way


def test_a_long_line_is_whole(ends):
    channel, other = ends
    other.settimeout(PATIENCE)
    text = "y" * 3_000_000
    line, found = encode(Line(text)), []
    for start in range(0, len(line), 1 << 16):
        other.sendall(line[start : start + (1 << 16)])
        found += channel.receive()
    assert (found + received(channel, 1 - len(found)))[0] == Line(text)


def test_what_was_said_before_the_end_is_read(ends):
    channel, other = ends
    other.sendall(encode(Line("last words")) + b'{"kind": "Li')
    other.close()
    assert received(channel) == [Line("last words")]
    assert ended(channel)
    channel.send(Beat())  # to nobody, and nothing is raised
    assert channel.receive() == []


def test_sending_does_not_wait_for_a_reader(ends):
    """What the other side does not take yet goes with what is sent later; far too much of it is the end."""
    channel, other = ends

    def send():
        for number in range(40):
            channel.send(Line(f"{number} " + "z" * 250_000))

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    sender.join(PATIENCE)
    assert not sender.is_alive()  # nobody has read
    assert not channel.closed
    other.settimeout(PATIENCE)
    reader, lines = other.makefile("rb"), []
    while len(lines) < 40:
        channel.send(Beat())
        lines += [line for line in [reader.readline()] if b"Beat" not in line]
    assert [int(json.loads(line)["text"].split()[0]) for line in lines] == list(range(40))
    for _ in range(80):
        channel.send(Line("z" * 1_000_000))
    assert channel.closed
