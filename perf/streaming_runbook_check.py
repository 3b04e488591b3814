#!/usr/bin/env python3
"""streaming_runbook and streaming_schedule in a short form: they run on the shard and on hnswlib,
what these find is what lives, and the JSON has the keys that are read elsewhere. No speed is
judged.

STREAMING_RUNBOOK and STREAMING_SCHEDULE name the programs.
"""

import json
import os
import subprocess
import unittest

from check_vectors import latent_rows, store_vectors

DIMENSION = 32
LATENT = 6
ROWS = 7_200

# Of 1,200 ids, so scaled by six: half goes, comes back, and a sixth gets other vectors.
RUNBOOK = """\
latent:
  max_pts: 1000
  1:
    operation: "insert"
    start: 0
    end: 800
  2:
    operation: "search"
  3:
    operation: "delete"
    start: 0
    end: 400
  4:
    operation: "search"
  5:
    operation: "insert"
    start: 0
    end: 400
  6:
    operation: "replace"
    tags_start: 300
    tags_end: 500
    ids_start: 1000
    ids_end: 1200
  7:
    operation: "search"
  8:
    operation: "delete"
    start: 200
    end: 500
  9:
    operation: "insert"
    start: 800
    end: 1000
  10:
    operation: "search"
"""


class StreamingRunbookTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        store_vectors(cls, "latent", latent_rows(ROWS, DIMENSION, LATENT, 1),
                      latent_rows(200, DIMENSION, LATENT, 2))
        cls.runbook = cls.root / "short_runbook.yaml"
        cls.runbook.write_text(RUNBOOK)

    def run_it(self, *arguments):
        return subprocess.run(
            [os.environ["STREAMING_RUNBOOK"], "--runbook", self.runbook, "--data", self.base,
             "--queries", self.queries, *arguments],
            capture_output=True, text=True, timeout=200, check=False)

    def run_json(self, *arguments):
        done = self.run_it("--json", *arguments)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout.count("\n"), 1, "one line and nothing else")
        return json.loads(done.stdout)

    def judge(self, index, live):
        self.assertGreater(index["recall_at_10"], 0.97)
        self.assertGreater(index["worst_recall_at_10"], 0.95)
        self.assertEqual(index["dead_hits"], 0)
        self.assertEqual([search["step"] for search in index["searches"]], [2, 4, 7, 10])
        self.assertEqual([search["live"] for search in index["searches"]], live)
        for key in ("inserts_per_s", "replaces_per_s", "deletes_per_s", "recall_us",
                    "recall_us_p99"):
            self.assertGreater(index[key], 0, key)
        self.assertEqual(index["live"], live[-1])

    def test_what_lives_is_found_at_each_step_and_at_the_end(self):
        live = [4800, 2400, 4800, 4200]
        for rest in ([], ["--rest"]):
            with self.subTest(rest=rest):
                found = self.run_json("--order", "clustered", "--count", str(ROWS), *rest)
                self.assertEqual((found["runbook"], found["part"], found["set"]),
                                 ("short_runbook.yaml", "latent", "latent"))
                self.assertEqual((found["vectors"], found["scale"], found["most_live"]),
                                 (ROWS, 6, 4800))
                self.judge(found["engram"], live)
                self.judge(found["hnswlib"], live)
                ours = found["engram"]
                self.assertEqual(ours["find_themselves"], ours["live"])
                self.assertEqual(ours["find_themselves_wider"], ours["live"])
                self.assertLess(ours["most_under_fresh"], 0.01)
                for search in ours["searches"]:
                    self.assertGreater(search["fresh_recall_at_10"], 0.97)
                    if rest:
                        # Below the least size of a graph nothing is linked at all.
                        self.assertIn(search["unlinked"], (0, search["live"]))

    def test_searches_may_go_without_a_fresh_index(self):
        found = self.run_json("--fresh", "1", "--peers", "none", "--metric", "l2",
                              "--count", "1200")
        self.assertNotIn("hnswlib", found)
        fresh = [search["fresh_recall_at_10"] for search in found["engram"]["searches"]]
        self.assertEqual(fresh[:3], [None] * 3)
        self.assertGreater(fresh[3], 0.97)
        self.judge(found["engram"], [800, 400, 800, 700])

    def test_people_get_a_table(self):
        done = self.run_it("--order", "shuffled", "--count", "1200")
        self.assertEqual(done.returncode, 0, done.stderr)
        for part in ("most under fresh", "hnswlib", "find themselves", "at most 800 live"):
            self.assertIn(part, done.stdout)

    def test_what_cannot_be_run_is_refused_with_its_line(self):
        faults = (
            (RUNBOOK.replace('"search"', '"seek"', 1), ":8: operation \"seek\""),
            (RUNBOOK.replace("end: 400", "end: 801", 1), ":9: tag 800 does not live"),
            (RUNBOOK.replace("end: 800", "end: 5", 1), ":7: searches among 5"))
        for text, message in faults:
            with self.subTest(message=message):
                self.runbook.write_text(text)
                self.addCleanup(self.runbook.write_text, RUNBOOK)
                done = self.run_it("--json", "--count", "1200")
                self.assertEqual(done.returncode, 1)
                self.assertIn("short_runbook.yaml" + message, done.stderr)
                self.assertEqual(done.stdout, "")
        self.assertEqual(self.run_it("--part", "no_such").returncode, 1)
        self.assertEqual(self.run_it("--order", "no_such").returncode, 2)

    def test_recalls_go_on_while_vectors_come_by_the_clock(self):
        done = subprocess.run(
            [os.environ["STREAMING_SCHEDULE"], "--data", self.base, "--queries", self.queries,
             "--count", "6000", "--rate", "12000", "--recalls-per-s", "2000", "--json"],
            capture_output=True, text=True, timeout=200, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        found = json.loads(done.stdout)
        self.assertEqual((found["vectors"], found["scheduled_s"]), (6000, 0.5))
        for name in ("engram", "hnswlib"):
            index = found[name]
            self.assertGreaterEqual(index["seconds"], 0.49, "none comes before it is due")
            self.assertEqual([stage["stage"] for stage in index["stages"]],
                             ["50 %", "80 %", "100 %", "after a rest"])
            for stage, least in zip(index["stages"], (3000, 4800, 6000, 6000)):
                self.assertGreaterEqual(stage["vectors_from"], least)
                self.assertGreater(stage["recall_at_10"], 0.97)
                self.assertGreaterEqual(stage["recall_us_p99"], stage["recall_us_p50"])
            self.assertGreater(index["stages"][0]["vectors_to"],
                               index["stages"][0]["vectors_from"], "inserts went on meanwhile")
        self.assertEqual(found["engram"]["stages"][3]["unlinked"], 0)


if __name__ == "__main__":
    unittest.main(verbosity=2)
