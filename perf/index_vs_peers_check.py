#!/usr/bin/env python3
"""index_vs_peers in a short form: it runs, its JSON has the keys that are read elsewhere, both
indexes find what is there, and its plots are sound. No speed is judged.

INDEX_VS_PEERS names the program.
"""

import array
import json
import os
import subprocess
import unittest
import xml.etree.ElementTree

from check_vectors import normal_rows, store_vectors, write_fvecs

DIMENSION = 24
# More than a space keeps without a graph.
ROWS = 5_000
QUERIES = 100
RATIOS = ("linked_inserts_over_hnswlib", "linked_inserts_over_hnswlib_chunk_median",
          "linked_inserts_over_hnswlib_last_tenth", "recalls_over_hnswlib_at_090",
          "recalls_over_hnswlib_at_095", "recalls_over_hnswlib_least")


class IndexVsPeersTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        store_vectors(cls, "normal", normal_rows(ROWS, DIMENSION, 1),
                      normal_rows(QUERIES, DIMENSION, 2))

    def compare(self, *arguments, queries=None):
        return subprocess.run(
            [os.environ["INDEX_VS_PEERS"], "--data", self.base,
             "--queries", queries or self.queries, "--rounds", "1", *arguments],
            capture_output=True, text=True, timeout=200, check=False)

    def compare_json(self, *arguments, queries=None):
        done = self.compare("--json", *arguments, queries=queries)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout.count("\n"), 1, "one line and nothing else")
        return json.loads(done.stdout)

    def test_json_has_the_keys_and_the_recall_is_sane(self):
        plots = self.root / "plots"
        found = self.compare_json("--metric", "cosine", "--cheaper", "8:40", "--out", plots)
        self.assertEqual((found["n"], found["dimension"], found["set"]),
                         (ROWS, DIMENSION, "normal"))
        for key in RATIOS:
            self.assertGreater(found[key], 0, key)
        for key in ("recalls_over_hnswlib_at_098", "recalls_over_hnswlib_at_099",
                    "hnswlib_cheapest", "linked_inserts_over_hnswlib_cheapest",
                    "linked_inserts_over_hnswlib_cheapest_at_095", "hnswlib_cheapest_at_099"):
            self.assertIn(key, found)
        self.assertGreater(found["recall_at_10"], 0.97)
        self.assertGreater(found["hnswlib_recall_at_10"], 0.97)
        for index in (found["engram"], found["hnswlib"], *found["hnswlib_others"]):
            self.assertEqual(index["linked"], ROWS)
            self.assertGreater(index["bytes_per_vector"], 4 * DIMENSION)
            self.assertEqual([point["n"] for point in index["inserts"]],
                             [1000, 2000, 3000, 4000, 5000])
            recalls = [point["recall_at_10"] for point in index["curve"]]
            self.assertLess(recalls[0], recalls[-1])
            self.assertGreater(recalls[-1], 0.99)
        self.assertIsNone(found["engram"]["inserts"][0]["linked_per_s"], "no graph yet")
        self.check_plots(plots)

    def check_plots(self, folder):
        names = sorted(path.name for path in folder.iterdir())
        self.assertEqual(names, [f"normal-{ROWS}-inserts.svg", f"normal-{ROWS}-recall.svg"])
        for name in names:
            svg = xml.etree.ElementTree.parse(folder / name).getroot()
            self.assertEqual(svg.tag, "{http://www.w3.org/2000/svg}svg")
            lines = svg.findall("{http://www.w3.org/2000/svg}polyline")
            self.assertEqual(len(lines), 3)
            self.assertTrue(all(line.get("points") for line in lines), name)

    def test_every_form_of_our_vectors_under_every_metric(self):
        for metric, precision, traversal in (("l2", "f32", "exact"), ("ip", "bf16", "int8"),
                                             ("cosine", "int8", "int8")):
            with self.subTest(metric=metric, precision=precision, traversal=traversal):
                found = self.compare_json("--metric", metric, "--precision", precision,
                                          "--traversal", traversal, "--cheaper", "none",
                                          "--ef-construction", "60")
                self.assertEqual(found["metric"], metric)
                # Random inner products have their nearest among a few long vectors; int8 alone
                # cannot tell near ones apart.
                self.assertGreater(found["recall_at_10"], 0.90)
                self.assertGreater(found["hnswlib_recall_at_10"], 0.90)

    def test_a_set_without_a_graph_has_no_insert_ratio(self):
        found = self.compare_json("--count", "500", "--cheaper", "none")
        self.assertIsNone(found["linked_inserts_over_hnswlib"])
        self.assertEqual(found["engram"]["linked"], 0)
        self.assertEqual(found["recall_at_10"], 1)

    def test_a_truth_from_a_file_is_taken(self):
        # Queries that are rows, each named ten times as its own neighbours: one of ten is found.
        truth = self.root / "truth.ivecs"
        with open(truth, "wb") as file:
            for row in range(QUERIES):
                file.write(array.array("i", [10] + [row] * 10).tobytes())
        arguments = ("--metric", "l2", "--groundtruth", truth, "--cheaper", "none",
                     "--query-count", str(QUERIES))
        taken = self.compare_json(*arguments, queries=self.base)
        self.assertAlmostEqual(taken["recall_at_10"], 0.1)
        cut = self.compare_json(*arguments, "--count", str(ROWS - 1), queries=self.base)
        self.assertGreater(cut["recall_at_10"], 0.97)

    def test_wrong_input_names_itself(self):
        missing = self.compare(queries=self.root / "none.fvecs")
        self.assertEqual((missing.returncode, missing.stdout), (1, ""))
        self.assertIn("none.fvecs", missing.stderr)
        wrong = self.compare("--cheaper", "16")
        self.assertEqual((wrong.returncode, wrong.stdout), (2, ""))
        self.assertIn("M:ef_construction", wrong.stderr)
        narrow = self.root / "narrow.fvecs"
        write_fvecs(narrow, [[1.0, 2.0]])
        self.assertIn("vectors of 24, the queries have 2", self.compare(queries=narrow).stderr)

    def test_people_get_tables(self):
        done = self.compare("--cheaper", "none", "--count", "5000")
        self.assertEqual(done.returncode, 0, done.stderr)
        for part in ("engram / hnswlib", "recall@10", "bytes a vector"):
            self.assertIn(part, done.stdout)


if __name__ == "__main__":
    unittest.main(verbosity=2)
