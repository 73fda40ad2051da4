"""launcher/supervise/rendezvous.py, on real sockets: a port is one job's alone, yet torch's store can use it; and
which interface it is."""

import errno
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from launcher.supervise.rendezvous import PORTS, STRIDE, first_port, interface_to, reserve_port, resolves
from tests.conftest import ROOT

RESERVE = """
import sys
from launcher.supervise.rendezvous import reserve_port
sys.stdin.readline()
held = [reserve_port(int(sys.argv[1])) for _ in range(4)]
print(*(one.getsockname()[1] for one in held), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def held() -> Iterator[socket.socket]:
    with reserve_port(PORTS.start + 4321) as one:
        yield one


def port_of(one: socket.socket) -> int:
    return int(one.getsockname()[1])


def test_no_port_is_given_twice_while_it_is_held() -> None:
    with ExitStack() as stack:
        ports = [port_of(stack.enter_context(reserve_port(PORTS.start + 100))) for _ in range(50)]
    assert len(set(ports)) == 50


def test_no_port_is_given_to_two_processes_at_once() -> None:
    command = [sys.executable, "-c", RESERVE, str(PORTS.start + 200)]
    pipe = subprocess.PIPE
    writers = [subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) for _ in range(8)]
    for writer in writers:  # all have imported what they need by the time the last one is told to go
        assert writer.stdin
        print(file=writer.stdin, flush=True)
    ports = [port for writer in writers if writer.stdout for port in writer.stdout.readline().split()]
    for writer in writers:
        writer.communicate("\n", timeout=20)
    assert len(ports) == 32
    assert len(set(ports)) == 32


def test_a_port_that_was_let_go_is_given_again() -> None:
    ports = []
    for _ in range(2):
        with reserve_port(PORTS.start + 300) as one:
            ports.append(port_of(one))
    assert ports[0] == ports[1]


@pytest.mark.parametrize("reuse", [0, 1], ids=["plain", "with SO_REUSEADDR"])
@pytest.mark.parametrize("host", ["", "127.0.0.1"], ids=["all addresses", "loopback"])
def test_a_port_somebody_listens_on_is_skipped(host: str, reuse: int) -> None:
    with closing(socket.socket()) as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        other.bind((host, 0))
        other.listen()
        with reserve_port(port_of(other)) as one:
            assert port_of(one) != port_of(other)


def test_a_reserved_port_is_refused_to_who_wants_no_other(held: socket.socket) -> None:
    with pytest.raises(OSError, match=str(port_of(held))) as caught:
        reserve_port(port_of(held), only=True)
    assert caught.value.errno == errno.EADDRINUSE


def test_a_reserved_port_is_refused_to_programs_that_ask_for_no_reuse(held: socket.socket) -> None:
    with closing(socket.socket()) as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port_of(held)))


def test_nobody_can_connect_to_a_port_that_is_only_reserved(held: socket.socket) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port_of(held)), timeout=1)


def test_a_server_that_asks_for_reuse_can_listen_on_a_reserved_port(held: socket.socket) -> None:
    with closing(socket.socket()) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("", port_of(held)))
        server.listen()
        with socket.create_connection(("127.0.0.1", port_of(held)), timeout=1) as client:
            connection, peer = server.accept()
            connection.close()
            assert peer == client.getsockname()


def test_torchs_store_can_listen_on_a_reserved_port(held: socket.socket) -> None:
    distributed = pytest.importorskip("torch.distributed")
    stores = [distributed.TCPStore("127.0.0.1", port_of(held), 1, is_master) for is_master in (True, False)]
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value"
    with pytest.raises(OSError, match=str(port_of(held))):
        reserve_port(port_of(held), only=True)


@pytest.mark.parametrize("first", [PORTS.start, PORTS.stop - 1], ids=["lowest", "highest"])
def test_the_search_goes_round_within_the_range(first: int) -> None:
    with ExitStack() as stack:
        ports = {port_of(stack.enter_context(reserve_port(first))) for _ in range(3)}
    assert len(ports) == 3
    assert ports < set(PORTS)


def test_the_range_is_below_the_ephemeral_ports_of_linux() -> None:
    assert (PORTS.start, PORTS.stop - 1) == (20_000, 32_767)


@pytest.mark.parametrize("job_id", [1, 799, 12_345, 67_043_327])
@pytest.mark.parametrize("restarts", [0, 1, 9])
def test_neighbouring_jobs_and_restarts_start_apart(job_id: int, restarts: int) -> None:
    first = first_port(job_id, restarts)
    neighbours = {first_port(job_id + step, restarts) for step in range(1, 100)}
    assert first in PORTS
    assert min(abs(first - other) for other in neighbours) >= STRIDE
    assert first != first_port(job_id, restarts + 1)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("192.0.2.7", True), ("127.0.0.1", False), ("localhost", False), ("no-such-host.invalid", False)],
)
def test_a_name_resolves_when_others_could_reach_it(host: str, expected: bool) -> None:
    assert resolves(host) is expected


def test_the_interface_to_this_host_is_the_loopback() -> None:
    assert interface_to("127.0.0.1") == "lo"


@pytest.mark.parametrize("address", ["255.255.255.255", "no-such-host.invalid", "not an address"])
def test_no_interface_leads_to_where_there_is_no_route(address: str) -> None:
    assert interface_to(address) is None


def test_the_interface_to_another_host_is_the_one_that_has_the_route() -> None:
    address = "192.0.2.7"
    with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        try:
            probe.connect((address, 9))
        except OSError:
            pytest.skip("this machine has no route to other hosts")
    assert interface_to(address) in {name for _, name in socket.if_nameindex()} - {"lo"}
