#!/usr/bin/env python3
"""Whole public data sets over TCP: all acked, none refused, recall@10 rising with ef.

ENGRAM_DATA_DIR names the directory that holds fashion-mnist-784 and debwn-text-768;
ENGRAM_LONG=1 takes the long one too.
"""

import json
import os
import pathlib
import unittest

import daemon

EFS = (10, 40, 160)
QUERIES = 1000
LOAD_DEADLINE_S = 1800


class RealDataTest(unittest.TestCase):

    def data(self, name):
        directory = os.environ.get("ENGRAM_DATA_DIR")
        if not directory:
            self.skipTest("ENGRAM_DATA_DIR names no directory of data sets")
        path = pathlib.Path(directory) / name
        if not path.is_dir():
            self.skipTest(f"{path} is not there")
        return path

    def run_json(self, running, *arguments):
        done = daemon.engramctl(*arguments, "--json", address=running.address_text,
                                timeout_s=LOAD_DEADLINE_S)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        return json.loads(done.stdout)

    def load_and_recall(self, rows, metric, base, queries, truth):
        with daemon.running({"memory.limit_mib": 4096}) as running:
            report = self.run_json(running, "load", "--data", base, "--space", "whole", "--metric",
                                   metric, "--wait-linked")
            self.assertEqual((report["observations_sent"], report["observations_acked"],
                              report["refused"]), (rows, rows, {}))
            space = self.run_json(running, "spaces")["spaces"][0]
            self.assertEqual((space["observations"], space["linked"], space["unlinked"],
                              space["metric"]), (rows, rows, 0, metric))
            quality = [self.run_json(running, "recall", "--space", "whole", "--queries", queries,
                                     "--groundtruth", truth, "--data", base, "--ef", ef, "--count",
                                     QUERIES)["recall_at_10"] for ef in EFS]
            print(f"{base}: {report['observations_per_s']:.0f} observations/s, linked after "
                  f"{report['linked_s']:.0f} s, recall@10 {quality} at ef {EFS}")
            self.assertEqual(quality, sorted(quality))
            self.assertLess(quality[0], quality[-1])
            self.assertGreaterEqual(quality[-1], 0.95)

    def test_fashion_mnist_784(self):
        path = self.data("fashion-mnist-784")
        self.load_and_recall(60_000, "l2", path / "base.bvecs", path / "query.bvecs",
                             path / "gt100_l2.ivecs")

    def test_debwn_text_768(self):
        path = self.data("debwn-text-768")
        if os.environ.get("ENGRAM_LONG") != "1":
            self.skipTest("takes minutes: ENGRAM_LONG=1 runs it")
        self.load_and_recall(198_147, "ip", path / "base.fvecs", path / "query_docs.fvecs",
                             path / "gt100_ip_query_docs.ivecs")


if __name__ == "__main__":
    daemon.main()
