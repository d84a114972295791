"""Pictures from web addresses that strangers name, fetched so that they reach no machine but public ones.

A name is resolved once, every address that it has is checked, and the connection goes to a checked address, so a name
that points elsewhere a moment later gains nothing. The same holds for every redirect. Proxies that the environment has
are not used, since they would resolve the name again by themselves.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from functools import cache

import httpx

from adapters.data.image_ref import ImageRef
from qformer.errors import UserError

FETCH_SECONDS = 10.0  # for all pictures of a request, redirects included
CONNECT_SECONDS = 3.0  # for each address of a host, so that one that is silent leaves time for the next
MAX_REDIRECTS = 3

_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
_V4_BEHIND_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# Not private by the registry, yet none of them is a public web server's.
_ALSO_REFUSED = tuple(
    ipaddress.ip_network(network)
    for network in (
        "100.64.0.0/10",  # between a carrier and its customers; some clouds' metadata
        "168.63.129.16/32",  # a cloud's own service
        "192.0.0.0/24",  # protocol assignments; some clouds' metadata
        "192.88.99.0/24",  # relays to 6to4
        "198.18.0.0/15",  # benchmarks
        "2001::/23",  # protocol assignments, Teredo among them
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: any address of IPv4
        "3fff::/20",  # documentation
    )
)

_REDIRECTS = (301, 302, 303, 307, 308)


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet's, for one receiver."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        if found in _V4_BEHIND_NAT64:
            found = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        elif found not in _PUBLIC_V6:  # ::ffff:127.0.0.1 among them
            return False
    refused = any(found.version == network.version and found in network for network in _ALSO_REFUSED)
    return found.is_global and not (found.is_multicast or found.is_reserved or refused)


class ImageFetcher:
    """Fetches the pictures of one request by http and https, all of them within one bound of bytes and of time.

    Args:
        max_bytes: of all files together.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._bytes_left = max_bytes
        self._deadline: float | None = None  # in the loop's time; the clock starts with the first picture

    async def fetch(self, address: str, *, where: str) -> ImageRef:
        """Fetch one picture; it is not opened yet.

        Args:
            address: begins with http:// or https://.
            where: what names it, for messages.

        Raises:
            UserError: the address is not allowed, does not answer in time, or answers with something else or too much.
        """
        label = address if len(address) <= 100 else f"{address[:100]}…"
        if self._deadline is None:
            self._deadline = asyncio.get_running_loop().time() + FETCH_SECONDS
        try:
            async with asyncio.timeout_at(self._deadline):
                data = await self._follow(address)
        except TimeoutError:
            raise UserError(
                f"{where}: image '{label}' did not come within the {FETCH_SECONDS:g} s that a request's pictures have"
            ) from None
        except (_Refused, httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            reason = str(error) or type(error).__name__
            raise UserError(f"{where}: image '{label}' cannot be fetched ({reason})") from error
        self._bytes_left -= len(data)
        return ImageRef(label, data=data, where=where)

    async def _follow(self, address: str) -> bytes:
        url = httpx.URL(address)
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._get(url)
            if isinstance(answer, bytes):
                return answer
            url = url.join(answer)
        raise _Refused(f"more than {MAX_REDIRECTS} redirects")

    async def _get(self, url: httpx.URL) -> bytes | str:
        """The file at an address, or where it says to look instead."""
        if url.scheme not in ("http", "https") or not url.host:
            raise _Refused("only http:// and https:// addresses are")
        if url.userinfo:
            raise _Refused("an address with a user's name in it is not")
        failed: httpx.TransportError | None = None
        for place in await _checked_addresses(url):
            try:
                return await self._get_from(place, url)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failed = error  # its next address may answer
        assert failed is not None
        raise failed

    async def _get_from(self, place: str, url: httpx.URL) -> bytes | str:
        request_to = url.copy_with(host=place)
        limits = httpx.Timeout(FETCH_SECONDS, connect=CONNECT_SECONDS)
        async with (
            httpx.AsyncClient(
                verify=_certificates(), trust_env=False, follow_redirects=False, timeout=limits
            ) as client,
            client.stream(
                "GET",
                request_to,
                headers={"Host": url.netloc.decode("ascii"), "Accept": "image/*", "Accept-Encoding": "identity"},
                extensions={"sni_hostname": url.raw_host.decode("ascii")},  # the certificate is the name's
            ) as reply,
        ):
            if reply.status_code in _REDIRECTS and "location" in reply.headers:
                return reply.headers["location"]
            if reply.status_code != 200:
                raise _Refused(f"it answers with status {reply.status_code}")
            if reply.headers.get("content-encoding", "identity") != "identity":
                raise _Refused("it comes compressed, which was not asked for")
            return await self._read(reply)

    async def _read(self, reply: httpx.Response) -> bytes:
        too_large = _Refused(f"a request's pictures may be {self.max_bytes / 2**20:.3g} MiB together (--max-body)")
        declared = reply.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self._bytes_left:
            raise too_large
        data = bytearray()
        async for piece in reply.aiter_raw():
            data += piece
            if len(data) > self._bytes_left:
                raise too_large
        if not data:
            raise _Refused("it is empty")
        return bytes(data)


class _Refused(Exception):
    """An address, or what it answers, is not taken."""


@cache
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context()


async def _checked_addresses(url: httpx.URL) -> list[str]:
    """What a name resolves to, if all of it is public: a name that is both is a trap."""
    host, port = url.raw_host.decode("ascii").strip("[]"), url.port or {"http": 80, "https": 443}[url.scheme]
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        raise _Refused("its host is not known") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    if not addresses or not all(is_public(address.partition("%")[0]) for address in addresses):
        raise _Refused("its host is not on the public internet")
    return addresses
