#!/usr/bin/env python3
"""Connections that break off, dribble, never read or only idle: they harm themselves alone."""

import socket
import time

import daemon
import frames
from frames import frame, record

IDLE = 2000


def observe_frame(client, identity, values=64):
    return frame(frames.OBSERVE,
                 frames.observe_body([record(identity, [1.0] * values, payload=b"p" * 500)]),
                 session=client.session, sequence=client.next_sequence)


@daemon.on_each_backend
class HostileConnectionsTest(daemon.DaemonCase):

    def test_killed_in_mid_frame(self):
        for ending in ("FIN", "RST"):
            for cut in (1, 4, 12, 31, 32, 33, 36, 68, 200, -1):
                with self.subTest(ending, cut=cut), \
                        self.daemon.client("killed", metric=frames.L2) as client:
                    client.observe([record(b"whole", [1.0] * 64)])
                    client.send(observe_frame(client, b"half")[:cut])
                    if ending == "RST":
                        client.abort()
                    else:
                        client.socket.shutdown(socket.SHUT_WR)
                        client.wait_end()
                with self.daemon.client("killed", session=client.session) as again:
                    self.assertEqual(again.hello_ack.sequence, 1)
                    self.assertEqual([hit.id for hit in again.recall([1.0] * 64)], [b"whole"])

    def test_killed_in_mid_hello(self):
        hello = frame(frames.HELLO, frames.hello_body(b"never"))
        for cut in (0, 1, 31, 32, len(hello) - 1, len(hello)):
            for end in (lambda client: client.abort(), lambda client: client.socket.close()):
                client = self.daemon.client()
                client.send(hello[:cut])
                end(client)
        self.assert_serves()

    def test_killed_while_the_answer_is_on_its_way(self):
        for _ in range(20):
            client = self.daemon.client("leaving", metric=frames.L2)
            client.send_observe([record(b"%d" % i, [float(i)], payload=b"p" * 1000)
                                 for i in range(200)])
            client.send(frame(frames.RECALL, frames.recall_body([0.0], 1000), flags=1))
            client.abort()
        self.assert_serves()
        with self.daemon.client("leaving") as client:
            # A frame is taken whole or not at all, so each of the 200 is there or none.
            deadline = time.monotonic() + 30
            while client.counters()["connections_opened"] - 1 > \
                    client.counters()["connections_closed"] and time.monotonic() < deadline:
                pass
            self.assertIn(client.introspect(frames.SPACES)[0].observations, range(201))

    def test_a_byte_at_a_time_is_taken_right(self):
        with self.daemon.client() as client:
            hello = frame(frames.HELLO, frames.hello_body(b"dribble", metric=frames.L2))
            for at in range(len(hello)):
                client.send(hello[at:at + 1])
            client.session = client.wait_for(frames.HELLO_ACK).session
            data = observe_frame(client, b"first") + frame(
                frames.OBSERVE, frames.observe_body([record(b"second", [2.0] * 64)]),
                session=client.session, sequence=2)
            for at in range(len(data)):
                client.send(data[at:at + 1])
            client.wait_acked(2)
            hits = client.recall([1.0] * 64, payload=True)
            self.assertEqual([(hit.id, hit.score, hit.payload) for hit in hits],
                             [(b"first", 0.0, b"p" * 500), (b"second", 64.0, b"")])

    def test_frames_cut_anywhere_are_taken_right(self):
        with self.daemon.client("cut", metric=frames.L2) as client:
            data = b"".join(
                frame(frames.OBSERVE, frames.observe_body(
                    [record(b"%d" % i, [float(i)] * (1 + i % 3), payload=b"p" * (i * 37 % 300))]),
                    session=client.session, sequence=i)
                for i in range(1, 301))
            at, step = 0, 1
            while at < len(data):
                client.send(data[at:at + step])
                at, step = at + step, step * 31 % 4093 + 1
            client.wait_acked(300)
            # The first one fixed the dimension at 2; the others were refused one by one.
            self.assertEqual([nak.sequence for nak in client.naks],
                             [i for i in range(1, 301) if i % 3 != 1])
            hits = client.recall([0.0, 0.0], 1000, payload=True)
            self.assertEqual([(hit.id, len(hit.payload)) for hit in hits],
                             [(b"%d" % i, i * 37 % 300) for i in range(1, 301, 3)])

    def test_who_never_reads_is_bounded_and_others_go_on(self):
        with self.daemon.client("big", metric=frames.L2) as client:
            for first in range(0, 1000, 100):
                client.observe([record(b"%d" % i, [float(i)], payload=b"z" * 1000)
                                for i in range(first, first + 100)])
            slow = frames.Client(self.daemon.address, receive_buffer=4096)
            slow.hello("big", features=frames.NO_SESSION)
            slow.socket.settimeout(1)
            ask = frame(frames.RECALL, frames.recall_body([0.0], 1000), flags=1)
            deadline = time.monotonic() + 60
            asked, stalls, cut_off = 0, 0, False
            # Either is right: it is cut off, or its recalls are read no further. What the daemon
            # holds for it is bounded both ways; which one comes first is a matter of scheduling.
            while not cut_off and stalls < 3 and time.monotonic() < deadline:
                try:
                    slow.send(ask)
                    asked += 1
                except TimeoutError:
                    stalls += 1
                except (ConnectionResetError, BrokenPipeError):
                    cut_off = True
                if asked % 50 == 0 or cut_off or stalls:
                    self.assertEqual(client.recall([5.0], 1)[0].id, b"5")
                    cut_off = client.counters()["slow_reader"] == 1
            self.assertTrue(cut_off or stalls == 3, f"after {asked} recalls")
            self.assertEqual(client.observe([record(b"more", [-1.0])]), [])
            slow.socket.close()

    def test_who_reads_late_gets_all_that_was_granted(self):
        with self.daemon.client("late", metric=frames.L2) as client:
            for first in range(0, 1000, 100):
                client.observe([record(b"%d" % i, [float(i)], payload=b"z" * 1000)
                                for i in range(first, first + 100)])
            granted = client.hello_ack.max_recalls
            self.assertGreaterEqual(granted, 1)
            for request in range(granted):
                client.send(frame(frames.RECALL, frames.recall_body([0.0], 1000), flags=1,
                                  session=client.session, sequence=request))
            with self.daemon.client("late") as other:
                self.assertEqual(other.recall([7.0], 1)[0].id, b"7")
            hits = dict.fromkeys(range(granted), 0)
            ended = set()
            while len(ended) < granted:
                got = client.wait_for(frames.RESULT)
                hits[got.sequence] += len(frames.decode_result(got)[2])
                if not got.flags & 1:
                    ended.add(got.sequence)
            self.assertEqual(set(hits.values()), {1000})

    def test_a_flood_of_pings_that_nobody_reads(self):
        ping = frame(frames.PING, sequence=1) * 1000
        with self.daemon.client("pings") as client:
            client.socket.settimeout(0.2)
            try:
                for _ in range(400):
                    client.send(ping)
                    if _ % 40 == 0:
                        self.assert_serves()
            except (TimeoutError, ConnectionResetError, BrokenPipeError):
                pass  # Slowed down or cut off: both bound what the daemon keeps for it.
            self.assert_serves()

    def test_thousands_of_idle_connections_and_one_that_works(self):
        limit = daemon.raise_open_files(IDLE + 200)
        if limit < IDLE + 200:
            self.skipTest(f"needs {IDLE + 200} open files, this process may have {limit}")
        idle = [self.daemon.client() for _ in range(IDLE)]
        try:
            hello = frame(frames.HELLO, frames.hello_body(b"idle", features=frames.NO_SESSION))
            session = frame(frames.HELLO, frames.hello_body(b"idle"))
            for number, client in enumerate(idle):
                client.send(session if number % 2 else hello)
            for client in idle:
                client.session = client.wait_for(frames.HELLO_ACK).session
            self.assertEqual(len({client.session for client in idle}), IDLE // 2 + 1)
            with self.daemon.client("works", metric=frames.L2) as worker:
                for value in range(200):
                    worker.observe([record(b"%d" % value, [float(value)])])
                    self.assertEqual(worker.recall([float(value)], 1)[0].id, b"%d" % value)
            for client in idle:  # All of them are still served.
                client.ping()
        finally:
            for client in idle:
                client.socket.close()


if __name__ == "__main__":
    daemon.main()
