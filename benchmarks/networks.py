"""Hosts that share nothing but links: network namespaces joined by veth pairs. Needs Linux and root."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import NamedTuple

_LINK_UP_S = 10.0


class Host(NamedTuple):
    """A network namespace."""

    name: str

    @property
    def launcher(self) -> tuple[str, ...]:
        """What starts a command there."""
        return ("ip", "netns", "exec", self.name)


class Link(NamedTuple):
    """A wire from the hub to a host."""

    hub: Host
    host: Host
    address: str  # of the host
    device: str  # at either end

    def down(self) -> None:
        """From here on, packets are lost; nobody is told."""
        _ip("-n", self.host.name, "link", "set", self.device, "down")

    def up(self) -> None:
        """Let packets pass, and wait until they do."""
        _ip("-n", self.host.name, "link", "set", self.device, "up")
        end = time.monotonic() + _LINK_UP_S
        # UCX uses the devices that are up when it starts.
        while not all(self._is_up(side) for side in (self.hub, self.host)):
            assert time.monotonic() < end, f"the link to {self.address} does not come up"
            time.sleep(0.02)

    def _is_up(self, side: Host) -> bool:
        shown = json.loads(_ip("-json", "-n", side.name, "link", "show", self.device))
        return bool(shown[0]["operstate"] == "UP")


class Network(NamedTuple):
    hub: Host
    links: tuple[Link, ...]  # host by host


def why_not() -> str | None:
    """Why there can be no namespaces here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the ip command (iproute2)"
    probe = f"polarkv-{os.getpid()}-probe"
    try:
        _ip("netns", "add", probe)
    except subprocess.CalledProcessError as error:
        return f"no network namespace can be made: {error.stderr.strip()}"
    _ip("netns", "delete", probe)
    return None


@contextlib.contextmanager
def network(*links: int) -> Iterator[Network]:
    """A hub, and a host for each of ``links``, which says how many links it has.

    The machine's own network stays as it is.
    """
    name = f"polarkv-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        hub = stack.enter_context(_host(f"{name}-hub"))
        made: list[Link] = []
        for number, count in enumerate(links, 1):
            host = stack.enter_context(_host(f"{name}-{number}"))
            for _ in range(count):
                made.append(_link(hub, host, len(made) + 1))
        yield Network(hub, tuple(made))


def _link(hub: Host, host: Host, number: int) -> Link:
    link = Link(hub, host, f"10.213.{number}.2", f"link{number}")
    peer = ("type", "veth", "peer", "name", link.device, "netns", host.name)
    _ip("-n", hub.name, "link", "add", link.device, *peer)
    for side, last in ((hub, 1), (host, 2)):
        _ip("-n", side.name, "address", "add", f"10.213.{number}.{last}/24", "dev", link.device)
    _ip("-n", hub.name, "link", "set", link.device, "up")
    link.up()
    return link


@contextlib.contextmanager
def _host(name: str) -> Iterator[Host]:
    _ip("netns", "add", name)
    try:
        _ip("-n", name, "link", "set", "lo", "up")
        yield Host(name)
    finally:
        _ip("netns", "delete", name)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
