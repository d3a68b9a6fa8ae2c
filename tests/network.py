"""A guard that every Python process reads at its start, whoever starts it: what asks for the network is noted, refused.

Noted, since some callers swallow errors. What processes of one run say to each other passes.
"""

import os
import sys
from pathlib import Path

GUARD = """
import os, socket, sys

HERE = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "", None, socket.gethostname()}

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # a path: within the machine
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        host = arguments[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in HERE:
        with open(os.environ["NETWORK_LOG"], "a") as file:
            file.write(f"{event} {host} by {sys.argv}\\n")
        raise OSError(f"the network is closed: {event} {host}")

sys.addaudithook(watch)
"""


def guarded(folder: Path) -> dict[str, str]:
    """The environment of this process with the guard in it; :func:`asked` tells what was noted."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(GUARD)
    (folder / "network.log").touch()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    paths = os.pathsep.join([str(folder / "site"), *sys.path[1:]])
    return kept | {"PYTHONPATH": paths, "NETWORK_LOG": str(folder / "network.log"), "HF_HOME": str(folder / "hub")}


def asked(folder: Path) -> str:
    """A line for everything that asked for the network."""
    return (folder / "network.log").read_text()
