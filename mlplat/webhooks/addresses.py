"""Where webhooks may go: to public addresses, and to those that the installation allows. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from mlplat.errors import InvalidInput

SETTING = "MLPLAT_WEBHOOK_PRIVATE_TARGETS"
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_\-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_\-]{0,61}[a-z0-9_])?)*\.?\Z")
#: Resolvers take these for numbers, each in its own way: 127.1, 0x7f.1, 017700000001, 2130706433.
_ENDS_IN_A_NUMBER = re.compile(r"(.*\.)?(0x[0-9a-f]*|[0-9]+)\.?\Z")

Address = IPv4Address | IPv6Address

#: IANA's special-purpose registries. IPv6 is public in 2000::/3 only, apart from what is named here.
_SPECIAL: Sequence[tuple[str, str]] = (
    ("0.0.0.0/8", "an unspecified address"), ("10.0.0.0/8", "a private address"),
    ("100.64.0.0/10", "a carrier's private address"), ("127.0.0.0/8", "a loopback address"),
    ("169.254.0.0/16", "a link-local address"), ("172.16.0.0/12", "a private address"),
    ("192.0.0.0/24", "a reserved address"), ("192.0.2.0/24", "a reserved address"),
    ("192.88.99.0/24", "a reserved address"), ("192.168.0.0/16", "a private address"),
    ("198.18.0.0/15", "a reserved address"), ("198.51.100.0/24", "a reserved address"),
    ("203.0.113.0/24", "a reserved address"), ("224.0.0.0/4", "a multicast address"),
    ("240.0.0.0/4", "a reserved address"),
    ("::/128", "an unspecified address"), ("::1/128", "a loopback address"),
    ("::ffff:0:0/96", "an IPv4 address inside an IPv6 one"), ("64:ff9b::/96", "an IPv4 address inside an IPv6 one"),
    ("64:ff9b:1::/48", "an IPv4 address inside an IPv6 one"), ("2001::/23", "a reserved address"),
    ("2001:db8::/32", "a reserved address"), ("2002::/16", "an IPv4 address inside an IPv6 one"),
    ("3fff::/20", "a reserved address"), ("fc00::/7", "a private address"), ("fe80::/10", "a link-local address"),
    ("fec0::/10", "a private address"), ("ff00::/8", "a multicast address"),
)  # fmt: skip
_NETWORKS = tuple((ip_network(network), what) for network, what in _SPECIAL)
_PUBLIC_V6 = IPv6Network("2000::/3")


@dataclass(frozen=True)
class Targets:
    """Which addresses are allowed beyond public ones.

    Args:
        hosts: names that may be anywhere.
    """

    hosts: frozenset[str] = frozenset()
    networks: tuple[IPv4Network | IPv6Network, ...] = ()

    @classmethod
    def parse(cls, entries: Sequence[str]) -> Targets:
        """Hosts, addresses and networks such as 10.0.0.0/8, as the setting has them; they were checked there."""
        hosts, networks = set[str](), list[IPv4Network | IPv6Network]()
        for entry in entries:
            try:
                networks.append(ip_network(entry, strict=False))
            except ValueError:
                hosts.add(entry.lower().rstrip("."))
        return cls(frozenset(hosts), tuple(networks))

    def refusal(self, host: str, address: str) -> str | None:
        """Why a host may not be called at an address; None: it may."""
        try:
            found = ip_address(address)
        except ValueError:
            return f"{host} has no address that can be understood"
        if host.lower().rstrip(".") in self.hosts or any(found in network for network in self.networks):
            return None
        what = _special(found)
        return None if what is None else f"{host} has {what}; {SETTING} may allow such"


def _special(address: Address) -> str | None:
    for network, what in _NETWORKS:
        if address in network:
            return what
    return "a reserved address" if isinstance(address, IPv6Address) and address not in _PUBLIC_V6 else None


def check_host(host: str) -> None:
    """Checks a host before anybody looks it up.

    Raises:
        InvalidInput: it is no name and no address in the usual form.
    """
    text = host.lower()
    try:
        ip_address(text)
    except ValueError as error:
        if not _HOST.match(text) or len(text) > 253 or _ENDS_IN_A_NUMBER.match(text):
            raise InvalidInput(f"url: {host[:100]!r} is no host name and no address such as 192.0.2.1") from error
