"""The status command: its output and exit status, with a server that answers over TCP."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from qat_server import main
from qat_server.devices.inventory import Inventory
from qat_server.observability.state import State
from qat_server.observability.status_format import encode
from qat_server.observability.status_report import status_from
from qat_shared import VERSION

STATUS = encode(status_from(State(inventory=Inventory(pfs=(), vfs=(), cut=(), problems=()))))


@pytest.fixture
def status_server() -> Iterator[tuple[str, list[bytes]]]:
    """The server's address, and a list whose last item is its answer."""
    bodies = [STATUS]

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/status" else 404)
            self.end_headers()
            self.wfile.write(bodies[-1])

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as in the base class
            return

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{server.server_port}", bodies
        server.shutdown()
        thread.join()


def test_status(status_server: tuple[str, list[bytes]], capsys: pytest.CaptureFixture[str]) -> None:
    address, _ = status_server

    assert main.run(["status", "-metrics-address", address], {}) == 0
    assert f"qat-plugin {VERSION}: ready" in capsys.readouterr().out


def test_status_as_json(status_server: tuple[str, list[bytes]], capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main.run(["status", "-metrics-address", status_server[0], "-json"], {}) == 0
    assert json.loads(capsysbinary.readouterr().out)["version"] == VERSION


def test_status_that_is_none(status_server: tuple[str, list[bytes]], capsys: pytest.CaptureFixture[str]) -> None:
    address, bodies = status_server
    bodies.append(b"<html>")

    assert main.run(["status", "-metrics-address", address], {}) == 1
    assert "the answer is not a status of qat-plugin" in capsys.readouterr().err


def test_status_out_of_reach(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["status", "--metrics-address=127.0.0.1:1"], {}) == 1

    assert capsys.readouterr().err == (
        "qat-plugin: no status at http://127.0.0.1:1/status (Connection refused):"
        " is the server running with --status-http and --metrics-address 127.0.0.1:1?\n"
    )
