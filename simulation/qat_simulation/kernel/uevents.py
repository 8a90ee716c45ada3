"""The kernel's uevents on a Unix socket: one SEQPACKET packet for each, in the kernel's own format.

A packet is `bind@/devices/...` and KEY=value strings, each ended by NUL; the keys have the order of the kernel's
lib/kobject_uevent.c. Every connected client gets every packet. A client whose buffer is full loses a packet and its
connection, as a netlink listener gets ENOBUFS: it has to do a full resync.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Iterable
from pathlib import Path


def packet(action: str, device_path: str, subsystem: str, fields: Iterable[str], sequence: int) -> bytes:
    """One uevent's bytes. `device_path` begins with "/" and has no "/sys" in front; `fields` are KEY=value."""
    parts = (f"{action}@{device_path}", f"ACTION={action}", f"DEVPATH={device_path}", f"SUBSYSTEM={subsystem}")
    return "".join(f"{part}\0" for part in (*parts, *fields, f"SEQNUM={sequence}")).encode()


class Broadcaster:
    """Listens on a Unix socket and sends packets to all clients. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.overruns = 0
        self._sequence = 0
        self._clients: list[socket.socket] = []
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._listener.bind(os.fspath(path))
            path.chmod(0o666)  # netlink is open to every user too
            self._listener.listen(16)
        except OSError:
            self._listener.close()
            raise
        self._thread = threading.Thread(target=self._accept, name="uevents", daemon=True)
        self._thread.start()

    def send(self, action: str, device_path: str, subsystem: str, fields: Iterable[str]) -> None:
        """Send one uevent to all clients, without waiting for any of them."""
        with self._lock:
            self._sequence += 1
            if not self._clients:
                return
            data = packet(action, device_path, subsystem, fields, self._sequence)
            for client in tuple(self._clients):
                try:
                    client.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                except BlockingIOError:
                    self.overruns += 1
                    self._drop(client)
                except OSError:
                    self._drop(client)

    def close(self) -> None:
        """End all connections and the socket."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
        self._thread.join()
        self._listener.close()
        with self._lock:
            for client in tuple(self._clients):
                self._drop(client)
        self.path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError):  # as much as the system allows; a burst has some thousand packets
                client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            with self._lock:
                for gone in [known for known in self._clients if _ended(known)]:
                    self._drop(gone)
                self._clients.append(client)

    def _drop(self, client: socket.socket) -> None:
        self._clients.remove(client)
        client.close()


def _ended(client: socket.socket) -> bool:
    try:
        return client.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
