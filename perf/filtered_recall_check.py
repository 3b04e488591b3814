#!/usr/bin/env python3
"""filtered_recall_bench in a short form: it runs, its JSON has the keys that are read elsewhere,
and filters of all kinds find what matches. No speed is judged.

FILTERED_RECALL_BENCH names the program.
"""

import json
import os
import subprocess
import unittest

from check_vectors import latent_rows, store_vectors

DIMENSION = 32
LATENT = 8
ROWS = 8_000


class FilteredRecallTest(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        rows = latent_rows(ROWS, DIMENSION, LATENT, 1)
        store_vectors(cls, "latent", rows,
                      latent_rows(40, DIMENSION, LATENT, 2))
        cls.categories = cls.root / "base.tsv"
        # What goes with what a row is: on which side of zero its first numbers are.
        lines = [f"{number}\tlatent\t{sum(2 ** bit for bit in range(3) if row[bit] > 0)}\tx\n"
                 for number, row in enumerate(rows)]
        cls.categories.write_text("".join(lines), encoding="utf-8")

    def measure(self, *arguments):
        return subprocess.run(
            [os.environ["FILTERED_RECALL_BENCH"], "--data", self.base, "--queries", self.queries,
             "--categories", self.categories, "--rounds", "1", *arguments],
            capture_output=True, text=True, timeout=200, check=False)

    def test_json_has_the_keys_and_the_recall_is_sane(self):
        done = self.measure("--json", "--metric", "l2")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stdout.count("\n"), 1, "one line and nothing else")
        found = json.loads(done.stdout)
        self.assertEqual((found["set"], found["n"], found["dimension"], found["ef"]),
                         ("latent", ROWS, DIMENSION, 128))
        self.assertGreater(found["unfiltered_us"], 0)
        self.assertLess(found["time_bytes_per_row"], 9)
        filters = {line["filter"]: line for line in found["filters"]}
        for name, share in (("half", 0.5), ("tenth", 0.1), ("hundredth", 0.01),
                            ("not half", 0.5), ("a tenth of time", 0.1),
                            ("half, a tenth of time", 0.05), ("one who", 0.01)):
            self.assertAlmostEqual(filters[name]["matching"] / ROWS / share, 1, delta=0.5)
        self.assertEqual(sum(name.startswith("category") for name in filters), 3)
        for line in found["filters"]:
            self.assertGreater(line["recall_at_10"], 0.97, line["filter"])
            for key in ("us", "compare_all_us", "ratio"):
                self.assertGreater(line[key], 0, key)

    def test_people_get_a_table(self):
        done = self.measure("--count", "5000")
        self.assertEqual(done.returncode, 0, done.stderr)
        for part in ("recall@10", "us to compare all", "thousandth", "bytes a row"):
            self.assertIn(part, done.stdout)


if __name__ == "__main__":
    unittest.main(verbosity=2)
