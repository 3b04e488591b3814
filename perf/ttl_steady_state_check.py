#!/usr/bin/env python3
"""ttl_steady_state in a short form: it runs, its JSON has the keys that are read elsewhere, what
expires keeps up with what comes, and what lives is found. No speed is judged.

TTL_STEADY_STATE names the program.
"""

import json
import os
import pathlib
import subprocess
import tempfile
import unittest

from check_vectors import normal_rows, write_fvecs

DIMENSION = 24
KEYS = {"accepted_per_s", "expired_per_s", "swept_per_s", "recall_at_10", "recall_us", "live",
        "backlog", "retired", "space_mib", "resident_mib", "disk_mib", "checkpoints"}


class TtlSteadyStateTest(unittest.TestCase):

    def test_short_form(self):
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            write_fvecs(root / "base.fvecs", normal_rows(20_000, DIMENSION, 1))
            write_fvecs(root / "query.fvecs", normal_rows(100, DIMENSION, 2))
            done = subprocess.run(
                [os.environ["TTL_STEADY_STATE"], "--data", root / "base.fvecs",
                 "--queries", root / "query.fvecs", "--seconds", "6", "--ttl-s", "1",
                 "--window-s", "1", "--checkpoint-mib", "16", "--dir", root, "--json"],
                capture_output=True, text=True, timeout=200, check=False)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertEqual(done.stderr, "")
            windows = [json.loads(line) for line in done.stdout.splitlines()]
            self.assertGreaterEqual(len(windows), 5)
            for window in windows:
                self.assertEqual(set(window), KEYS)
                self.assertGreater(window["recall_at_10"], 0.8)
            # Once the first have expired, as many end as come, but for what the rate swings by.
            accepted = sum(window["accepted_per_s"] for window in windows[2:])
            expired = sum(window["expired_per_s"] for window in windows[2:])
            self.assertGreater(expired, accepted / 2)
            self.assertEqual([path.name for path in root.glob("ttl_steady_state*")], [])


if __name__ == "__main__":
    unittest.main()
