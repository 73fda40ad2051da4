"""Finds the address, the port and the network interface over which ranks connect. Standard library only."""

from __future__ import annotations  # the node's own Python outside a container may be 3.9

import errno
import fcntl
import socket
import struct

PORTS = range(20_000, 32_768)
"""Below Linux's ephemeral range: there, an outgoing connection of any program may already use the port."""
STRIDE = 16
"""Number of ports that a job can try before it reaches the first port of the next job id."""
SIOCGIFADDR = 0x8915
"""Linux's ioctl request for the IPv4 address of an interface."""


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
        reservation = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
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


def resolves(host: str) -> bool:
    """Return whether a host name resolves to an address that other hosts can reach.

    A loopback address does not count: Debian maps a host's own name to 127.0.1.1.
    """
    try:
        return not socket.gethostbyname(host).startswith("127.")
    except OSError:
        return False


def interface_to(address: str) -> str | None:
    """Return the name of the network interface that this host uses to reach `address`; None if that is unknown.

    Nothing is sent: connecting a datagram socket only looks up the route.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # any port will do
            own_address = probe.getsockname()[0]
        except OSError:
            return None
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
            except OSError:
                continue  # this interface has no IPv4 address
            if socket.inet_ntoa(answer[20:24]) == own_address:
                return name
    return None
