#!/usr/bin/env python3
"""growth_curve in a short form: it runs, its JSON has the keys that are read elsewhere, what it
grows is like what it grows from, and both indexes find what is there. No speed is judged.

GROWTH_CURVE names the program.
"""

import json
import os
import subprocess
import unittest

from check_vectors import latent_rows, store_vectors

DIMENSION = 48
LATENT = 8
ROWS = 6_000


class GrowthCurveTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        store_vectors(cls, "latent", latent_rows(ROWS, DIMENSION, LATENT, 1),
                      latent_rows(200, DIMENSION, LATENT, 2))

    def measure(self, *arguments):
        return subprocess.run(
            [os.environ["GROWTH_CURVE"], "--data", self.base, "--queries", self.queries,
             "--rounds", "1", *arguments],
            capture_output=True, text=True, timeout=200, check=False)

    def measure_json(self, *arguments):
        done = self.measure("--json", *arguments)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout.count("\n"), 1, "one line and nothing else")
        return json.loads(done.stdout)

    def test_grown_rows_are_like_real_ones(self):
        for metric in ("cosine", "l2"):
            with self.subTest(metric=metric):
                real = self.measure_json("--metric", metric, "--points", "6000")["points"][0]
                grown = self.measure_json("--metric", metric, "--points", "1500,6000",
                                          "--real", "1500")["points"]
                self.assertEqual((real["grown"], grown[0]["grown"], grown[1]["grown"]),
                                 (0, 0, 0.75))
                grown = grown[1]
                self.assertAlmostEqual(grown["grown_of_nearest"], 0.75, delta=0.08)
                for key, share in (("distance_to_tenth", 0.08), ("local_dimension", 0.2)):
                    self.assertAlmostEqual(grown[key] / real[key], 1, delta=share, msg=key)
                # Nearer to their parents than real rows are to each other, but no copies.
                self.assertGreater(grown["distance_of_rows"] / real["distance_of_rows"], 0.3)

    def test_json_has_the_keys_and_the_recall_is_sane(self):
        found = self.measure_json("--points", "2000,8000,12000", "--peer-count", "8000")
        self.assertEqual((found["set"], found["real"], found["dimension"]),
                         ("latent", ROWS, DIMENSION))
        points = found["points"]
        self.assertEqual([point["n"] for point in points], [2000, 8000, 12000])
        self.assertEqual([point["grown"] for point in points], [0, 0.25, 0.5])
        self.assertEqual(["hnswlib" in point for point in points], [True, True, False])
        self.assertIsNone(points[0]["engram"]["linked_inserts_per_s"], "no graph yet")
        for index in (points[1]["engram"], points[1]["hnswlib"], points[2]["engram"]):
            for key in ("linked_inserts_per_s", "us_an_insert_last_tenth"):
                self.assertGreater(index[key], 0, key)
            self.assertGreater(index["bytes_per_vector"], 4 * DIMENSION)
            self.assertEqual([point["ef"] for point in index["curve"]], [64, 128])
            for point in index["curve"]:
                self.assertGreater(point["recall_at_10"], 0.97)
                self.assertGreater(point["recalls_per_s"], 0)

    def test_the_same_seed_gives_the_same_rows(self):
        arguments = ("--points", "1000", "--real", "500", "--peer-count", "0")
        first = self.measure_json(*arguments)["points"][0]
        again = self.measure_json(*arguments)["points"][0]
        other = self.measure_json(*arguments, "--seed", "9")["points"][0]
        for key in ("grown_of_nearest", "distance_to_tenth", "local_dimension",
                    "distance_of_rows"):
            self.assertEqual(first[key], again[key], key)
        self.assertNotEqual(first["local_dimension"], other["local_dimension"])

    def test_people_get_tables(self):
        done = self.measure("--points", "5000,7000")
        self.assertEqual(done.returncode, 0, done.stderr)
        for part in ("grown of the nearest", "recall@10, ef 128", "hnswlib", "bytes a vector"):
            self.assertIn(part, done.stdout)


if __name__ == "__main__":
    unittest.main(verbosity=2)
