#!/usr/bin/env python3
"""engramctl as a program's user sees it: JSON alone on standard output, errors and exit codes."""

import gzip
import json
import math
import operator
import pathlib
import re
import struct
import subprocess
import tempfile
import unittest

import daemon
import frames

ENCODER = daemon.SAMPLE_DATA / "encoder"
TEXTS = daemon.SAMPLE_DATA / "texts.tsv.gz"
ROWS, QUERIES, DIMENSION = 2000, 20, 768
ROW_BYTES = 4 + 4 * DIMENSION


def read_fvecs(path, rows):
    """The first rows of an .fvecs file of DIMENSION."""
    with open(path, "rb") as file:
        return [struct.unpack(f"<i{DIMENSION}f", file.read(ROW_BYTES))[1:] for _ in range(rows)]


def write_groundtruth(path, base, queries):
    """The 100 rows of base with the highest inner product for each query, as .ivecs."""
    with open(path, "wb") as file:
        for query in queries:
            scores = [math.fsum(map(operator.mul, query, row)) for row in base]
            order = sorted(range(len(base)), key=lambda row: (-scores[row], row))[:100]
            file.write(struct.pack("<i100i", 100, *order))


class EngramctlCase(daemon.DaemonCase):
    """Files that the cases share: all texts as vectors, 20 queries, the truth over 2,000 rows."""

    @classmethod
    def setUpClass(cls):
        cls.directory = tempfile.TemporaryDirectory(prefix="engramctl-test-")
        cls.addClassCleanup(cls.directory.cleanup)
        path = pathlib.Path(cls.directory.name)
        cls.base, cls.queries, cls.truth = path / "b.fvecs", path / "q.fvecs", path / "t.ivecs"
        for texts, out in ((TEXTS, cls.base),
                           (daemon.SAMPLE_DATA / "query_docs.tsv.gz", cls.queries)):
            done = daemon.engramctl("encode", "--encoder", ENCODER, "--texts", texts,
                                    "--out", out)
            if done.returncode != 0 or done.stderr:
                raise AssertionError(f"encode: {done.returncode} {done.stderr}")
        super().setUpClass()

    def run_json(self, *arguments, address=None):
        """The JSON of a run that has to succeed: one line, nothing else, nothing on stderr."""
        done = daemon.engramctl(*arguments, "--json",
                                address=address or self.daemon.address_text)
        self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)
        self.assertEqual(done.stdout.count("\n"), 1)
        return json.loads(done.stdout)

    def run_failing(self, code, *arguments, address=None):
        """Standard error of a run that has to fail with this code and says nothing on stdout."""
        done = daemon.engramctl(*arguments, address=address or self.daemon.address_text)
        self.assertEqual((done.returncode, done.stdout), (code, ""), done.stderr)
        self.assertTrue(done.stderr.strip())
        return done.stderr

    def load(self, space, *more):
        return self.run_json("load", "--data", self.base, "--space", space, *more)

    def observations(self, space):
        spaces = {entry["name"]: entry for entry in self.run_json("spaces")["spaces"]}
        return spaces[space]["observations"] if space in spaces else 0


class LoadAndRecallTest(EngramctlCase):

    def test_load_reports_what_was_sent_acked_and_refused(self):
        report = self.load("report", "--count", 1000, "--batch", 7, "--connections", 3)
        self.assertEqual((report["observations_sent"], report["observations_acked"]), (1000, 1000))
        self.assertEqual(report["refused"], {})
        self.assertGreater(report["observations_per_s"], 0)
        self.assertLessEqual(report["ack_p50_us"], report["ack_p99_us"])
        self.assertLessEqual(report["ack_p99_us"], report["ack_p999_us"])
        self.assertEqual(self.observations("report"), 1000)
        # Ids are row numbers: the same rows again replace the first ones.
        self.load("report", "--count", 1200)
        self.assertEqual(self.observations("report"), 1200)

    def test_refused_observations_are_told_by_reason_and_fail_the_run(self):
        with tempfile.NamedTemporaryFile(suffix=".fvecs") as file:
            rows = [[1.0, 2.0], [math.nan, 1.0], [0.0, 0.0], [3.0, 4.0], [math.inf, 0.0]]
            file.write(b"".join(struct.pack("<i2f", 2, *row) for row in rows))
            file.flush()
            done = daemon.engramctl("load", "--data", file.name, "--space", "refused", "--metric",
                                    "cosine", "--json", address=self.daemon.address_text)
        report = json.loads(done.stdout)
        self.assertEqual(report["refused"], {"not_finite": 2, "zero_vector": 1})
        self.assertEqual((report["observations_sent"], report["observations_acked"]), (5, 2))
        self.assertEqual(done.returncode, 1)
        self.assertEqual(self.observations("refused"), 2)

    def test_rate_is_kept_within_10_percent(self):
        # By the clock, on a machine that others may use: one of three.
        rates = []
        while not any(abs(rate - 1000) <= 100 for rate in rates):
            self.assertLess(len(rates), 3, rates)
            report = self.load("rate", "--rate", 1000, "--count", 2000)
            self.assertEqual(report["observations_acked"], 2000)
            rates.append(report["observations_per_s"])

    def test_recall_over_a_small_space_is_exact(self):
        base = read_fvecs(self.base, ROWS)
        write_groundtruth(self.truth, base, read_fvecs(self.queries, QUERIES))
        for metric, dtype in (("cosine", "f32"), ("ip", "f32")):
            space = f"small-{metric}"
            self.load(space, "--count", ROWS, "--metric", metric, "--dtype", dtype)
            report = self.run_json("recall", "--space", space, "--queries", self.queries,
                                   "--groundtruth", self.truth, "--data", self.base, "--count",
                                   QUERIES, "-k", 10)
            self.assertEqual(report["recall_at_10"], 1.0, report)
            self.assertEqual(report["queries"], QUERIES)
            self.assertGreater(report["recalls_per_s"], 0)
            self.assertLessEqual(report["p50_us"], report["p99_us"])
            self.assertLessEqual(report["p99_us"], report["p999_us"])
        # A figure that is always 1.0 would say nothing: half of the rows, and it falls.
        self.load("half", "--count", ROWS // 2)
        report = self.run_json("recall", "--space", "half", "--queries", self.queries,
                               "--groundtruth", self.truth, "--count", QUERIES)
        self.assertGreater(report["recall_at_10"], 0.2)
        self.assertLess(report["recall_at_10"], 0.8)

    def test_a_phrase_finds_what_it_means(self):
        with gzip.open(TEXTS, "rt", encoding="utf-8") as lines:
            table = [line.rstrip("\n").split("\t") for line in lines]
        sniffit = next(row for row in table if row[3] == "sniffit")
        rows = max(ROWS, int(sniffit[0]) + 1)
        self.load("texts", "--count", rows, "--texts", TEXTS)
        question = ("recall", "--space", "texts", "--text", "network packet sniffer",
                    "--encoder", ENCODER)
        report = self.run_json(*question)
        self.assertEqual(report["text"], "network packet sniffer")
        hits = report["neighbours"]
        self.assertEqual(len(hits), 10)
        self.assertIn(sniffit[0], [hit["id"] for hit in hits])
        for hit in hits:
            self.assertEqual(hit["text"], table[int(hit["id"])][4])
        self.assertEqual([hit["rank"] for hit in hits], list(range(1, 11)))
        scores = [hit["score"] for hit in hits]
        self.assertEqual(scores, sorted(scores, reverse=True))
        readable = daemon.engramctl(*question, address=self.daemon.address_text)
        self.assertEqual((readable.returncode, readable.stderr), (0, ""))
        self.assertIn(sniffit[4][:60], readable.stdout)


class SmallCommandsTest(EngramctlCase):

    def test_spaces_and_status(self):
        self.load("listed", "--count", 100, "--metric", "ip")
        entry = next(entry for entry in self.run_json("spaces")["spaces"]
                     if entry["name"] == "listed")
        self.assertEqual((entry["observations"], entry["dimension"], entry["metric"]),
                         (100, DIMENSION, "ip"))
        self.assertEqual(sum(entry["memory"].values()), entry["resident_bytes"])
        self.assertGreaterEqual(entry["memory"]["rows"], 100 * DIMENSION * 4)
        status = self.run_json("status")
        self.assertEqual(status["address"], self.daemon.address_text)
        counters = {name: value for core in status["cores"].values()
                    for name, value in core.items()}
        self.assertGreaterEqual(counters["observations_stored"], 100)
        for command in ("spaces", "status"):
            done = daemon.engramctl(command, address=self.daemon.address_text)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertIn("listed" if command == "spaces" else "observations_stored", done.stdout)
            if command == "spaces":
                table = done.stdout.split("bytes per observation")[1].split("\n")
                self.assertEqual(table[1].split()[:4], ["space", "rows", "codes", "links"])
                line = next(line for line in table if line.startswith("listed "))
                self.assertEqual(line.split()[1], f"{round(entry['memory']['rows'] / 100):,}")

    def test_put_delete_ping(self):
        put = ("put", "--space", "phrases", "--encoder", ENCODER)
        ask = ("recall", "--space", "phrases", "--encoder", ENCODER, "--text")
        for identity, text in (("bread", "bake a loaf of bread"), ("ship", "a sailing ship")):
            report = self.run_json(*put, "--id", identity, "--text", text)
            self.assertEqual(report["observations_acked"], 1)
        first = self.run_json(*ask, "bake a loaf of bread")["neighbours"][0]
        self.assertEqual((first["id"], first["text"]), ("bread", "bake a loaf of bread"))
        self.assertAlmostEqual(first["score"], 1.0, 4)
        report = self.run_json("delete", "bread", "never-there", "--space", "phrases")
        self.assertEqual(report["observations_acked"], 2)
        self.assertEqual([hit["id"] for hit in self.run_json(*ask, "bread")["neighbours"]],
                         ["ship"])
        self.assertGreater(self.run_json("ping")["round_trip_us"], 0)

    def test_encode_reads_lines_and_makes_unit_vectors(self):
        out = pathlib.Path(self.directory.name) / "lines.fvecs"
        lines = pathlib.Path(self.directory.name) / "lines.txt"
        lines.write_text("a network packet sniffer\nthe cat sat\n")
        done = daemon.engramctl("encode", "--encoder", ENCODER, "--texts", lines, "--out", out)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(out.stat().st_size, 2 * ROW_BYTES)
        for row in read_fvecs(out, 2):
            self.assertAlmostEqual(math.fsum(value * value for value in row), 1.0, 5)

    def test_address_is_an_option_too_and_beats_the_environment(self):
        report = self.run_json("ping", "--address", self.daemon.address_text,
                               address="127.0.0.1:1")
        self.assertIn("round_trip_us", report)

    def test_nobody_listens(self):
        for command in (("status", "--json"), ("spaces",), ("ping",), ("delete", "x"),
                        ("load", "--data", self.base, "--json")):
            with self.subTest(command[0]):
                text = self.run_failing(3, *command, address="127.0.0.1:1")
                self.assertRegex(text, r"127\.0\.0\.1:1\b.*engramd")

    def test_wrong_usage(self):
        for arguments in ((), ("fly",), ("load",), ("load", "--data", self.base, "--metric", "l3"),
                          ("load", "--data", self.base, "--batch", "0"),
                          ("load", "--data", self.base, "--space", "Not A Name"),
                          ("recall", "--queries", self.queries), ("recall", "--text", "x"),
                          ("status", "--address", "nowhere"), ("delete",), ("status", "--what")):
            with self.subTest(arguments):
                self.run_failing(2, *arguments)

    def test_files_that_are_missing_or_broken_are_named(self):
        path = pathlib.Path(self.directory.name)
        broken = path / "broken.fvecs"
        broken.write_bytes(self.base.read_bytes()[:ROW_BYTES - 1])
        odd = path / "odd.xyz"
        odd.write_bytes(b"?")
        empty = path / "empty.fvecs"
        empty.write_bytes(b"")
        for name in ("missing.fvecs", broken.name, odd.name, empty.name):
            with self.subTest(name):
                text = self.run_failing(1, "load", "--data", path / name, "--json")
                self.assertIn(str(path / name), text)
        for arguments in (
                ("recall", "--queries", path / "missing.fvecs", "--groundtruth", self.truth),
                ("recall", "--text", "x", "--encoder", path / "missing"),
                ("encode", "--encoder", ENCODER, "--texts", path / "missing.tsv", "--out",
                 path / "out.fvecs")):
            with self.subTest(arguments[0]):
                self.assertIn(str(path / "missing"), self.run_failing(1, *arguments))

    def test_what_the_daemon_refuses_is_said_by_name(self):
        self.load("mine", "--count", 10, "--metric", "l2")
        text = self.run_failing(1, "load", "--data", self.base, "--space", "mine", "--metric",
                                "ip", "--json")
        self.assertRegex(text, "metric_mismatch: .*asked for was ip in space mine.*spaces")
        with tempfile.NamedTemporaryFile(suffix=".fvecs") as file:
            file.write(struct.pack("<i2f", 2, 1, 2))
            file.flush()
            text = self.run_failing(1, "load", "--data", file.name, "--space", "mine")
        self.assertRegex(text, "dimension_mismatch: .*asked for was dimension 2 in space mine")
        text = self.run_failing(1, "recall", "--space", "empty", "--text", "x", "--encoder",
                                ENCODER, "--json")
        self.assertRegex(text, "space empty: .*unknown_space.*engramctl spaces")

    def test_names_and_numbers_are_checked_before_anything_is_asked(self):
        for command in ("compact", "rebuild", "drop", "export"):
            with self.subTest(command):
                text = self.run_failing(2, command, "BAD!",
                                        *(("--format", "jsonl") if command == "export" else ()))
                self.assertIn("'BAD!': a space's name is 1 to 64 of [a-z0-9_-]", text)
                self.assertNotIn("Type its name", text)
        for number in ("0", "-1", "x", "1.5"):
            for command in (("load", "--data", self.base),
                            ("recall", "--queries", self.queries, "--groundtruth", self.truth)):
                with self.subTest((command[0], number)):
                    text = self.run_failing(2, *command, f"--count={number}")
                    self.assertIn(f"'{number}' is no whole number from 1 on", text)


QUOTA = 300
QUOTA_CONFIG = """
[listen]
tcp = "127.0.0.1:0"
grpc = ""
http = ""
[memory]
limit_mib = 1024
[data]
directory = "{directory}"
segment_mib = 1
[index]
max_partitions = 1
[[space]]
name = "few"
metric = "l2"
quota_observations = 300
"""


class UnfinishedLoadTest(unittest.TestCase):
    """Loads that cannot end: they say why, what became of the rows, and how to go on."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="engramctl-test-")
        self.addCleanup(folder.cleanup)
        self.path = pathlib.Path(folder.name)
        self.rows = self.path / "rows.fvecs"
        self.rows.write_bytes(b"".join(struct.pack("<i2f", 2, row, 1) for row in range(1000)))
        self.daemon = self.enterContext(
            daemon.running(config_text=QUOTA_CONFIG.format(directory=self.path / "data")))

    def load(self, *more):
        return daemon.engramctl("load", "--data", self.rows, "--metric", "l2", *more,
                                address=self.daemon.address_text, timeout_s=40)

    def stored(self, space):
        with self.daemon.client(space, features=frames.NO_SESSION) as client:
            return {int(hit.id) for hit in client.recall([0.0, 1.0], 1000)}

    def assert_adds_up(self, report, count):
        self.assertEqual(
            (report["observations_acked"] + sum(report["refused"].values())
             + report["not_settled"] + report["not_sent"], report["observations"]),
            (count, count), report)

    def test_a_full_quota_is_given_up_and_said(self):
        for more in (("--resume",), ()):
            with self.subTest(more):
                done = self.load("--space", "few", "--retry-for", 3, "--json", *more)
                self.assertEqual(done.returncode, 1, done.stderr)
                report = json.loads(done.stdout)
                self.assert_adds_up(report, 1000)
                self.assertLess(report["seconds"], 30)
                lines = done.stderr.splitlines()
                self.assertRegex(lines[0], "the server takes nothing: quota_observations: .*; "
                                           "[0-9,]+ observations wait, for 1 s")
                self.assertEqual(len(lines), 4, done.stderr)
                self.assertRegex(lines[1], "3 s.*quota_observations")
                self.assertRegex(lines[2], "of 1000 observations [0-9]+ acked, 0 refused for good, "
                                           "[0-9]+ sent and not settled, [0-9]+ not sent")
                self.assertEqual(sum(map(int, re.findall(" ([0-9]+) ", lines[2])[1:])), 1000)
                self.assertIn("--session " + ",".join(report["sessions"]), lines[3])

    def test_a_load_that_ended_early_is_gone_on_with(self):
        done = self.load("--space", "few", "--retry-for", 2, "--connections", 2, "--json")
        report = json.loads(done.stdout)
        self.assertEqual(report["observations_acked"], QUOTA, report)
        self.assert_adds_up(report, 1000)
        # Room for some more.
        freed = sorted(self.stored("few"))[:100]
        deleted = daemon.engramctl("delete", "--space", "few", *freed,
                                   address=self.daemon.address_text)
        self.assertEqual(deleted.returncode, 0, deleted.stderr)
        again = self.load("--space", "few", "--retry-for", 2, "--connections", 2, "--json",
                          "--session", ",".join(report["sessions"]))
        more = json.loads(again.stdout)
        self.assertEqual(more["observations_acked"], QUOTA + 100, more)
        self.assertEqual(more["resumed_ahead"], QUOTA)
        self.assertEqual(more["sessions"], report["sessions"])
        self.assert_adds_up(more, 1000)
        # Nothing was sent twice, and nothing was left out.
        found = self.stored("few")
        self.assertEqual(len(found), QUOTA)
        self.assertFalse(found & set(freed))

    def test_sessions_that_do_not_fit(self):
        for sessions, code, said in (("12", 2, "1 sessions for 2 connections"),
                                     ("xyz,0", 2, "'xyz' is no id"),
                                     ("00000000000000ff,0", 1, "session_expired")):
            done = self.load("--space", "other", "--connections", 2, "--session", sessions)
            self.assertEqual((done.returncode, done.stdout), (code, ""), done.stderr)
            self.assertIn(said, done.stderr)

    def test_a_drop_in_its_midst_is_told(self):
        load = subprocess.Popen(
            [daemon.executable("ENGRAMCTL", "tools/engramctl"), "load", "--address",
             self.daemon.address_text, "--data", str(self.rows), "--space", "other", "--metric",
             "l2", "--rate", "100", "--resume", "--retry-for", "5"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.addCleanup(load.kill)

        def some_are_stored():
            done = daemon.engramctl("spaces", "--json", address=self.daemon.address_text)
            return any(space["name"] == "other" and space["observations"] > 0
                       for space in json.loads(done.stdout)["spaces"])

        daemon.wait_until(some_are_stored, "some rows are stored")
        dropped = daemon.engramctl("drop", "other", "--yes", address=self.daemon.address_text)
        self.assertEqual(dropped.returncode, 0, dropped.stderr)
        _, said = load.communicate(timeout=60)
        self.assertEqual(load.returncode, 1)
        self.assertRegex(said, "session_expired: .*space other may have been dropped.*"
                               "session_keep_days.*another data directory")
        self.assertNotIn("to go on", said)


class FilterUsageTest(unittest.TestCase):
    """What is asked for needs no daemon."""

    def recall(self, *arguments):
        return daemon.engramctl("recall", "--text", "x", "--encoder", "y", *arguments)

    def test_what_is_no_filter_is_named_with_its_remedy(self):
        for arguments, text in (
                (("--filter", "source"), "is no KEY=VALUE; write one like source=docs or tag=red"),
                (("--filter", "!=x"), "is no KEY=VALUE"),
                (("--exclude", "tag="), "names no tag"),
                (("--since", "yesterday"), "is no time of the years 1678 to 2261; write one like"),
                (("--until", "2024-02-30"), "is no time")):
            with self.subTest(arguments):
                done = self.recall(*arguments)
                self.assertEqual((done.returncode, done.stdout), (2, ""))
                self.assertIn(text, done.stderr)

    def test_help_names_the_keys_that_every_space_has(self):
        done = daemon.engramctl("recall", "--help")
        for word in ("tag, who, where_location, memory_type", "filter_keys", "--exclude",
                     "--since"):
            self.assertIn(word, " ".join(done.stdout.split()))


if __name__ == "__main__":
    daemon.main()
