#!/usr/bin/env python3
"""SIGTERM: what was taken is acked, then every connection gets its close, then exit code 0."""

import concurrent.futures
import contextlib
import signal
import threading
import time
import unittest

import daemon
import frames
from frames import frame, record

FEEDERS = 6


class Feeder:
    """Sends as fast as credit allows until the server's close, and counts."""

    def __init__(self, running, number):
        self.client = running.client(f"load-{number}", metric=frames.L2)
        self.closed_at = None

    def run(self, warm):
        """Returns once the connection has ended; releases warm once it has been going a while."""
        released = False
        try:
            while True:
                first = self.client.next_sequence
                last = self.client.send_observe(
                    [record(b"%d" % (first + i), [float(i), 1.0], payload=b"p" * 100)
                     for i in range(8)])
                # Reads acks, but keeps some on the way so that the end comes in mid-flight.
                if last - self.client.acked > 400:
                    self.client.wait_acked(last - 200)
                if not released and self.client.acked > 1000:
                    warm.release()
                    released = True
        except (BrokenPipeError, ConnectionResetError):
            pass  # The server takes no more; what it said before is still to be read.
        except frames.ServerClosed as error:
            self.closed_at = error.sequence
        if self.closed_at is None:
            self.closed_at = self.client.wait_for(frames.CLOSE).sequence
        self.client.socket.close()
        return self


class ShutdownCases:
    """SIGTERM in many states, for one backend."""

    backend = None

    def start(self, **settings):
        if self.backend == "io_uring" and daemon.io_uring_forbidden():
            self.skipTest(daemon.io_uring_forbidden())
        return daemon.running({"listen.backend": self.backend, **settings})

    def test_under_load_everything_taken_is_acked_before_the_close(self):
        with self.start() as running, concurrent.futures.ThreadPoolExecutor(FEEDERS) as pool:
            feeders = [Feeder(running, number) for number in range(FEEDERS)]
            warm = threading.Semaphore(0)
            futures = [pool.submit(feeder.run, warm) for feeder in feeders]
            for _ in range(FEEDERS):
                self.assertTrue(warm.acquire(timeout=60))
            running.terminate()
            for future in futures:
                feeder = future.result(60)
                # The close repeats the last ack, and no ack is for what was never sent.
                self.assertEqual(feeder.closed_at, feeder.client.acked)
                self.assertLess(feeder.client.acked, feeder.client.next_sequence + 8)
                self.assertGreater(feeder.client.acked, 1000)
            self.assertEqual(running.wait(), 0)

    def test_idle_connections_get_their_close(self):
        with self.start() as running:
            greeted = [running.client("idle", metric=frames.L2) for _ in range(20)]
            reader = running.client("idle", features=frames.NO_SESSION)
            silent = running.client()
            begun = running.client("idle")
            begun.send(frame(frames.PING)[:20])
            for number, client in enumerate(greeted):
                for value in range(number):
                    client.observe([record(b"%d" % value, [1.0])])
            running.terminate()
            for number, client in enumerate(greeted):
                self.assertEqual(client.wait_for(frames.CLOSE).sequence, number)
                self.assertEqual(client.acked, number)
                client.wait_end()
                client.socket.close()
            for client in (reader, begun):
                self.assertEqual(client.wait_for(frames.CLOSE).sequence, 0)
                client.socket.close()
            with self.assertRaises((frames.ConnectionEnded, frames.Refused)):
                silent.wait_for(frames.HELLO_ACK)
            silent.socket.close()
            self.assertEqual(running.wait(), 0)
            with self.assertRaises(ConnectionRefusedError):
                frames.Client(running.address)

    def test_a_second_sigterm_is_harmless(self):
        with self.start() as running:
            running.terminate()
            with contextlib.suppress(ProcessLookupError):
                for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                    running.process.send_signal(number)
            self.assertEqual(running.wait(), 0)

    def test_sigint_stops_it_too(self):
        with self.start() as running:
            with running.client("int", metric=frames.L2) as client:
                client.observe([record(b"x", [1.0])])
                running.process.send_signal(signal.SIGINT)
                self.assertEqual(client.wait_for(frames.CLOSE).sequence, 1)
            self.assertEqual(running.wait(), 0)

    def test_started_again_on_the_same_directory_and_port(self):
        with self.start() as running:
            running.client("first").close()
            running.terminate()
            self.assertEqual(running.wait(), 0)
            text = running.config.read_text().replace("127.0.0.1:0", running.address_text)
            with daemon.running(config_text=text) as again:
                self.assertEqual(again.address, running.address)
                with again.client("second", metric=frames.L2) as client:
                    self.assertEqual(client.observe([record(b"x", [1.0])]), [])


def wait_until_it_takes_nobody(running):
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            with frames.Client(running.address) as client:
                client.hello("late")
        except (ConnectionError, frames.ConnectionEnded, frames.Refused):
            return
    raise TimeoutError("new connections are still taken after SIGTERM")


def unread_recalls(running):
    """A connection with megabytes of answers that it does not read."""
    with running.client("big", metric=frames.L2) as client:
        for first in range(0, 1000, 100):
            client.observe([record(b"%d" % i, [float(i)], payload=b"z" * 1000)
                            for i in range(first, first + 100)])
        slow = frames.Client(running.address, receive_buffer=4096)
        slow.hello("big", features=frames.NO_SESSION)
        before = client.counters()
        # In one piece: once answers are left unread the daemon does not read on.
        slow.send(b"".join(frame(frames.RECALL, frames.recall_body([0.0], 1000), flags=1,
                                 sequence=request)
                           for request in range(slow.hello_ack.max_recalls)))
        deadline = time.monotonic() + 30
        while True:
            # The first answers fill what may be left unread; the others wait behind them.
            received = client.counters()["recalls_received"] - before["recalls_received"]
            if received == slow.hello_ack.max_recalls:
                break
            if time.monotonic() > deadline:
                raise TimeoutError("the recalls are not answered")
    return slow


class UnreadTest(unittest.TestCase):
    """A client that does not read holds the end up until the drain deadline, and no longer."""

    def test_it_is_cut_at_the_deadline_and_more_signals_change_nothing(self):
        backends = ["posix"] if daemon.io_uring_forbidden() else ["posix", "io_uring"]
        with contextlib.ExitStack() as stack:
            # Side by side, because the deadline takes its 10 s.
            daemons = [stack.enter_context(daemon.running({"listen.backend": backend}))
                       for backend in backends]
            slow = [unread_recalls(running) for running in daemons]
            for running in daemons:
                running.terminate()
                wait_until_it_takes_nobody(running)
                running.process.send_signal(signal.SIGTERM)
                running.process.send_signal(signal.SIGINT)
                self.assertIsNone(running.process.poll(), "nobody was waited for")
            for running, client in zip(daemons, slow):
                self.assertEqual(running.wait(), 0)
                client.socket.close()


class ShutdownIoUringTest(ShutdownCases, unittest.TestCase):
    backend = "io_uring"


class ShutdownPosixTest(ShutdownCases, unittest.TestCase):
    backend = "posix"


if __name__ == "__main__":
    daemon.main()
