"""``python -m lumina.launch.agent``: the supervisor's hand on a host. It starts ranks, and none of them outlives it.

It ends its ranks, and then itself, when the supervisor ends the connection or has not been heard of for a while.
"""

import argparse
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from queue import SimpleQueue

import psutil

from lumina.launch.crew import Crew
from lumina.launch.messages import Beat, Channel, Hello, Message
from lumina.launch.ranks import ends_with
from lumina.launch.transport import addresses

VERSION = version("lumina-t2x")
BEAT_SECONDS = 1.0
LOST_SECONDS = 10.0
"""Of silence, after which the supervisor takes a host for lost."""
_ALONE_SECONDS = 8.0  # after which an agent ends: its ranks are gone when others take their place
CONNECT_SECONDS = 20.0
_TRY_SECONDS = 3.0
_POLL_SECONDS = 0.05
_ENDING_SECONDS = 15.0


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lumina.launch.agent", description=__doc__)
    parser.add_argument("--supervisor", required=True, help="its addresses, with commas between")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--replaces", help="PID@SECONDS of an agent that was lost, which is killed if it is there")
    arguments = parser.parse_args()
    if sys.platform != "linux":
        print("lumina launch runs on Linux; elsewhere use torchrun … -m lumina train", file=sys.stderr)
        return 1
    if arguments.replaces:
        _kill(*arguments.replaces.split("@"))
    try:
        connection = _connect(arguments.supervisor.split(","), arguments.port)
    except OSError as error:
        print(
            f"{socket.gethostname()} cannot reach the host that launches, at {arguments.supervisor} port "
            f"{arguments.port} ({error}): let connections through between the hosts, or launch on one of them",
            file=sys.stderr,
        )
        return 1
    channel = Channel(connection)
    born = psutil.Process().create_time()
    mine = [address for _, address in addresses()]
    # First the address in the network by which the supervisor was reached.
    mine.sort(key=lambda address: address != channel.here)
    channel.send(Hello(arguments.token, os.getpid(), born, mine, VERSION))
    return _serve(channel)


def _serve(channel: Channel) -> int:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    crew, over, lost = Crew(), threading.Event(), threading.Event()
    orders: SimpleQueue[Message] = SimpleQueue()
    threading.Thread(target=_listen, args=(channel, orders, lost, over), daemon=True).start()
    try:
        while not stop.is_set():
            last = lost.is_set()  # first: what came before the end is then in `orders`
            while not orders.empty():
                for event in crew.handle(orders.get()):
                    channel.send(event)
            if last:
                break
            for event in crew.poll():
                channel.send(event)
            time.sleep(_POLL_SECONDS)
    finally:
        crew.close()
        over.set()
        channel.close()
    return 0


def _listen(channel: Channel, orders: SimpleQueue, lost: threading.Event, over: threading.Event) -> None:
    """In a thread: the other one may take long to end ranks, or wait for a disk, and is there nevertheless."""
    beaten = 0.0
    try:
        while not over.wait(_POLL_SECONDS):
            for order in channel.receive():
                orders.put(order)
            if _is_lost(channel):
                break
            if time.monotonic() - beaten >= BEAT_SECONDS:
                beaten = time.monotonic()
                channel.send(Beat())
    finally:
        lost.set()
    if not over.wait(_ENDING_SECONDS):
        os._exit(1)  # the other thread hangs; the system ends the ranks with this process


def _is_lost(channel: Channel) -> bool:
    return channel.closed or time.monotonic() - channel.heard > _ALONE_SECONDS


def _connect(hosts: list[str], port: int) -> socket.socket:
    """To the first address that answers.

    Raises:
        OSError: where none does.
    """
    deadline = time.monotonic() + CONNECT_SECONDS
    with ThreadPoolExecutor(len(hosts)) as pool:  # one that leads nowhere does not keep the others waiting
        while True:
            tries = [pool.submit(socket.create_connection, (host, port), _TRY_SECONDS) for host in hosts]
            done = [attempt.exception() for attempt in tries]
            connections = [a.result() for a, error in zip(tries, done, strict=True) if error is None]
            for further in connections[1:]:
                further.close()
            if connections:
                return connections[0]
            if time.monotonic() > deadline:
                raise next(error for error in done if error is not None)
            time.sleep(0.5)


def _kill(pid: str, born: str) -> None:
    try:
        process = psutil.Process(int(pid))
        if abs(process.create_time() - float(born)) < 1.0 and "lumina.launch.agent" in process.cmdline():
            children = process.children(recursive=True)
            process.kill()
            # The system kills the ranks with it; what they had started in sessions of their own is ended here.
            for child in children:
                if child.is_running():
                    child.kill()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return


if __name__ == "__main__":
    # It ends with the program that has started it here: with ssh on another host that is sshd's part.
    ends_with(os.getppid(), ctypes.CDLL(None, use_errno=True))()
    sys.exit(main())
