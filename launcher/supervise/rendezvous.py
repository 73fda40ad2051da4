"""Finds the address, the port and the network interface over which ranks connect. Standard library only."""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import errno
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

PORTS = range(20_000, 32_768)
"""Below Linux's ephemeral range: there, an outgoing connection of any program may already use the port."""
STRIDE = 16
"""Number of ports that a job can try before it reaches the first port of the next job id."""
SIOCGIFADDR = 0x8915
"""Linux's ioctl request for the IPv4 address of an interface."""
IPV6_ADDRESSES = Path("/proc/net/if_inet6")
"""Linux's table of the IPv6 addresses of all interfaces."""
OUTSIDE = ("192.0.2.1", "2001:db8::1")
"""Addresses of documentation, which no host has: the route to them is the default route."""


def first_port(job_id: int, restarts: int = 0) -> int:
    """Return the port at which a job starts its search: STRIDE apart for neighboring job ids, another one after a restart."""
    return PORTS.start + (job_id * STRIDE + restarts * 7) % len(PORTS)


def reserve_port(first: int, only: bool = False) -> socket.socket:
    """Bind the first free port from `first` on, and reserve it until the returned socket is closed.

    The socket never listens, and sets SO_REUSEADDR only after it is bound. So torch's TCPStore, which sets
    SO_REUSEADDR, can still bind the port and listen on it. A second reservation cannot, so two jobs on one node never
    get the same port.

    With `only`, tries no other port than `first`. Raises OSError (EADDRINUSE) if that port is in use, or if no port is free.
    """
    candidates = (
        [first] if only else [PORTS.start + (first - PORTS.start + step) % len(PORTS) for step in range(len(PORTS))]
    )
    for port in candidates:
        reservation = _new_socket()
        try:
            reservation.bind(("", port))
        except OSError as error:
            reservation.close()
            if error.errno != errno.EADDRINUSE:
                raise
            continue
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return reservation
    raise OSError(errno.EADDRINUSE, f"port {first} is in use" if only else "no free port from 20000 to 32767")


def _new_socket() -> socket.socket:
    """Return a TCP socket for IPv6 and IPv4 together, as TCPStore's is; for IPv4 alone where the kernel has no IPv6."""
    try:
        both = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    except OSError:
        return socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    both.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    return both


def master_address(hosts: Sequence[str], form: str | None, node_address: Callable[[str], str | None]) -> str:
    """Return MASTER_ADDR on the first of `hosts`: a name or an address at which the other hosts reach it.

    `form`: what the user wants instead, with `{host}` for the name of the first host. `node_address` asks the controller.
    Otherwise it is the name of the first host. If that resolves to a loopback address (Debian's installer writes
    `127.0.1.1 HOST`), or not at all, it is the controller's address of the node, or else the own address on the way to the
    next host. Raises OSError if a name that the user wants does not resolve.
    """
    host = hosts[0]
    if form is not None:
        name = (
            form.replace("{host}", host) if not form.startswith("{host}") else with_suffix(host, form[len("{host}") :])
        )
        socket.getaddrinfo(name, None)
        return name
    if reachable(host):
        return host
    address = node_address(host)
    if address and reachable(address):
        return address
    own = (own_address(target) for target in [*hosts[1:2], *OUTSIDE])
    return next((found for found in own if found and reachable(found)), host)


def with_suffix(host: str, suffix: str) -> str:
    """Add a suffix to the short name of a host: `jwb0001.cluster` with `i` is `jwb0001i.cluster`."""
    short, dot, domain = host.partition(".")
    return f"{short}{suffix}{dot}{domain}"


def reachable(host: str) -> bool:
    """Return whether a name or address stands for an address that other hosts can reach: not for a loopback or link's own one."""
    try:
        found = {ipaddress.ip_address(str(item[4][0]).split("%")[0]) for item in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError, ValueError):
        return False
    # Of several addresses, a program may take any: a name that also stands for a loopback address is of no use.
    return bool(found) and not any(address.is_loopback or address.is_link_local for address in found)


def own_address(target: str) -> str | None:
    """Return the address of this host on the way to `target`; None if there is no way.

    Nothing is sent: connecting a datagram socket only looks up the route.
    """
    try:
        found = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)  # any port will do
    except (OSError, UnicodeError):
        return None
    for family, kind, protocol, _, address in found:
        with suppress(OSError), socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0]).split("%")[0]
    return None


def interface_to(address: str) -> str | None:
    """Return the name of the network interface that this host uses to reach `address`; None if that is unknown."""
    own = own_address(address)
    if own is None:
        return None
    return _interface_of_ipv6(own) if ":" in own else _interface_of_ipv4(own)


def _interface_of_ipv4(own: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
            except OSError:
                continue  # this interface has no IPv4 address
            if socket.inet_ntoa(answer[20:24]) == own:
                return name
    return None


def _interface_of_ipv6(own: str) -> str | None:
    wanted = ipaddress.IPv6Address(own).packed.hex()
    with suppress(OSError):
        for line in IPV6_ADDRESSES.read_text(encoding="utf-8", errors="replace").splitlines():
            digits, *_, name = line.split()
            if digits == wanted:
                return name
    return None
