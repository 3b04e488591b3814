#!/usr/bin/env python3
"""engramctl compact, rebuild and drop: what goes is gone for good, the rest stays."""

import json
import random
import threading
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
        done = self.engramctl("drop", "gone", "--yes", "--json")
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
        self.assertEqual(self.engramctl("drop", "open", "--yes").returncode, 0)
        self.fill("open", 4, dimension=3)
        self.assertEqual(len(client.recall([0.0, 1.0, 1.0], 10)), 4)

    def test_drop_asks_for_the_name(self):
        self.fill("asked", 3)
        done = self.engramctl("drop", "asked", typed="no\n")
        self.assertEqual(done.returncode, 1)
        self.assertIn("nothing was dropped", done.stderr)
        self.assertEqual(len(self.ids("asked", [0.0, 1.0])), 3)
        done = self.engramctl("drop", "asked", typed="asked\n")
        self.assertEqual(done.returncode, 0, done.stderr)
        done = self.engramctl("drop", "asked", "--yes")
        self.assertEqual(done.returncode, 1)
        self.assertIn("unknown_space", done.stderr + done.stdout)

    # Fewer than upkeep would come for by itself, and in segments that mostly live.
    def test_compact_gives_back_what_was_deleted(self):
        deleted = range(0, 300, 10)
        with self.daemon.client("compacted", metric=frames.L2) as client:
            payload = b"p" * 20_000
            for first in range(0, 300, 20):
                client.observe([record(b"%d" % i, [float(i), 1.0], payload=payload)
                                for i in range(first, first + 20)])
            client.observe([record(b"%d" % i, op=frames.DELETE) for i in deleted])
            freed = client.counters()["segments_freed"]
        done = self.engramctl("compact", "compacted", "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        said = json.loads(done.stdout)
        self.assertEqual(said["observations"], len(deleted))
        self.assertLess(said["bytes_after"], said["bytes_before"])
        again = json.loads(self.engramctl("compact", "compacted", "--json").stdout)
        self.assertEqual(again["observations"], 0, "all was given back before the answer")
        with self.daemon.client("compacted", features=frames.NO_SESSION) as client:
            daemon.wait_until(lambda: client.counters()["segments_freed"] > freed,
                              "a segment is rewritten for what was deleted in it")
        self.assertEqual(self.ids("compacted", [0.0, 1.0]),
                         {b"%d" % i for i in range(300) if i not in deleted})
        self.assertEqual(self.engramctl("compact", "nothing").returncode, 1)


class RebuildTest(daemon.DaemonCase):
    settings = {"data.checkpoint_mib": 4096}
    count = 6_000  # more than a space has without a graph

    def setUp(self):
        self.random = random.Random(self.id())
        self.stored = {}

    def engramctl(self, *words):
        return daemon.engramctl(*words, address=self.daemon.address_text)

    def store(self, client, numbers):
        rows = []
        for number in numbers:
            name = b"id%d" % number
            vector = [self.random.gauss(0, 1) for _ in range(16)]
            payload = name + self.random.randbytes(self.random.randrange(200))
            self.stored[name] = (vector, payload)
            rows.append(record(name, vector, payload=payload))
        self.assertEqual(client.observe(rows), [])

    def fill(self, space):
        with self.daemon.client(space, metric=frames.L2) as client:
            for first in range(0, self.count, 200):
                self.store(client, range(first, first + 200))
            self.await_linked(client)

    def await_linked(self, client):
        daemon.wait_until(
            lambda: not any(each.unlinked for each in client.introspect(frames.SPACES)),
            "all is linked")

    def left(self, client):
        return client.counters()["rebuild_left"]

    def assert_found(self, client, names):
        for name in names:
            vector, payload = self.stored[name]
            hit = client.recall(vector, 1, payload=True)[0]
            self.assertEqual((hit.id, hit.payload), (name, payload))

    def some(self, count):
        return self.random.sample(sorted(self.stored), count)

    def test_all_is_linked_anew_while_it_serves(self):
        self.fill("rebuilt")
        with self.daemon.client("rebuilt") as client, self.daemon.client() as asker:
            asker.hello(features=frames.NO_SESSION)
            done = []
            thread = threading.Thread(
                target=lambda: done.append(self.engramctl("rebuild", "rebuilt", "--json")))
            thread.start()
            while self.left(client) == 0 and thread.is_alive():
                pass
            # One of a space at a time.
            asker.send_command(frames.REBUILD, "rebuilt")
            with self.assertRaises(frames.Refused) as refused:
                asker.wait_for(frames.COMMAND_DONE)
            self.assertEqual(refused.exception.nak.name, "busy")
            seen = set()
            added = self.count
            while thread.is_alive():
                self.store(client, range(added, added + 10))
                self.store(client, self.random.sample(range(self.count), 10))
                for name in self.some(3):
                    client.observe([record(name, op=frames.DELETE)])
                    del self.stored[name]
                self.assert_found(client, self.some(10))
                added += 10
                seen.add(self.left(client))
            thread.join()
            self.assertEqual(done[0].returncode, 0, done[0].stderr)
            said = json.loads(done[0].stdout)
            self.assertGreater(said["observations"], self.count // 2)
            self.assertLessEqual(said["observations"], self.count)
            self.assertGreater(len(seen), 5, "nothing was shown")
            self.assertEqual(self.left(client), 0)
            self.assert_found(client, self.some(200))
        self.assertEqual(self.engramctl("checkpoint").returncode, 0)
        self.restart()
        with self.daemon.client("rebuilt", features=frames.NO_SESSION) as client:
            self.assert_found(client, self.some(200))
            space = [each for each in client.introspect(frames.SPACES) if each.name == "rebuilt"][0]
            self.assertEqual(space.observations, len(self.stored))

    def restart(self):
        self.daemon.kill()
        self.daemon.spawn()
        self.daemon.wait_ready()

    def begin(self, client, space):
        client.send_command(frames.REBUILD, space)
        with self.daemon.client(space, features=frames.NO_SESSION) as other:
            while not 0 < self.left(other) < self.count:
                pass

    def test_a_crash_in_its_midst_loses_nothing(self):
        self.fill("crashed")
        with self.daemon.client("crashed", features=frames.NO_SESSION) as client:
            self.begin(client, "crashed")
            self.assertEqual(self.engramctl("checkpoint").returncode, 0)
            self.restart()
        with self.daemon.client("crashed", features=frames.NO_SESSION) as client:
            self.assertEqual(self.left(client), 0, "it is not taken up again")
            self.assert_found(client, self.some(200))
            self.await_linked(client)  # What was lifted when it was saved.
            done = self.engramctl("rebuild", "crashed", "--json")
            self.assertEqual(json.loads(done.stdout)["observations"], self.count)

    # Who waits for it is told, and the daemon stops at once.
    def test_a_stop_in_its_midst_ends_it(self):
        self.fill("stopped")
        with self.daemon.client("stopped", features=frames.NO_SESSION) as client:
            self.begin(client, "stopped")
            self.daemon.terminate()
            with self.assertRaises(frames.ServerClosed):
                client.wait_for(frames.COMMAND_DONE)
            self.assertEqual(self.daemon.wait(), 0)
            self.assertNotIn("did not end in time", self.daemon.log.finish())
        self.daemon.spawn()
        self.daemon.wait_ready()
        with self.daemon.client("stopped", features=frames.NO_SESSION) as client:
            self.assert_found(client, self.some(200))

    def test_where_there_is_no_graph_there_is_nothing_to_do(self):
        with self.daemon.client("small", metric=frames.L2) as client:
            self.store(client, range(20))
        done = self.engramctl("rebuild", "small", "--json")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(json.loads(done.stdout)["observations"], 0)
        for command in (("rebuild",), ("compact",), ("drop", "--yes")):
            done = self.engramctl(*command, "nothing")
            self.assertEqual(done.returncode, 1)
            self.assertRegex(done.stderr, "space nothing: .*unknown_space.*engramctl spaces")


if __name__ == "__main__":
    daemon.main()
