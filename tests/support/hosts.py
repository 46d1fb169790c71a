"""Hosts on this machine: network namespaces with an address each, joined by a bridge in a namespace of its own.

Each sees its own interfaces alone; files are shared, as an output folder on a cluster is.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

INTERFACE = "net0"
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Host:
    """A network namespace and its only address."""

    namespace: str
    address: str

    def command(self, *command: str) -> list[str]:
        """command, run on this host."""
        return ["ip", "netns", "exec", self.namespace, *command]

    def enter(self) -> None:
        """From now on this process is on this host."""
        with open(f"/run/netns/{self.namespace}") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def why_no_hosts() -> str | None:
    """Why they cannot be made here; None where they can."""
    if shutil.which("ip") is None:
        return "no program 'ip' (iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with hosts(1):
            return None
    except (subprocess.CalledProcessError, OSError) as error:
        return f"no network namespaces here: {getattr(error, 'stderr', None) or error}"


@contextmanager
def hosts(num: int) -> Iterator[list[Host]]:
    """num hosts that reach each other and nothing else; gone afterwards."""
    prefix = f"pds{os.getpid()}"
    switch = f"{prefix}switch"
    made = [Host(f"{prefix}h{number}", f"10.77.0.{number + 1}") for number in range(num)]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge0", "up")
        for number, host in enumerate(made):
            _ip("netns", "add", host.namespace)
            _ip(
                "-n",
                switch,
                "link",
                "add",
                f"port{number}",
                "type",
                "veth",
                "peer",
                "name",
                INTERFACE,
                "netns",
                host.namespace,
            )
            _ip("-n", switch, "link", "set", f"port{number}", "master", "bridge0", "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
            _ip("-n", host.namespace, "link", "set", INTERFACE, "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        yield made
    finally:
        for name in (*(host.namespace for host in made), switch):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
