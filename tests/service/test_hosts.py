"""The names that a service answers to."""

import pytest

from service.hosts import TrustedHosts
from utils.errors import UserError


@pytest.mark.parametrize(
    ("bound", "more", "trusted", "untrusted"),
    [
        ((), (), ["localhost", "127.0.0.1:5000", "[::1]:5000", "::1", "Localhost.", ""], ["evil.example", "10.0.0.7"]),
        (("10.0.0.7",), (), ["10.0.0.7:5000", "localhost"], ["10.0.0.8", "0.0.0.0", "10.0.0.7.evil.example"]),
        (("gate", "10.0.0.7"), (), ["gate:80", "10.0.0.7"], ["gate.evil.example", "evil.example"]),
        (("0.0.0.0",), (), ["10.0.0.7", "192.168.1.2:5000", "[fe80::1]:5000"], ["evil.example", "gate"]),
        (("::",), (), ["10.0.0.7", "[2001:db8::1]"], ["evil.example"]),
        (("0", "0.0.0.0"), ("Gate.Example.org", "b"), ["gate.example.org:443", "b"], ["example.org"]),
        ((), ("*",), ["evil.example", "10.0.0.7"], []),
    ],
)
def test_known_names_are_trusted_and_others_are_not(bound, more, trusted, untrusted):
    hosts = TrustedHosts(bound, more)
    assert [host for host in trusted if not hosts.trusts(host)] == []
    assert [host for host in untrusted if hosts.trusts(host)] == []


@pytest.mark.parametrize("name", ["", "http://gate", "a b", "a,b", "n" * 300, "tür"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(UserError, match=r"--trusted-hosts '.*a name such as"):
        TrustedHosts(more=[name])
