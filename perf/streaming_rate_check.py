#!/usr/bin/env python3
"""streaming_rate in a short form: it runs, its JSON has the keys that are read elsewhere, all that
was due was taken and linked, and what was stored is found at once. No speed is judged.

STREAMING_RATE names the program.
"""

import json
import os
import subprocess
import unittest

from check_vectors import normal_rows, store_vectors

DIMENSION = 72
KEYS = {"seconds", "accepted_per_s", "accepted", "due", "linked", "backlog", "memory_bytes",
        "recalls", "recall_at_10", "found_own", "recall_p50_us", "recall_p99_us", "visible_p50_us",
        "visible_p99_us", "vectors_a_recall", "bytes_a_recall"}


class StreamingRateTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        if len(os.sched_getaffinity(0)) < 2:
            raise unittest.SkipTest("the shard and its client need a processor each")
        store_vectors(cls, "normal", normal_rows(6_000, DIMENSION, 1),
                      normal_rows(100, DIMENSION, 2))

    def measure(self, *arguments):
        done = subprocess.run(
            [os.environ["STREAMING_RATE"], "--data", self.base, "--queries", self.queries,
             "--json", *arguments],
            capture_output=True, text=True, timeout=200, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def test_new_ones_by_the_clock(self):
        self.check_phases("--grow", "--rows", "2000", "--preload", "5000")

    def test_replacing_ones_by_the_clock(self):
        self.check_phases()

    def check_phases(self, *arguments):
        phases = self.measure("--rate", "4000", "--recalls-per-s", "100", "--seconds", "1.5",
                              "--turn-s", "0.3", "--samples", "40", *arguments)[0]
        self.assertEqual(set(phases), {"loaded", "drained", "idle", "at_rest", "idle_alone"})
        for name in ("loaded", "drained", "idle"):
            self.assertEqual(set(phases[name]), KEYS, name)
        loaded = phases["loaded"]
        self.assertGreater(loaded["accepted"], 3_000)
        self.assertLessEqual(loaded["accepted"], loaded["due"])
        self.assertEqual(phases["drained"]["backlog"], 0)
        self.assertGreater(loaded["recall_at_10"], 0.9)
        self.assertEqual(loaded["found_own"], 1)
        self.assertGreater(loaded["vectors_a_recall"], 100)

    def test_what_recalls_cost(self):
        turns = self.measure("--grow", "--rows", "2000", "--preload", "5000", "--lost-to", "50",
                             "--turn-s", "0.3")
        self.assertEqual(len(turns), 3)
        for turn in turns:
            self.assertGreater(turn["accepted_per_s"], 0)
            self.assertGreater(turn["accepted_per_s_with_recalls"], 0)
            self.assertGreater(turn["core_time_alone"], 0)


if __name__ == "__main__":
    unittest.main()
