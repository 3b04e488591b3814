#!/usr/bin/env python3
"""Segments that live: what lives among dead ones is taken over, the rest freed, on a real disk."""

import json
import random

import daemon
import frames

IDS, KEPT, PAYLOAD = 40, 7, 20_000


@daemon.on_each_backend
class SegmentsTest(daemon.DaemonCase):
    settings = {"data.segment_mib": 1, "data.checkpoint_mib": 4096}

    def checkpoint(self):
        done = daemon.engramctl("checkpoint", address=self.daemon.address_text)
        self.assertEqual(done.returncode, 0, done.stderr)

    def payload(self, number, turn):
        return b"%d/%d " % (number, turn) + bytes([97 + turn]) * PAYLOAD

    def segments(self, folder):
        path = self.daemon.path / "data" / folder
        return sorted(file.name for file in path.glob("segment-*.log"))

    def verify(self):
        done = daemon.engramctl("log", "verify", str(self.daemon.path / "data"), "--json")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return {log["log"]: log for log in json.loads(done.stdout)["logs"]}

    def check(self, turn):
        with self.daemon.client("s", metric=frames.L2, features=frames.NO_SESSION) as client:
            hits = client.recall([0.0, 0.0], IDS, payload=True)
        self.assertEqual(len(hits), IDS)
        for hit in hits:
            number = int(hit.id)
            expected = self.payload(number, 0 if number < KEPT else turn)
            self.assertEqual(hit.payload, expected, number)

    def test_a_few_that_live_among_dead_ones_go_to_the_vault(self):
        order = random.Random(7)
        with self.daemon.client("s", metric=frames.L2) as client:
            for turn in range(8):
                # The first ones are written once, each among others that are written again.
                numbers = list(range(0 if turn == 0 else KEPT, IDS))
                order.shuffle(numbers)
                for number in numbers:
                    client.send_observe([frames.record(b"%d" % number, [float(number), 1.0],
                                                       payload=self.payload(number, turn))])
                client.wait_acked(IDS + turn * (IDS - KEPT))
        last = turn
        before = self.segments("log-000")
        for _ in range(3):
            self.checkpoint()
        self.check(last)
        with self.daemon.client("s", features=frames.NO_SESSION) as client:
            daemon.wait_until(lambda: client.counters()["segments_freed"] >= 3,
                              "three segments are freed")
        self.assertTrue(self.segments("vault"))
        daemon.wait_until(lambda: self.segments("log-000") != before, "a file of the log is gone")
        self.check(last)
        logs = self.verify()
        self.assertGreaterEqual(logs[255]["records"], KEPT)
        self.daemon.kill()
        self.daemon.spawn()
        self.daemon.wait_ready()
        self.check(last)


if __name__ == "__main__":
    daemon.main()
