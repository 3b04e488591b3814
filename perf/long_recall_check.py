#!/usr/bin/env python3
"""long_recall_bench in a short form: it runs, its JSON has the keys that are read elsewhere, and
recalls of many find what is near, linked or waiting. No speed is judged.

LONG_RECALL_BENCH names the program.
"""

import json
import os
import subprocess
import unittest

from check_vectors import latent_rows, store_vectors

DIMENSION = 256
ROWS = 6_000


class LongRecallTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        store_vectors(cls, "latent", latent_rows(ROWS, DIMENSION, 8, 1),
                      latent_rows(10, DIMENSION, 8, 2))

    def measure(self, *arguments):
        return subprocess.run(
            [os.environ["LONG_RECALL_BENCH"], "--data", self.base, "--queries", self.queries,
             "--rounds", "1", *arguments],
            capture_output=True, text=True, timeout=200, check=False)

    def test_json_has_the_keys_and_the_recall_is_sane(self):
        for waiting in ("0", "1500"):
            done = self.measure("--json", "--metric", "l2", "--k", "10,1000,5000", "--waiting",
                                waiting)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(done.stdout.count("\n"), 1, "one line and nothing else")
            found = json.loads(done.stdout)
            self.assertEqual((found["set"], found["n"], found["dimension"], found["ef"]),
                             ("latent", ROWS, DIMENSION, 128))
            self.assertEqual([line["k"] for line in found["recalls"]], [10, 1000, 5000])
            for line in found["recalls"]:
                self.assertGreater(line["first_recall_at_10"], 0.95)
                self.assertGreater(line["recall_at_k"], 0.95)
                self.assertLessEqual(line["first_us"], line["last_us"])
                for key in ("first_us", "first_p99_us", "last_p99_us", "longest_slice_us",
                            "compare_all_us"):
                    self.assertGreater(line[key], 0, key)

    def test_people_get_a_table(self):
        done = self.measure("--count", "2000", "--k", "300")
        self.assertEqual(done.returncode, 0, done.stderr)
        for part in ("recall@10, first", "recall@k", "us to last", "longest slice"):
            self.assertIn(part, done.stdout)


if __name__ == "__main__":
    unittest.main(verbosity=2)
