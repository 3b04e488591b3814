#!/usr/bin/env python3
"""shard_scaling_bench in a short form: it runs in turns and in threads, its JSON has the keys that
are read elsewhere, and shards find together what one index finds. No speed is judged.

SHARD_SCALING_BENCH names the program.
"""

import json
import os
import subprocess
import unittest

from check_vectors import normal_rows, store_vectors

DIMENSION = 32
ROWS = 5_000
MOST = 3


class ShardScalingTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        store_vectors(cls, "normal", normal_rows(MOST * ROWS, DIMENSION, 1),
                      normal_rows(100, DIMENSION, 2))

    def measure(self, *arguments):
        return subprocess.run(
            [os.environ["SHARD_SCALING_BENCH"], "--data", self.base, "--queries", self.queries,
             "--rounds", "1", "--ef", "128",
             *(() if "--rows" in arguments else ("--rows", str(ROWS))), *arguments],
            capture_output=True, text=True, timeout=200, check=False)

    def measure_json(self, *arguments):
        done = self.measure("--json", *arguments)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout.count("\n"), 1, "one line and nothing else")
        return json.loads(done.stdout)

    def test_shards_in_turns(self):
        found = self.measure_json("--shards", "1,3")
        self.assertEqual((found["set"], found["rows_per_shard"], found["threads"]),
                         ("normal", ROWS, False))
        one, three = found["points"]
        self.assertEqual((one["shards"], three["shards"]), (1, 3))
        for point in (one, three):
            for key in ("us_an_insert", "inserts_per_s", "inserts_per_s_of_shard"):
                self.assertGreater(point[key], 0, key)
            self.assertGreater(point["recall_at_10"], 0.95)
            self.assertGreater(point["one_index"]["recall_at_10"], 0.93)
            self.assertGreater(point["one_index"]["us_an_insert"], 0)
        # The very same index, made alike.
        self.assertEqual(one["recall_at_10"], one["one_index"]["recall_at_10"])
        self.assertGreaterEqual(three["recall_at_10"], three["one_index"]["recall_at_10"])
        for key, share in (("bytes_per_vector", 0.02), ("distances_an_insert", 0.1)):
            self.assertAlmostEqual(three[key] / one[key], 1, delta=share, msg=key)
        counted = [point["instructions_an_insert"] for point in (one, three)]
        if found["not_counted"]:
            self.assertIn("perf_event_open", found["not_counted"])
        else:
            self.assertAlmostEqual(counted[1] / counted[0], 1, delta=0.1)

    def test_a_thread_for_each_shard(self):
        most = min(2, len(os.sched_getaffinity(0)))
        found = self.measure_json("--threads", "--shards", "1,2,1000")
        self.assertEqual([point["shards"] for point in found["points"]], [1, 2][:most])
        for point in found["points"]:
            self.assertGreater(point["inserts_per_s"], 0)
            self.assertGreater(point["recall_at_10"], 0.95)

    def test_too_few_rows_are_named(self):
        done = self.measure("--shards", "4")
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn("want 20000", done.stderr)

    def test_people_get_a_table(self):
        done = self.measure("--shards", "1", "--rows", "500")
        self.assertEqual(done.returncode, 0, done.stderr)
        for part in ("us an insert", "LLC misses", "one index", "recall@10"):
            self.assertIn(part, done.stdout)


if __name__ == "__main__":
    unittest.main(verbosity=2)
