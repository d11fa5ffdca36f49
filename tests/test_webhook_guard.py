"""Nobody reaches into our network through a webhook: 45 URLs, names that change their answer, addresses, ports."""

import itertools
import socket
import threading

import pytest
from receivers import Receiver

from inferfleet.tasks.errors import UrlNotAllowed
from inferfleet.tasks.hook_url import parse_url
from inferfleet.workers.webhooks.guard import Policy, ResolverFailed, is_public, resolve, within
from inferfleet.workers.webhooks.sender import Sender

PUBLIC = "93.184.216.34"
#: What names mean to the resolver of these tests.
NAMES = {
    "public.example": [PUBLIC],
    "loopback.example": ["127.0.0.1"],
    "private.example": ["10.1.2.3"],
    "mixed.example": [PUBLIC, "127.0.0.1"],
    "mixed6.example": [PUBLIC, "::1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "compat.example": ["::127.0.0.1"],
    "nat64.example": ["64:ff9b::7f00:1"],
    "6to4.example": ["2002:7f00:1::"],
    "site.example": ["fec0::1"],
    "link.example": ["fe80::1%lo"],
    "metadata.example": ["169.254.169.254"],
    "azure.example": ["168.63.129.16"],
    "alibaba.example": ["100.100.100.200"],
    "oracle.example": ["192.0.0.192"],
    "zero.example": ["0.0.0.0"],
    "localhost": ["127.0.0.1"],
    "a.localhost": ["127.0.0.1"],
    "metadata.google.internal": ["169.254.169.254"],
    "redis": ["10.0.0.5"],
}
#: Each of them would lead to something of ours, or might, somewhere.
INSIDE = [
    "http://127.0.0.1/", "https://127.0.0.1/", "http://127.1/", "http://2130706433/", "http://0x7f000001/",
    "http://017700000001/", "http://0177.0.0.1/", "http://0/", "http://0.0.0.0/", "http://127.0.0.1./",
    "http://[::1]/", "http://[::]/", "http://[::ffff:127.0.0.1]/", "http://[::ffff:7f00:1]/", "http://[::127.0.0.1]/",
    "http://[64:ff9b::7f00:1]/", "http://[64:ff9b:1::7f00:1]/", "http://[2002:7f00:1::]/", "http://[fec0::1]/",
    "http://[fe80::1%25lo]/", "http://[fd00:ec2::254]/", "http://169.254.169.254/latest/meta-data/",
    "http://169.254.170.2/v2/credentials", "http://100.100.100.200/", "http://192.0.0.192/", "http://168.63.129.16/",
    "http://10.0.0.1/", "http://224.0.0.1/", "http://255.255.255.255/",
    "http://public.example@127.0.0.1/", "http://127.0.0.1#@public.example/", "http://127.0.0.1\\@public.example/",
    "http://１２７.0.0.1/", "http://①②⑦.⓪.⓪.①/", "http://localhost/", "http://a.localhost/",
    "http://loopback.example/", "http://mixed.example/", "http://mapped.example/", "http://azure.example/",
    "http://metadata.google.internal/", "http://redis/", "http://public.example:22/", "file:///etc/passwd",
    "gopher://127.0.0.1:6379/_PING",
]  # fmt: skip


class Spy:
    """Stands between the sender and the network: where it wanted to connect, and what it asked the resolver."""

    def __init__(self, monkeypatch):
        self.connected = []
        self.asked = []
        monkeypatch.setattr(socket, "create_connection", self._connect)

    def _connect(self, address, *args, **kwargs):
        self.connected.append(address[0])
        raise ConnectionRefusedError

    def resolve(self, host, port):
        self.asked.append(host)
        return NAMES[host]


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


def test_there_are_45_urls():
    assert len(set(INSIDE)) == 45


@pytest.mark.parametrize("url", INSIDE)
def test_no_url_that_leads_inside_is_connected_to(spy, url):
    # given the widest policy that an operator can have in production
    answer = Sender(Policy(insecure=True), resolver=spy.resolve).post(url, {}, b"{}")
    assert (answer.status, answer.error) == (None, "url_not_allowed")
    assert spy.connected == []


@pytest.mark.parametrize("name", [name for name in NAMES if name != "public.example"])
def test_no_name_with_an_inner_address_is_connected_to(spy, name):
    answer = Sender(Policy(), resolver=spy.resolve).post(f"https://{name}/", {}, b"{}")
    assert answer.error == "url_not_allowed"
    assert spy.connected == []


def test_a_public_name_is_connected_to_by_its_address_after_one_question(spy):
    answer = Sender(Policy(), resolver=spy.resolve).post("https://public.example/hook", {}, b"{}")
    assert answer.error == "connection_refused"
    assert (spy.connected, spy.asked) == ([PUBLIC], ["public.example"])


def test_a_public_address_is_connected_to(spy):
    Sender(Policy(), resolver=spy.resolve).post(f"https://{PUBLIC}/", {}, b"{}")
    assert (spy.connected, spy.asked) == ([PUBLIC], [])


@pytest.mark.parametrize("inner", ["127.0.0.1", "::1", "10.0.0.1", "169.254.169.254"])
def test_a_name_that_changes_its_answer_is_connected_to_at_the_checked_address_or_not_at_all(monkeypatch, inner):
    # given a name that is public at every other look-up, beginning with either
    spy = Spy(monkeypatch)
    for first in (0, 1):
        looks = itertools.count(first)
        sender = Sender(Policy(), resolver=lambda host, port, looks=looks: [[PUBLIC], [inner]][next(looks) % 2])
        for _ in range(20):
            sender.post("https://rebind.example/", {}, b"{}")
    assert set(spy.connected) == {PUBLIC}
    assert len(spy.connected) == 20


@pytest.mark.parametrize(
    "address",
    ["0.1.2.3", "10.9.9.9", "100.64.0.1", "100.127.255.255", "127.9.9.9", "168.63.129.16", "169.254.1.1", "172.31.0.1",
     "192.0.0.1", "192.0.0.192", "192.0.2.7", "192.88.99.1", "192.168.1.1", "198.19.255.255", "198.51.100.1",
     "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "::", "::1", "::7f00:1",
     "::ffff:0:127.0.0.1", "64:ff9b::a00:1", "64:ff9b:1::1", "100::1", "2001::1", "2001:10::1", "2001:db8::1",
     "2002:a00:1::", "3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1"],
)  # fmt: skip
def test_addresses_that_are_not_public(address):
    assert not is_public(parse_url(f"https://[{address}]/" if ":" in address else f"https://{address}/").address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "8.8.8.8", PUBLIC, "100.63.255.255", "172.32.0.1", "168.63.129.17", "2606:4700::1111",
                "2a00:1450::1", "2600::1"]
)  # fmt: skip
def test_addresses_that_are_public(address):
    assert is_public(parse_url(f"https://[{address}]/" if ":" in address else f"https://{address}/").address)


@pytest.mark.parametrize(
    ("policy", "url", "allowed"),
    [
        (Policy(), "https://public.example/", True),
        (Policy(), "https://public.example:443/", True),
        (Policy(), "http://public.example/", False),
        (Policy(), "https://public.example:80/", False),
        (Policy(), "https://public.example:8443/", False),
        (Policy(), "https://public.example:22/", False),
        (Policy(insecure=True), "http://public.example/", True),
        (Policy(insecure=True), "http://public.example:443/", True),
        (Policy(insecure=True), "http://public.example:8080/", False),
        (Policy(insecure=True), "http://127.0.0.1/", False),
        (Policy(loopback=True), "http://127.0.0.1:8080/", True),
        (Policy(loopback=True), "https://[::1]:8443/", True),
        (Policy(loopback=True), "http://10.0.0.1:8080/", False),
        (Policy(loopback=True), "https://10.0.0.1/", False),
        (Policy(loopback=True), f"http://{PUBLIC}/", False),
        (Policy(loopback=True), f"https://{PUBLIC}/", True),
    ],
)
def test_the_door_asks_scheme_port_and_spelled_out_addresses(policy, url, allowed):
    if allowed:
        policy.url(url)
        return
    with pytest.raises(UrlNotAllowed) as caught:
        policy.url(url)
    assert caught.value.param == "webhook"


def test_the_development_setting_opens_this_machine_and_nothing_else(spy):
    sender = Sender(Policy(loopback=True), resolver=spy.resolve)
    answers = [sender.post(f"http://{name}:8080/", {}, b"{}").error for name in NAMES]
    assert {name for name, error in zip(NAMES, answers, strict=True) if error == "connection_refused"} == {
        "loopback.example", "mapped.example", "localhost", "a.localhost",
    }  # fmt: skip
    assert set(spy.connected) == {"127.0.0.1"}


def test_a_resolver_that_never_answers_costs_its_time_and_no_more():
    stuck = threading.Event()
    url = parse_url("https://slow.example/")
    with pytest.raises(ResolverFailed):
        within(lambda host, port: [str(stuck.wait(5))], url, 0.05)
    stuck.set()


def test_a_name_that_is_not_there_is_a_failed_attempt():
    def nowhere(host, port):
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    assert Sender(Policy(), resolver=nowhere).post("https://nowhere.example/", {}, b"").error == "name_not_resolved"


def test_the_systems_resolver_gives_addresses():
    assert "127.0.0.1" in resolve("127.0.0.1", 443)


def test_no_proxy_of_the_environment_is_asked(monkeypatch):
    with Receiver() as proxy, Receiver() as receiver:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert Sender(Policy(loopback=True)).post(receiver.url, {}, b"{}").status == 200
        assert (proxy.connections, receiver.connections) == (0, 1)
