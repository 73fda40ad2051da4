"""launcher/supervise/rendezvous.py on real sockets: one job per port, which torch's TCPStore can still use; interfaces."""

import errno
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from launcher.supervise.rendezvous import (
    PORTS,
    STRIDE,
    first_port,
    interface_to,
    master_address,
    own_address,
    reachable,
    reserve_port,
    with_suffix,
)
from tests.conftest import ROOT, tool

RESERVE = """
import sys
from launcher.supervise.rendezvous import reserve_port
sys.stdin.readline()
reservations = [reserve_port(int(sys.argv[1])) for _ in range(4)]
print(*(reserved.getsockname()[1] for reserved in reservations), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def reservation() -> Iterator[socket.socket]:
    with reserve_port(PORTS.start + 4321) as reserved:
        yield reserved


def port_of(reserved: socket.socket) -> int:
    return int(reserved.getsockname()[1])


def test_no_port_is_reserved_twice() -> None:
    with ExitStack() as stack:
        ports = [port_of(stack.enter_context(reserve_port(PORTS.start + 100))) for _ in range(50)]
    assert len(set(ports)) == 50


def test_no_port_is_reserved_by_two_processes() -> None:
    command = [sys.executable, "-c", RESERVE, str(PORTS.start + 200)]
    pipe = subprocess.PIPE
    writers = [subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) for _ in range(8)]
    for writer in writers:  # all have imported what they need before the last one gets its line
        assert writer.stdin
        print(file=writer.stdin, flush=True)
    ports = [port for writer in writers if writer.stdout for port in writer.stdout.readline().split()]
    for writer in writers:
        writer.communicate("\n", timeout=20)
    assert len(ports) == 32
    assert len(set(ports)) == 32


def test_a_released_port_can_be_reserved_again() -> None:
    ports = []
    for _ in range(2):
        with reserve_port(PORTS.start + 300) as reserved:
            ports.append(port_of(reserved))
    assert ports[0] == ports[1]


@pytest.mark.parametrize("reuse", [0, 1], ids=["plain", "with SO_REUSEADDR"])
@pytest.mark.parametrize("host", ["", "127.0.0.1"], ids=["all addresses", "loopback"])
def test_a_port_in_use_is_skipped(host: str, reuse: int) -> None:
    with closing(socket.socket()) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        other.bind((host, 0))
        other.listen()
        with reserve_port(port_of(other)) as reserved:
            assert port_of(reserved) != port_of(other)


def test_a_reserved_port_cannot_be_reserved_by_number(reservation: socket.socket) -> None:
    with pytest.raises(OSError, match=str(port_of(reservation))) as caught:
        reserve_port(port_of(reservation), only=True)
    assert caught.value.errno == errno.EADDRINUSE


def test_a_program_without_reuse_cannot_bind_a_reserved_port(reservation: socket.socket) -> None:
    with closing(socket.socket()) as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port_of(reservation)))


def test_nobody_can_connect_to_a_port_that_is_only_reserved(reservation: socket.socket) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port_of(reservation)), timeout=1)


def test_a_server_with_reuse_can_listen_on_a_reserved_port(reservation: socket.socket) -> None:
    with closing(socket.socket()) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", port_of(reservation)))
        server.listen()
        with socket.create_connection(("127.0.0.1", port_of(reservation)), timeout=1) as client:
            connection, peer = server.accept()
            connection.close()
            assert peer == client.getsockname()


def test_torchs_store_can_listen_on_a_reserved_port(reservation: socket.socket) -> None:
    distributed = pytest.importorskip("torch.distributed")
    stores = [distributed.TCPStore("127.0.0.1", port_of(reservation), 1, is_master) for is_master in (True, False)]
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value"
    with pytest.raises(OSError, match=str(port_of(reservation))):
        reserve_port(port_of(reservation), only=True)


@pytest.mark.parametrize("first", [PORTS.start, PORTS.stop - 1], ids=["lowest", "highest"])
def test_the_search_wraps_around_within_the_range(first: int) -> None:
    with ExitStack() as stack:
        ports = {port_of(stack.enter_context(reserve_port(first))) for _ in range(3)}
    assert len(ports) == 3
    assert ports < set(PORTS)


def test_the_range_is_below_the_ephemeral_ports_of_linux() -> None:
    assert (PORTS.start, PORTS.stop - 1) == (20_000, 32_767)


@pytest.mark.parametrize("job_id", [1, 799, 12_345, 67_043_327])
@pytest.mark.parametrize("restarts", [0, 1, 9])
def test_neighboring_jobs_and_restarts_start_apart(job_id: int, restarts: int) -> None:
    first = first_port(job_id, restarts)
    neighbors = {first_port(job_id + step, restarts) for step in range(1, 100)}
    assert first in PORTS
    assert min(abs(first - other) for other in neighbors) >= STRIDE
    assert first != first_port(job_id, restarts + 1)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("192.0.2.7", True), ("127.0.0.1", False), ("localhost", False), ("no-such-host.invalid", False)],
)
def test_only_an_address_of_its_own_is_reachable(host: str, expected: bool) -> None:
    assert reachable(host) is expected


@pytest.mark.parametrize(
    ("host", "expected"), [("jwb0001", "jwb0001i"), ("jwb0001.juwels", "jwb0001i.juwels"), ("a-1.b.c", "a-1i.b.c")]
)
@pytest.mark.site(
    case="ranks must meet at `jwb0001i`", before="could not be said", after="`network: {master_suffix: i}`"
)
def test_a_suffix_goes_to_the_short_name(host: str, expected: str) -> None:
    assert with_suffix(host, "i") == expected


def test_what_the_user_wants_must_resolve() -> None:
    assert master_address(["n1"], "192.0.2.9", lambda _: None) == "192.0.2.9"
    assert master_address(["192.0.2.9"], "{host}", lambda _: None) == "192.0.2.9"
    with pytest.raises(OSError, match="not known|resolution"):
        master_address(["n1"], "ib-{host}.invalid", lambda _: None)


@pytest.mark.parametrize(
    ("host", "controllers", "expected"),
    [
        ("192.0.2.7", None, "192.0.2.7"),
        ("no-such-host.invalid", "192.0.2.8", "192.0.2.8"),
        ("no-such-host.invalid", "127.0.0.1", None),
        ("localhost", "localhost", None),
        ("localhost", None, None),
    ],
    ids=["its name", "NodeAddr", "a loopback NodeAddr", "NodeAddr is the name", "no scontrol"],
)
def test_the_master_is_at_an_address_of_its_own(host: str, controllers: str | None, expected: str | None) -> None:
    found = master_address([host, "192.0.2.9"], None, lambda _: controllers)
    assert found in ([expected] if expected else [own_address("192.0.2.9") or host])


SITE = """
import sys
from launcher.supervise.rendezvous import interface_to, master_address, reserve_port
address = master_address(["head", "other"], None, lambda node: node)
with reserve_port(20000) as reserved:
    print(address, interface_to(address), interface_to("other"), reserved.getsockname()[1])
"""


def in_a_network(hosts: str, *addresses: str) -> str:
    """Run SITE in a network of its own with an interface `ib0` that has these addresses, and with this /etc/hosts."""
    ip = tool("ip")
    lines = [
        f"{ip} link add ib0 type veth peer name ib1",
        f"{ip} link set ib0 up",
        f"{ip} link set ib1 up",
        f"{ip} link set lo up",
    ]
    lines += [f"{ip} address add {address} dev ib0 {'nodad' if ':' in address else ''}" for address in addresses]
    lines += ['mount --bind "$HOSTS" /etc/hosts', f"exec \"{sys.executable}\" -c '{SITE}'"]
    command = [tool("unshare"), "--net", "--mount", "sh", "-c", " && ".join(lines)]
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(hosts)
        file.flush()
        environ = os.environ | {"HOSTS": file.name}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, env=environ)
    if "not permitted" in done.stderr:
        pytest.skip("needs root, to make a network")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.site(
    case="`127.0.1.1 HOST` in /etc/hosts, no NodeAddr",
    before="ranks on the first node used lo and hung",
    after="its own address",
)
def test_debians_loopback_name_is_not_given_to_other_hosts() -> None:
    hosts = "127.0.0.1 localhost\n127.0.1.1 head\n198.18.77.2 other\n"
    assert in_a_network(hosts, "198.18.77.1/24") == "198.18.77.1 ib0 ib0 20000"


@pytest.mark.site(
    case="hosts have IPv6 addresses only", before="no interface was found", after="the one that has the route"
)
def test_ipv6_alone_is_enough() -> None:
    hosts = "::1 localhost\nfd77::1 head\nfd77::2 other\n"
    assert in_a_network(hosts, "fd77::1/64") == "head ib0 ib0 20000"
    assert in_a_network(hosts.replace("fd77::1 head", "::1 head"), "fd77::1/64") == "fd77::1 ib0 ib0 20000"


def test_the_interface_to_this_host_is_the_loopback() -> None:
    assert interface_to("127.0.0.1") == "lo"


@pytest.mark.parametrize("address", ["255.255.255.255", "no-such-host.invalid", "not an address"])
def test_there_is_no_interface_without_a_route(address: str) -> None:
    assert interface_to(address) is None


def test_the_interface_to_another_host_is_the_one_that_has_the_route() -> None:
    address = "192.0.2.7"
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            pytest.skip("this machine has no route to other hosts")
    assert interface_to(address) in {name for _, name in socket.if_nameindex()} - {"lo"}
