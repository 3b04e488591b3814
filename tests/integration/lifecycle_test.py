#!/usr/bin/env python3
"""TTL and quotas through engramd: what ends stays away, also after kill -9 and a checkpoint."""

import tempfile
import time
import unittest

import daemon
import frames
from frames import record

CONFIG = """
[listen]
tcp = "127.0.0.1:0"
grpc = ""
http = ""
[data]
directory = "{directory}"
[memory]
limit_mib = 1024
[index]
max_partitions = 1
[[space]]
name = "brief"
metric = "l2"
ttl_s = 2
[[space]]
name = "few"
metric = "l2"
quota_observations = 5
[[space]]
name = "latest"
metric = "l2"
quota_observations = 5
quota_when_full = "evict_oldest"
"""


class LifecycleTest(unittest.TestCase):

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="engramd-test-")
        self.addCleanup(folder.cleanup)
        running = daemon.running(config_text=CONFIG.format(directory=folder.name + "/data"))
        self.daemon = self.enterContext(running)

    def ids(self, space):
        with self.daemon.client(space) as client:
            return {hit.id for hit in client.recall([0.0, 0.0], 1000)}

    def restart(self):
        self.daemon.kill()
        self.daemon.spawn()
        self.daemon.wait_ready()

    def await_ids(self, space, ids):
        """What is there in the end: the daemon's clock decides when."""
        deadline = time.monotonic() + 60
        while (found := self.ids(space)) != ids:
            self.assertLess(time.monotonic(), deadline, found)

    def test_what_is_past_its_ttl_is_gone_and_does_not_come_back(self):
        with self.daemon.client("brief", metric=frames.L2) as client:
            began = time.monotonic()
            self.assertEqual(client.observe([record(b"%d" % i, [float(i), 1.0])
                                             for i in range(20)]), [])
            found = {hit.id for hit in client.recall([0.0, 0.0], 1000)}
            if time.monotonic() - began < 2:  # Else it may have expired on a machine that sleeps.
                self.assertEqual(len(found), 20)
        self.await_ids("brief", set())
        self.assertGreaterEqual(time.monotonic() - began, 2)
        self.restart()
        self.assertEqual(self.ids("brief"), set())

    def test_a_full_space_refuses_until_there_is_room(self):
        with self.daemon.client("few", metric=frames.L2) as client:
            client.observe([record(b"%d" % i, [float(i), 1.0]) for i in range(5)])
            client.send_observe([record(b"new", [9.0, 1.0])])
            nak = client.wait_for(frames.NAK)
            nak = client.naks[-1] if client.naks else nak
            self.assertEqual(nak.name, "quota_observations")
            self.assertEqual(nak.flags, 0)
            self.assertGreater(nak.retry_after_ms, 0)
            self.assertIn("quota_when_full", nak.text)
            # The number may be used for what needs no room.
            client.next_sequence = nak.expected
            self.assertEqual(client.observe([record(b"3", [7.0, 1.0])])[1:], [])
        with self.daemon.client("few", metric=frames.L2) as client:
            client.observe([record(b"0", op=frames.DELETE)])
            self.assertEqual(client.observe([record(b"new", [9.0, 1.0])]), [])
        self.assertEqual(self.ids("few"), {b"1", b"2", b"3", b"4", b"new"})

    def test_the_oldest_gives_way_and_stays_away(self):
        with self.daemon.client("latest", metric=frames.L2) as client:
            client.observe([record(b"%d" % i, [float(i), 1.0]) for i in range(12)])
        latest = {b"%d" % i for i in range(7, 12)}
        self.assertEqual(self.ids("latest"), latest)
        self.restart()
        self.assertEqual(self.ids("latest"), latest)
        done = daemon.engramctl("checkpoint", address=self.daemon.address_text)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.restart()
        self.assertEqual(self.ids("latest"), latest)


if __name__ == "__main__":
    daemon.main()
