#!/usr/bin/env python3
"""engramctl export and verify of a running daemon.

An export is compared with what was loaded row by row, to the bit, at rest and while another client
writes. A damaged record is named by its id, and by verify with file and offset.
"""

import base64
import json
import pathlib
import random
import re
import struct
import subprocess
import tempfile
import unittest

import daemon
import frames

DIMENSION = 16
ROWS = 3_000
# More than a page of the largest kind, and neither text nor empty alone.
PAYLOADS = (b"", b"plain text", "caf\u00e9 \u2013 \U0001f333\tnext\nline".encode(), b"\x00\xff\x01",
            b"\xed\xa0\x80", b"\xc0\xaf", b"a\x1b[31m", b"\x7f", b"\xc2\x85", b'quote " and \\')


def f32(value):
    return struct.unpack("<f", struct.pack("<f", value))[0]


def vector_of(rng):
    """Any float32s: tiny, huge, negative zero."""
    return [rng.choice((0.0, -0.0, f32(rng.uniform(-1, 1)), f32(rng.uniform(-1, 1) * 1e-30),
                        f32(rng.uniform(-1, 1) * 1e15)))
            for _ in range(DIMENSION - 1)] + [f32(rng.uniform(0.5, 1))]


def bits(vector):
    return struct.pack(f"<{len(vector)}f", *vector)


def bytes_in(row, name):
    if name + "_base64" in row:
        return base64.b64decode(row[name + "_base64"], validate=True)
    return row[name].encode()


class ExportTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="engramd-export-")
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.rows = {}

    def observe(self, running, space="source", rows=ROWS, seed=7, **fields):
        rng = random.Random(seed)
        with running.client(space, metric=frames.L2) as client:
            batch = []
            for row in range(rows):
                identity = b"id%d" % row if row % 10 else b"\xfe%d" % row
                payload = PAYLOADS[row % len(PAYLOADS)] or b""
                if row % 97 == 0:
                    payload = rng.randbytes(65_536)
                when_ns, confidence = rng.randrange(1 << 62), f32(rng.random())
                vector = vector_of(rng)
                self.rows[identity] = (bits(vector), payload, when_ns, confidence)
                batch.append(frames.record(identity, vector, payload=payload, when_ns=when_ns,
                                           confidence=confidence, **fields))
                if len(batch) == 10 or row == rows - 1:
                    self.assertEqual(client.observe(batch), [])
                    batch = []
            client.close()

    def export(self, running, *more, space="source", code=0):
        done = daemon.engramctl("export", space, "--json", *more, address=running.address_text)
        self.assertEqual(done.returncode, code, done.stderr)
        return done

    def read_jsonl(self, text):
        found = {}
        for line in text.splitlines():
            row = json.loads(line)
            identity = bytes_in(row, "id")
            self.assertNotIn(identity, found, "an id comes once")
            self.assertEqual("payload" in row, "payload_base64" not in row)
            found[identity] = (bits(row["vector"]), bytes_in(row, "payload"), row["when_ns"],
                               f32(row["confidence"]))
        return found

    def test_jsonl_and_fvecs_are_what_was_loaded_to_the_bit(self):

        with daemon.running() as running:
            self.observe(running)
            output = self.folder / "rows.jsonl"
            report = json.loads(self.export(running, "--format", "jsonl", "--output",
                                            output).stdout)
            self.assertEqual(report["observations"], ROWS)
            self.assertEqual(self.read_jsonl(output.read_text()), self.rows)
            self.assertEqual(report["bytes"], output.stat().st_size)
            # Text where it is, base64 where it is not.
            lines = [json.loads(line) for line in output.read_text().splitlines()]
            as_text = {line["payload"].encode() for line in lines if "payload" in line}
            self.assertEqual(as_text, {PAYLOADS[0], PAYLOADS[1], PAYLOADS[2], PAYLOADS[9]})
            self.assertEqual(self.read_jsonl(self.export(running, "--format", "jsonl").stdout),
                             self.rows)

            vectors = self.folder / "rows.fvecs"
            self.export(running, "--format", "fvecs", "--output", vectors)
            ids = [json.loads(line)
                   for line in (self.folder / "rows.fvecs.ids").read_text().splitlines()]
            ids = [identity.encode() if isinstance(identity, str) else
                   base64.b64decode(identity["id_base64"]) for identity in ids]
            data = vectors.read_bytes()
            stride = 4 + 4 * DIMENSION
            self.assertEqual(len(data), ROWS * stride)
            found = {}
            for row, identity in enumerate(ids):
                self.assertEqual(data[row * stride:row * stride + 4], b"\x10\0\0\0")
                found[identity] = data[row * stride + 4:(row + 1) * stride]
            self.assertEqual(found, {identity: row[0] for identity, row in self.rows.items()})
            self.assertEqual(sorted(path.name for path in self.folder.iterdir()),
                             ["rows.fvecs", "rows.fvecs.ids", "rows.jsonl"])

            # It loads into another space, and comes out of it again.
            done = daemon.engramctl("load", "--data", vectors, "--space", "copy", "--metric", "l2",
                                    address=running.address_text)
            self.assertEqual(done.returncode, 0, done.stderr)
            copy = self.folder / "copy.fvecs"
            self.export(running, "--format", "fvecs", "--output", copy, space="copy")
            again = copy.read_bytes()
            self.assertEqual(sorted(again[i:i + stride] for i in range(0, len(again), stride)),
                             sorted(data[i:i + stride] for i in range(0, len(data), stride)))

    def test_what_lives_throughout_is_there_while_others_write(self):
        with daemon.running() as running:
            self.observe(running)
            rows = self.folder / "more.fvecs"
            rng = random.Random(3)
            some = b"".join(struct.pack(f"<i{DIMENSION}f", DIMENSION, *vector_of(rng))
                            for _ in range(2_000))
            rows.write_bytes(some * 300)  # Minutes of load; it is ended when the exports are done.
            load = subprocess.Popen(
                [daemon.executable("ENGRAMCTL", "tools/engramctl"), "load", "--address",
                 running.address_text, "--data", str(rows), "--space", "source", "--rate", "4000",
                 "--id-prefix", "more"],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                for _ in range(3):
                    found = self.read_jsonl(self.export(running, "--format", "jsonl").stdout)
                    kept = {identity: row for identity, row in found.items()
                            if identity in self.rows}
                    self.assertEqual(kept, self.rows)
                done = daemon.engramctl("verify", "source", "--json", "--sample", "20",
                                        address=running.address_text)
                self.assertEqual(json.loads(done.stdout)["spaces"][0]["problems"], [], done.stdout)
                self.assertIsNone(load.poll(), "the load has ended before the export had")
            finally:
                load.kill()
                load.wait()

    def test_a_space_that_is_not_there_and_a_missing_file_name(self):
        with daemon.running() as running:
            for form in ("jsonl", "fvecs"):
                done = self.export(running, "--format", form, "--output", self.folder / "rows",
                                   space="nothing", code=1)
                self.assertRegex(done.stderr, "space nothing: .*unknown_space.*engramctl spaces")
                self.assertEqual(list(self.folder.iterdir()), [], "nothing is left behind")
            self.observe(running, rows=1)
            self.export(running, "--format", "fvecs", code=2)
            done = self.export(running, "--format", "jsonl", "--output", self.folder, code=1)
            self.assertIn(f"{self.folder} is a directory", done.stderr)
            self.assertFalse(pathlib.Path(f"{self.folder}.partial").exists())
            # The second file's name is taken by a folder.
            (self.folder / "rows.ids").mkdir()
            done = self.export(running, "--format", "fvecs", "--output", self.folder / "rows",
                               code=1)
            self.assertEqual([path.name for path in self.folder.iterdir()], ["rows.ids"])
            done = daemon.engramctl("verify", "nothing", address=running.address_text)
            self.assertEqual(done.returncode, 1)

    def test_verify_of_a_sound_daemon(self):
        with daemon.running() as running:
            self.observe(running)
            done = daemon.engramctl("verify", "--json", "--sample", "50",
                                    address=running.address_text)
            self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
            report = json.loads(done.stdout)
            space = report["spaces"][0]
            self.assertTrue(report["ok"] and space["counts_compared"], report)
            self.assertEqual((space["name"], space["sampled"]), ("source", 50))
            self.assertEqual(space["found_first"] + space["tied"], 50)
            self.assertEqual((space["recall_at_10"], space["compared_with"]), (1.0, ROWS))
            done = daemon.engramctl("verify", address=running.address_text)
            self.assertIn("Nothing is wrong.", done.stdout)

    def test_damage_in_the_log_is_named(self):
        with daemon.running() as running:
            self.observe(running, rows=5)
            payload = b"find me in the segment, if you can"
            with running.client("source", metric=frames.L2) as client:
                client.observe([frames.record(b"damaged", [1.0] * DIMENSION, payload=payload)])
                client.close()
            segments = [path for path in (running.path / "data").rglob("segment-*.log")
                        if payload in path.read_bytes()]
            self.assertEqual(len(segments), 1, segments)
            place = segments[0].read_bytes().index(payload)
            with segments[0].open("r+b") as file:
                file.seek(place + 5)
                file.write(b"\x00\x01")
            done = daemon.engramctl("verify", "source", "--json", address=running.address_text)
            self.assertEqual(done.returncode, 1, done.stdout)
            problem = json.loads(done.stdout)["spaces"][0]["problems"][0]
            named = re.search(r"damaged.* at (\S+)/(segment-\w+\.log):(\d+)", problem)
            self.assertTrue(named, problem)
            self.assertEqual(segments[0].parts[-2:], (named[1], named[2]))
            # The record begins before its payload, and is not long.
            self.assertLess(place - int(named[3]), 512)
            self.assertGreater(place, int(named[3]))

            output = self.folder / "rows.jsonl"
            done = self.export(running, "--format", "jsonl", "--output", output, code=1)
            self.assertIn("damaged", done.stderr)
            self.assertFalse(output.exists(), "what is not whole does not get the name")
            kept = self.read_jsonl((self.folder / "rows.jsonl.partial").read_text())
            self.assertEqual(kept, self.rows)


if __name__ == "__main__":
    daemon.main()
