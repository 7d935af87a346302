"""What ranks tell each other about themselves, apart from the collectives: lines of JSON over TCP.

Every rank holds one connection to rank 0, and rank 0 one to every other rank: as many as Gloo opens on each
rank anyway. A process that is killed closes its connections at once (the kernel does it), so that its end
needs no waiting for.
"""

import json
import os
import secrets
import signal
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from torch.distributed.distributed_c10d import _get_default_store

from weft.config.errors import RunError

_PATIENCE = 60.0  # seconds from the first rank that is ready to the last one
_READ = 1 << 16  # bytes read at a time


@dataclass(frozen=True)
class Beat:
    """A rank as it stands.

    Attributes:
        rank: its number.
        pid: its process.
        started: when that process started, in the kernel's ticks since boot; 0 where unknown.
        host: name of its host, for people.
        place: boot and process-id space in which ``pid`` means something.
        step: the step it is in.
        phase: what it does there.
        count: grows whenever the rank gets on.
        left: None while it runs, "" once it has finished, else why it stopped.
    """

    rank: int
    pid: int
    started: int
    host: str
    place: str
    step: int = 0
    phase: str = "start"
    count: int = 0
    left: str | None = None

    @classmethod
    def own(cls, rank: int) -> "Beat":
        """This process as rank ``rank``."""
        return cls(rank, os.getpid(), start_time(os.getpid()), socket.gethostname(), _place())

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def where(self) -> str:
        """Step and phase, for people."""
        return f"at step {self.step} in {self.phase}"


def start_time(pid: int) -> int:
    """When a process started (field 22 of ``/proc/PID/stat``, proc(5)); 0 where that cannot be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[19])  # the name before ")" may hold anything


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def kill(beat: Beat) -> None:
    """SIGKILL the process of a rank if it is on this host, ours, and still the one that told us of itself."""
    if not beat.started or beat.place != _place() or start_time(beat.pid) != beat.started:
        return
    with suppress(OSError):
        if Path(f"/proc/{beat.pid}").stat().st_uid == os.getuid():
            os.kill(beat.pid, signal.SIGKILL)


class Peer:
    """The connection to one rank, and what it told last.

    Attributes:
        link: the socket.
        beat: the newest beat.
        silent: ticks of our own clock since its last word.
    """

    def __init__(self, link: socket.socket, beat: Beat) -> None:
        self.link, self.beat, self.silent = link, beat, 0
        self._rest = b""

    def tell(self, line: bytes) -> None:
        """Send a message; one that finds no room is lost, for its reader has long stopped reading."""
        with suppress(OSError):
            self.link.send(line)

    def hear(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived; None at the end of the connection."""
        try:
            data = self.link.recv(_READ)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [message for line in lines if (message := _message(line))]


def as_line(message: dict[str, Any]) -> bytes:
    """A message as it travels."""
    return json.dumps(message).encode() + b"\n"


def _message(line: bytes) -> dict[str, Any]:
    """A message; empty for what is none (a line cut short, a stranger's words)."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def meet(own: Beat, size: int, key: str) -> dict[int, Peer]:
    """Connect all ranks with rank 0; a collective call of the default process group's ranks.

    Returns:
        Rank 0: all other ranks. The others: rank 0.

    Raises:
        RunError: a rank did not come, or rank 0 cannot be reached.
    """
    store: Any = _get_default_store()
    while hasattr(store, "underlying_store"):  # a prefix
        store = store.underlying_store
    host: str = getattr(store, "host", "localhost")
    if own.rank == 0:
        return _receive(own, size, key, host)
    hub = json.loads(_get_default_store().get(key))
    address = (hub["address"] or host, hub["port"])
    try:
        link = socket.create_connection(address, timeout=_PATIENCE)
    except OSError as error:
        raise RunError(
            f"rank {own.rank} cannot reach rank 0 at {address[0]}, port {address[1]} ({error}); let the "
            "hosts of the run reach one another, or set run.watchdog=0 to run without the watchdog"
        ) from error
    peer = Peer(link, Beat(**hub["beat"]))
    peer.tell(as_line({"token": hub["token"], "beat": asdict(own)}))
    link.setblocking(False)
    return {0: peer}


def _receive(own: Beat, size: int, key: str, host: str) -> dict[int, Peer]:
    """Rank 0's part: tell where it listens, and wait for all."""
    family, address = _towards(host)
    token = secrets.token_hex(16)
    peers: dict[int, Peer] = {}
    until = time.monotonic() + _PATIENCE
    with socket.create_server(("", 0), family=family, backlog=size) as listener:
        hub = {"address": address, "port": listener.getsockname()[1], "token": token, "beat": asdict(own)}
        _get_default_store().set(key, json.dumps(hub))
        while len(peers) < size - 1:
            listener.settimeout(max(0.01, until - time.monotonic()))
            try:
                link, _ = listener.accept()
            except TimeoutError as error:
                missing = sorted(set(range(1, size)) - set(peers))
                raise RunError(
                    f"ranks {missing} did not reach rank 0 within {_PATIENCE:g} s; let the hosts of the run "
                    "reach one another, or set run.watchdog=0 to run without the watchdog"
                ) from error
            link.settimeout(5.0)
            peer = Peer(link, own)
            hello = _first(peer)
            if hello.get("token") != token:
                link.close()
                continue
            peer.beat = Beat(**hello["beat"])
            link.setblocking(False)
            peers[peer.beat.rank] = peer
    return peers


def _first(peer: Peer) -> dict[str, Any]:
    while (messages := peer.hear()) is not None:
        if messages:
            return messages[0]
    return {}


def _towards(host: str) -> tuple[socket.AddressFamily, str]:
    """Our address on the way to ``host``; empty where ``host`` itself is the better name of this machine."""
    family, kind, protocol, _, target = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # chooses a route; nothing is sent
        address = probe.getsockname()[0]
    return family, "" if ip_address(address.partition("%")[0]).is_loopback else address
