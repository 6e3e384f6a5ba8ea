"""Machines behind links of a known speed: network namespaces, joined by one router in this process.

Every machine has one interface, a TUN device in its own namespace. The router takes whole IP packets from it, lets them
wait as long as the sender's uplink, the way and the receiver's downlink take, and counts them. So whatever the programs
speak, it goes through the same link, and the same counter sees it. Needs Linux and the rights of root.
"""

import ctypes
import fcntl
import heapq
import itertools
import os
import select
import struct
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

IP = "/sbin/ip"
SUBNET = "10.77.0"
QUEUE_S = 0.2  # what would wait longer is dropped, as a home router does it; TCP notices and slows down
READS_MAX = 64  # packets taken from one interface before the others have their turn
CLONE_NEWNET = 0x40000000
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
TUN_L3_WITH_HEADER = 0x0001 | 0x1000 | 0x4000  # IFF_TUN, IFF_NO_PI, IFF_VNET_HDR
OFFLOAD = 0x01 | 0x02  # checksums and TCP over IPv4: packets come as large as TCP makes them
HEADER = struct.Struct("<BBHHHH")  # virtio_net_hdr: flags, kind, bytes of headers, bytes of a segment, checksum
PACKET_MAX = (1 << 16) + HEADER.size


def enter(namespace: str) -> None:
    """Move the calling thread, and all threads that it starts, into a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", namespace).open() as file:
        if libc.setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")


def possible() -> bool:
    """Whether this machine and user can have such links."""
    return os.geteuid() == 0 and Path("/dev/net/tun").exists() and Path(IP).exists()


@dataclass(frozen=True)
class Link:
    """How fast a machine sends and receives, in bits a second."""

    up: float
    down: float


@dataclass
class _Port:
    """One machine at the router."""

    device: int
    link: Link
    up_free_s: float = 0.0
    down_free_s: float = 0.0
    up_bytes: int = 0
    down_bytes: int = 0
    dropped: int = 0


@dataclass(order=True)
class _Packet:
    due_s: float
    number: int
    arrived: bool = field(compare=False)
    """Whether it is past the receiver's downlink, and only has to be handed over."""
    port: _Port = field(compare=False)
    size: int = field(compare=False)
    data: bytes = field(compare=False)


class Network:
    """Namespaces by name, each with one address, and the router between them. All bytes are those of IP packets."""

    def __init__(self, links: Mapping[str, Link], round_trip_s: float) -> None:
        self._names = list(links)
        self._way_s = round_trip_s / 2
        self._links = links
        self._ports: dict[str, _Port] = {}
        self._by_address: dict[bytes, _Port] = {}
        self._ended = threading.Event()
        self._router = threading.Thread(target=self._route, daemon=True)
        self.router_cpu_s = 0.0

    def namespace(self, name: str) -> str:
        """The namespace of this machine."""
        return f"swarm{os.getpid()}-{name}"

    def interface(self, name: str) -> str:
        """The interface of this machine in its namespace."""
        return f"sl{os.getpid()}-{self._names.index(name)}"

    def address(self, name: str) -> str:
        """The IPv4 address of this machine."""
        return f"{SUBNET}.{self._names.index(name) + 1}"

    def __enter__(self) -> "Network":
        for name in self._names:
            self._join(name)
        self._router.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._router.is_alive():
            self._router.join(10)
        for name, port in self._ports.items():
            os.close(port.device)
            _ip("netns", "del", self.namespace(name))

    def carried(self, name: str) -> tuple[int, int]:
        """Bytes that this machine has sent and received."""
        port = self._ports[name]
        return port.up_bytes, port.down_bytes

    def dropped(self) -> int:
        """Packets that found a queue full."""
        return sum(port.dropped for port in self._ports.values())

    def _join(self, name: str) -> None:
        namespace, interface = self.namespace(name), self.interface(name)
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", interface.encode(), TUN_L3_WITH_HEADER))
        fcntl.ioctl(device, TUNSETOFFLOAD, OFFLOAD)
        port = _Port(device, self._links[name])
        _ip("netns", "add", namespace)
        self._ports[name] = port
        self._by_address[bytes(map(int, self.address(name).split(".")))] = port
        _ip("link", "set", interface, "netns", namespace)
        _ip("-n", namespace, "addr", "add", f"{self.address(name)}/24", "dev", interface)
        _ip("-n", namespace, "link", "set", interface, "up")
        _ip("-n", namespace, "link", "set", "lo", "up")

    def _route(self) -> None:
        # The links are as fast as they say however busy the machine is.
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -10)
        ports = {port.device: port for port in self._ports.values()}
        waiting: list[_Packet] = []
        numbers = itertools.count()
        poll = select.epoll()
        for device in ports:
            poll.register(device, select.EPOLLIN)
        while not self._ended.is_set():
            left_s = waiting[0].due_s - time.monotonic() if waiting else 0.1
            for device, _ in poll.poll(min(0.1, max(0.0, left_s))):
                for data in _read_all(device):
                    self._send(ports[device], data, waiting, next(numbers))
            now_s = time.monotonic()
            while waiting and waiting[0].due_s <= now_s:
                self._arrive(heapq.heappop(waiting), waiting)
            self.router_cpu_s = time.thread_time()
        poll.close()

    def _send(self, port: _Port, data: bytes, waiting: list[_Packet], number: int) -> None:
        to = self._by_address.get(data[HEADER.size + 16 : HEADER.size + 20])
        if to is None or data[HEADER.size] >> 4 != 4:
            return  # the kernel's own multicasts
        size, now_s = _wire_bytes(data), time.monotonic()
        if port.up_free_s - now_s > QUEUE_S:
            port.dropped += 1
            return
        port.up_bytes += size
        port.up_free_s = max(now_s, port.up_free_s) + 8 * size / port.link.up
        heapq.heappush(waiting, _Packet(port.up_free_s + self._way_s, number, False, to, size, data))

    def _arrive(self, packet: _Packet, waiting: list[_Packet]) -> None:
        port = packet.port
        if packet.arrived:
            with suppress(OSError):  # a machine that is going away
                os.write(port.device, packet.data)
            return
        if port.down_free_s - packet.due_s > QUEUE_S:
            port.dropped += 1
            return
        port.down_bytes += packet.size
        port.down_free_s = max(packet.due_s, port.down_free_s) + 8 * packet.size / port.link.down
        packet.due_s, packet.arrived = port.down_free_s, True
        heapq.heappush(waiting, packet)


def _read_all(device: int) -> list[bytes]:
    found: list[bytes] = []
    with suppress(BlockingIOError):
        while len(found) < READS_MAX:
            found.append(os.read(device, PACKET_MAX))
    return found


def _wire_bytes(data: bytes) -> int:
    """What a packet is on the wire: TCP hands over many segments at once, and each has headers of its own."""
    kind: int
    headers: int
    segment: int
    _, kind, headers, segment, _, _ = HEADER.unpack_from(data)
    size = len(data) - HEADER.size
    segments = -(-(size - headers) // segment) if kind and segment else 1
    return size + (segments - 1) * headers


def _ip(*arguments: str) -> None:
    done = subprocess.run([IP, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def processes(namespaces: Sequence[str]) -> dict[str, list[int]]:
    """The processes in each of these namespaces."""
    wanted = {}
    for namespace in namespaces:
        with suppress(FileNotFoundError):
            wanted[Path("/run/netns", namespace).stat().st_ino] = namespace
    found: dict[str, list[int]] = {namespace: [] for namespace in namespaces}
    for path in Path("/proc").glob("[0-9]*/ns/net"):
        with suppress(OSError):
            namespace = wanted.get(path.stat().st_ino, "")
            if namespace:
                found[namespace].append(int(path.parts[2]))
    return found
