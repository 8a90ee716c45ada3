"""Hundreds of thousands of malformed packets: to the decoder alone, and to the helper over its socket.

QAT_FUZZ_DECODER and QAT_FUZZ_SOCKET set the numbers. The decoder is compiled C code without the probes that a
coverage-guided fuzzer needs, so the packets are generated from the grammar of the messages (hostile.py), and
Hypothesis searches for small counterexamples in test_codec.py.
"""

import random
import resource
import select
import typing
from contextlib import suppress

from helper_security import hostile
from helper_security.chain import verified
from helper_security.figures import most, tried, wanted
from qat_helper.operations.table import OPERATIONS
from qat_shared.codec import ProtocolError, decode_request, encode
from qat_shared.messages import MAX_MESSAGE, AnyRequest, Failure, Heartbeat
from support.conditions import wait_until
from support.helper_process import Helper, heartbeat, helper, wait_until_served

DECODER = wanted("QAT_FUZZ_DECODER", 100_000)
SOCKET = wanted("QAT_FUZZ_SOCKET", 20_000)
GROWTH = 8 * 1024
"""KiB by which a process may grow while it receives garbage."""


def test_every_kind_of_request_is_tried() -> None:
    assert set(hostile.REQUESTS) == set(typing.get_args(AnyRequest)) == set(OPERATIONS)


def test_the_decoder_gives_a_request_or_a_protocol_error() -> None:
    seed, dice = hostile.seeded()
    accepted, before = 0, 0
    for number in range(DECODER):
        if number == DECODER // 10:  # everything that stays loaded is loaded by now
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        packet = hostile.packet(dice)
        try:
            request = decode_request(packet)
        except ProtocolError as error:
            assert len(str(error)) < MAX_MESSAGE + 200
            continue
        except Exception as error:
            error.add_note(f"seed {seed}, message {number}: {packet!r}")
            raise
        assert isinstance(request, tuple(OPERATIONS)), f"seed {seed}, message {number}"
        assert decode_request(encode(request)) == request, f"seed {seed}, message {number}"
        accepted += 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH
    assert accepted > DECODER // 20, "otherwise too few valid messages were tried"
    tried("messages to the decoder", DECODER)
    tried("messages to the decoder that were requests after all", accepted)


class Session:
    """A hostile connection that sends, reads and leaves at random. Every reply must decode."""

    def __init__(self, running: Helper, dice: random.Random) -> None:
        self.dice = dice
        self.client = running.connect(greet=dice.random() < 0.8)
        self.sent = self.answered = self.failures = 0

    def run(self, packets: int) -> None:
        """Send this many packets and wait for as many replies, unless it leaves before."""
        sock = self.client.sock
        lazy = self.dice.random() < 0.2
        with suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(packets):
                while not select.select([], [sock], [], 0)[1] or (not lazy and self.sent - self.answered > 50):
                    self._receive()
                packet = hostile.packet(self.dice)
                with suppress(BlockingIOError, TimeoutError):
                    self._send(packet)
                if self.dice.random() < 0.002:
                    break
            else:
                if self.dice.random() < 0.8:
                    while self.answered < self.sent:
                        self._receive()
        self.client.close()

    def _send(self, packet: bytes) -> None:
        if len(packet) > 2 * MAX_MESSAGE:
            with suppress(OSError):  # too long for the socket
                self.client.sock.send(packet)
                self.sent += 1
            return
        self.client.sock.send(packet)
        self.sent += 1

    def _receive(self) -> None:
        reply = self.client.receive()
        self.answered += 1
        self.failures += isinstance(reply, Failure)


def test_whole_sessions_over_the_socket() -> None:
    seed, dice = hostile.seeded()
    with helper() as running:
        with running.connect() as witness:
            assert isinstance(heartbeat(witness), Heartbeat)
            sent = answered = before = 0
            descriptors = running.open_files_when_idle(witness)
            while sent < SOCKET:
                session = Session(running, dice)
                session.run(min(dice.choice((1, 20, 300)), SOCKET - sent))
                sent += session.sent
                answered += session.answered
                assert isinstance(heartbeat(witness), Heartbeat | Failure), f"seed {seed}"
                if not before and sent > SOCKET // 10:
                    before = running.peak_memory()
            wait_until(lambda: running.is_idle() and running.open_files() == descriptors)
            grown = running.peak_memory() - before
            assert grown < GROWTH, f"seed {seed}"
            wait_until_served(witness)
        assert running.stop() == 0
        assert verified(running.audit)[-1]["event"] == "stop"
        tried("messages over the socket", sent)
        tried("answers over the socket, each a message of the protocol", answered)
        most("KiB that the helper grew under the messages over the socket", grown)


def test_each_answer_is_to_a_request_of_its_own(running: Helper) -> None:
    """The client chooses the ids; each comes back once."""
    _, dice = hostile.seeded()
    with running.connect() as client:
        for _ in range(50):
            requests = [hostile.request(dice) for _ in range(10)]
            for request in requests:
                client.send(request)
            replies = [client.receive().id for _ in requests]
            assert sorted(replies) == sorted(request.id for request in requests)
