#!/usr/bin/env python3
"""Recalls of many, with a bound, and of all spaces, over native frames and with engramctl."""

import json
import struct
import tempfile

import daemon
import frames

ROWS = 1_000


class LongRecalls(daemon.DaemonCase):
    settings = {"limits.recall_batch": 7, "index.partitions": 2, "cores.shard": [0, 1]}

    def store(self, space, rows=ROWS, offset=0.0):
        client = self.daemon.client(space, metric=frames.L2, dimension=2,
                                    features=frames.ATTRIBUTES | frames.WIDE_RECALLS)
        self.assertEqual(client.hello_ack.features, frames.ATTRIBUTES | frames.WIDE_RECALLS)
        for first in range(0, rows, 200):
            naks = client.observe([
                frames.record(b"%d" % row, [row + offset, 0.0], payload=b"about %d" % row)
                for row in range(first, min(rows, first + 200))])
            self.assertEqual(naks, [])
        return client

    def test_frames_are_of_the_configured_size_and_all_hits_come_once(self):
        with self.store("many") as client:
            for payload in (False, True):
                answer = client.recall_frames([0.0, 0.0], 600, payload=payload)
                hits = [hit for _, batch in answer for hit in batch]
                self.assertEqual([hit.id for hit in hits], [b"%d" % row for row in range(600)])
                self.assertTrue(all(len(batch) <= 7 for _, batch in answer))
                self.assertEqual(len(answer[0][1]), 7, "those that come first are one frame")
                if payload:
                    self.assertTrue(all(hit.payload == b"about " + hit.id for hit in hits))

    def test_a_bound_leaves_out_what_is_beyond_it(self):
        with self.store("bound") as client:
            for within in (0, 1, 30, 900):
                hits = client.recall([0.0, 0.0], 10_000, bound=(within - 0.5) * abs(within - 0.5))
                self.assertEqual([int(hit.id) for hit in hits], list(range(within)))
            self.assertEqual(len(client.recall([0.0, 0.0], 20, bound=900.0 ** 2)), 20)
            with self.assertRaises(frames.Refused) as refused:
                client.recall([0.0, 0.0], 20, bound=float("nan"))
            self.assertEqual(refused.exception.nak.name, "bad_recall")

    def test_without_a_vector_the_latest_come_first(self):
        with self.daemon.client("latest", dimension=2, features=frames.ATTRIBUTES
                                | frames.WIDE_RECALLS) as client:
            client.observe([frames.record(b"%d" % row, [1.0, 2.0], when_ns=row * 7 % 50,
                                          payload=b"at %d" % (row * 7 % 50))
                            for row in range(50)])
            found = client.recall([], 20, payload=True,
                                  filter=frames.recall_filter(begin_ns=5, end_ns=45))
            self.assertEqual([hit.when_ns for hit in found], list(range(44, 24, -1)))
            self.assertEqual(found[0].payload, b"at 44")
            for fields in ({"filter": b""}, {"filter": frames.recall_filter(), "bound": 1.0},
                           {"filter": frames.recall_filter(), "across": True}):
                with self.assertRaises(frames.Refused) as refused:
                    client.recall([], 20, **fields)
                self.assertEqual(refused.exception.nak.name, "bad_recall")

    def test_all_spaces_of_a_kind_answer_as_one(self):
        with self.store("one", 50) as first, self.store("two", 50, offset=0.5) as second:
            hits = first.recall([0.0, 0.0], 40, payload=True, across=True)
            near = [hit for hit in hits if hit.space in (b"one", b"two")]
            self.assertEqual([(hit.id, hit.space) for hit in near[:4]],
                             [(b"0", b"one"), (b"0", b"two"), (b"1", b"one"), (b"1", b"two")])
            self.assertEqual(near[0].payload, b"about 0")
            self.assertEqual(second.recall([0.0, 0.0], 1)[0].space, b"")
        with self.daemon.client("nowhere", features=frames.WIDE_RECALLS
                                | frames.NO_SESSION) as nobody:
            with self.assertRaises(frames.Refused) as refused:
                nobody.recall([0.0, 0.0], 1, across=True)
            self.assertEqual(refused.exception.nak.name, "unknown_space")

    def test_engramctl_says_when_the_first_results_were_there(self):
        with tempfile.TemporaryDirectory() as folder:
            base, truth = f"{folder}/base.fvecs", f"{folder}/truth.ivecs"
            with open(base, "wb") as file:
                for row in range(ROWS):
                    file.write(struct.pack("<i2f", 2, row, 0.0))
            with open(truth, "wb") as file:
                file.write(struct.pack("<i400i", 400, *range(400)))
            loaded = daemon.engramctl("load", "--data", base, "--space", "timed", "--metric", "l2",
                                      address=self.daemon.address_text)
            self.assertEqual((loaded.returncode, loaded.stderr), (0, ""))
            arguments = ("recall", "--queries", base, "--groundtruth", truth, "--count", "1",
                         "--space", "timed", "-k", "400")
            done = daemon.engramctl(*arguments, address=self.daemon.address_text)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertIn("the first results  P50", done.stdout)
            done = daemon.engramctl(*arguments, "--within", "100.5", "--json",
                                    address=self.daemon.address_text)
            found = json.loads(done.stdout)
            self.assertAlmostEqual(found["recall_at_400"], 11 / 400)
            self.assertLessEqual(found["first_p50_us"], found["p50_us"])


if __name__ == "__main__":
    daemon.main()
