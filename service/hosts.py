"""Which names a service answers to.

A page of another site can make a browser send requests here and read the answers once its own name leads to this
machine (DNS rebinding). Its requests still say that name in their Host header, so only known names are answered.
"""

from __future__ import annotations

from collections.abc import Collection
from ipaddress import ip_address

from utils.errors import UserError

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
ANY = "*"
LONGEST = 253  # letters of a name


class TrustedHosts:
    """The names that requests may ask for."""

    def __init__(self, bound: Collection[str] = (), more: Collection[str] = ()) -> None:
        """Trusts this machine's own names.

        Args:
            bound: name and address that the service listens on. Where that is every address of the machine, all
                addresses are trusted: no name leads to another one.
            more: further names; `*` trusts all.

        Raises:
            UserError: one of `more` is no name.
        """
        for name in more:
            if not 0 < len(name) <= LONGEST or not name.isascii() or not name.isprintable() or set(name) & set("/ ,"):
                shown = name[:LONGEST]
                raise UserError(f"--trusted-hosts '{shown}': a name such as cam.example.org, or *, is expected.")
        self._names = {_name_of(name) for name in (*LOCAL_HOSTS, *bound, *more)}
        self._any_address = any(_is_address(name) and ip_address(name).is_unspecified for name in bound)

    def trusts(self, host: str) -> bool:
        """Says whether a Host header names one of them; the port does not matter. An empty one is trusted.

        Browsers always send it; what speaks HTTP/1.0, such as some load balancers' health checks, need not.
        """
        name = _name_of(host)
        return not name or name in self._names or ANY in self._names or (self._any_address and _is_address(name))


def _name_of(host: str) -> str:
    """Returns a Host header's name, without brackets and port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name = host if host.count(":") > 1 else host.partition(":")[0]
    return name.rstrip(".")


def _is_address(name: str) -> bool:
    """Says whether this is an IP address."""
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
