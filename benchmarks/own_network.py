"""Run a command where the network has nothing but the loopback interface, and mounts are its own.

    python benchmarks/own_network.py COMMAND [ARGUMENT ...]

Ray opens many ports. In a network namespace nothing outside can reach them, whatever addresses they are bound to.
Works as root, and as another user where the system allows user namespaces.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys

INSIDE = "LRT_DEPLOY_OWN_NETWORK"  # set in the environment of the command
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 1  # SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP


def command_inside(*command: str) -> list[str]:
    """Return the command that runs another one inside."""
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", *user, "--net", "--mount", sys.executable, __file__, *command]


def enter() -> None:
    """Start this program again inside, unless that is where it runs."""
    if INSIDE not in os.environ:
        command = command_inside(sys.executable, *sys.argv)
        os.execvp(command[0], command)  # noqa: S606


def _bring_up_loopback() -> None:
    with socket.socket() as any_socket:
        asked = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(any_socket, _GET_FLAGS, asked))[1]
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sH14x", b"lo", flags | _UP))


if __name__ == "__main__":
    _bring_up_loopback()
    os.environ[INSIDE] = "1"
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606
