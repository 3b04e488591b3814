#!/usr/bin/env python3
"""engramctl compact and drop through engramd: what goes is gone for good, the rest stays."""

import json
import unittest

import daemon
import frames
from frames import record


class SpaceCommandsTest(daemon.DaemonCase):
    settings = {"data.segment_mib": 1, "data.checkpoint_mib": 4096}

    def engramctl(self, *words, **options):
        return daemon.engramctl(*words, address=self.daemon.address_text, **options)

    def ids(self, space, query):
        with self.daemon.client(space, features=frames.NO_SESSION) as client:
            return {hit.id for hit in client.recall(query, 1000)}

    def restart(self):
        self.daemon.kill()
        self.daemon.spawn()
        self.daemon.wait_ready()

    def fill(self, space, count, dimension=2, metric=frames.L2):
        with self.daemon.client(space, metric=metric) as client:
            rows = [record(b"%d" % i, [float(i)] + [1.0] * (dimension - 1)) for i in range(count)]
            self.assertEqual(client.observe(rows), [])
            return client.session

    def test_a_dropped_space_is_gone_everywhere_and_stays_away(self):
        session = self.fill("gone", 50)
        self.fill("kept", 20)
        client = self.enterContext(self.daemon.client("gone", features=frames.NO_SESSION))
        self.assertEqual(len(client.recall([0.0, 1.0], 100)), 50)
        done = self.engramctl("drop", "gone", "--unproven", "--yes", "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(json.loads(done.stdout)["observations"], 50)
        for restarts in range(3):
            with self.assertRaises(frames.Refused) as refused:
                self.ids("gone", [0.0, 1.0])
            self.assertEqual(refused.exception.nak.name, "unknown_space")
            with self.assertRaises(frames.Refused) as refused:
                with self.daemon.client("gone", session=session):
                    pass
            self.assertEqual(refused.exception.nak.name, "session_expired")
            self.assertEqual(len(self.ids("kept", [0.0, 1.0])), 20)
            if restarts == 1:
                self.assertEqual(self.engramctl("checkpoint").returncode, 0)
            self.restart()
        # The name again, as something else.
        self.fill("gone", 5, dimension=4, metric=frames.COSINE)
        self.restart()
        self.assertEqual(len(self.ids("gone", [0.0, 1.0, 1.0, 1.0])), 5)

    def test_who_had_it_open_recalls_what_the_name_means_then(self):
        self.fill("open", 3)
        client = self.enterContext(self.daemon.client("open", features=frames.NO_SESSION))
        self.assertEqual(len(client.recall([0.0, 1.0], 10)), 3)
        self.assertEqual(self.engramctl("drop", "open", "--unproven", "--yes").returncode, 0)
        self.fill("open", 4, dimension=3)
        self.assertEqual(len(client.recall([0.0, 1.0, 1.0], 10)), 4)

    def test_drop_asks_for_the_name(self):
        self.fill("asked", 3)
        done = self.engramctl("drop", "asked", "--unproven", typed="no\n")
        self.assertEqual(done.returncode, 1)
        self.assertIn("nothing was dropped", done.stderr)
        self.assertEqual(len(self.ids("asked", [0.0, 1.0])), 3)
        done = self.engramctl("drop", "asked", "--unproven", typed="asked\n")
        self.assertEqual(done.returncode, 0, done.stderr)
        done = self.engramctl("drop", "asked", "--unproven", "--yes")
        self.assertEqual(done.returncode, 1)
        self.assertIn("unknown_space", done.stderr + done.stdout)

    def test_compact_gives_back_what_was_deleted(self):
        with self.daemon.client("compacted", metric=frames.L2) as client:
            payload = b"p" * 20_000
            for first in range(0, 300, 20):
                client.observe([record(b"%d" % i, [float(i), 1.0], payload=payload)
                                for i in range(first, first + 20)])
            client.observe([record(b"%d" % i, op=frames.DELETE) for i in range(290)])
        done = self.engramctl("compact", "compacted", "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        said = json.loads(done.stdout)
        self.assertLessEqual(said["bytes_after"], said["bytes_before"])
        with self.daemon.client("compacted", features=frames.NO_SESSION) as client:
            while client.counters()["segments_freed"] == 0:
                pass
        self.assertEqual(self.ids("compacted", [0.0, 1.0]), {b"%d" % i for i in range(290, 300)})
        self.assertEqual(self.engramctl("compact", "nothing").returncode, 1)


if __name__ == "__main__":
    daemon.main()
