"""Finds the address, the port and the network interface over which ranks meet. Standard library only."""

from __future__ import annotations  # Python 3.9 of a node outside its container runs this too

import errno
import fcntl
import socket
import struct

PORTS = range(20_000, 32_768)
"""Below Linux's ephemeral range, in which any program's outgoing connection may sit on the port."""
STRIDE = 16
"""Ports a job may step over before it reaches those of the next job id."""


def first_port(job_id: int, restarts: int = 0) -> int:
    """Where a job begins to look for a free port: neighbouring job ids begin STRIDE apart, a restart begins elsewhere."""
    return PORTS.start + (job_id * STRIDE + restarts * 7) % len(PORTS)


def reserve_port(first: int, only: bool = False) -> socket.socket:
    """Bind the first free port from `first` on, and hold it until the socket is closed.

    The socket never listens, and allows reuse only once it is bound: torch's store, which asks for reuse, can still bind
    and listen, but no second reservation can, so two jobs on one node never pick the same port.
    Raises OSError (EADDRINUSE) when `only` that port may be taken and it is in use, or when no port is free.
    """
    candidates = (
        [first] if only else [PORTS.start + (first - PORTS.start + step) % len(PORTS) for step in range(len(PORTS))]
    )
    for port in candidates:
        held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            held.bind(("", port))
        except OSError as error:
            held.close()
            if error.errno != errno.EADDRINUSE:
                raise
            continue
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return held
    raise OSError(errno.EADDRINUSE, f"port {first} is in use" if only else "no free port from 20000 to 32767")


def resolves(host: str) -> bool:
    """Whether a host name leads to an address other hosts can reach: Debian maps a host's own name to 127.0.1.1."""
    try:
        return not socket.gethostbyname(host).startswith("127.")
    except OSError:
        return False


def interface_to(address: str) -> str | None:
    """Name of the interface whose address this host would use towards `address`, or None where it cannot be told.

    Nothing is sent: connecting a datagram socket only looks the route up.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
            own = probe.getsockname()[0]
        except OSError:
            return None
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), 0x8915, request)  # SIOCGIFADDR
            except OSError:
                continue  # this interface has no IPv4 address
            if socket.inet_ntoa(answer[20:24]) == own:
                return name
    return None
