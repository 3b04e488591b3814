#!/usr/bin/env python3
"""engramctl log verify on a data directory: each file that a start needs, damaged or gone."""

import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import unittest

import daemon
import frames

RECORDS, PAYLOAD = 60, 60_000
SETTINGS = {"data.segment_mib": 1, "data.checkpoint_mib": 4096, "cores.shard": [0]}
CRASH = b"replay 0000000000000201 signal 11 crc32c "


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


class LogVerifyTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory(prefix="engramd-log-verify-")
        cls.addClassCleanup(folder.cleanup)
        cls.folder = pathlib.Path(folder.name)
        cls.folder.chmod(0o755)
        cls.whole = cls.folder / "whole"
        settings = {**SETTINGS, "data.directory": str(cls.whole)}
        with daemon.running(settings) as running:
            with running.client("large", metric=frames.L2) as client:
                for row in range(RECORDS):
                    client.observe([frames.record(b"%d" % row, [float(row), 1.0],
                                                  payload=b"x" * PAYLOAD)])
                client.close()
            for _ in range(4):
                daemon.engramctl("checkpoint", address=running.address_text)

    def setUp(self):
        self.data = self.folder / "data"
        shutil.copytree(self.whole, self.data)
        self.addCleanup(shutil.rmtree, self.data)
        [self.checkpoint] = self.data.glob("log-000/checkpoint-*")

    def verify(self, code, *damages, directory=None):
        """`damages`: file and offset of each, as JSON and as text have it. Returns the texts."""
        directory = directory or self.data
        done = daemon.engramctl("log", "verify", directory, "--json")
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        report = json.loads(done.stdout)
        self.assertEqual(report["sound"], code == 0, report)
        self.assertEqual([(damage["file"], damage["offset"]) for damage in report["damages"]],
                         list(damages))
        told = daemon.engramctl("log", "verify", directory)
        self.assertEqual(told.returncode, code)
        for file, offset in damages:
            self.assertIn(f"DAMAGED: {file}, offset {offset}: ", told.stdout)
        self.assertEqual("\nsound\n" in told.stdout, code == 0, told.stdout)
        return [damage["text"] for damage in report["damages"]]

    def name(self, path):
        return str(path.relative_to(self.data))

    def test_what_is_whole_is_sound(self):
        self.verify(0)
        self.verify(0, directory=self.data / "log-000")
        self.assertEqual(os.listdir(self.data / "vault"), [])
        self.verify(0, directory=self.data / "vault")

    def test_a_turned_bit_in_a_checkpoint_is_named(self):
        flip(self.checkpoint, self.checkpoint.stat().st_size // 2)
        done = daemon.engramctl("log", "verify", self.data, "--json")
        self.assertEqual(done.returncode, 1, done.stdout)
        [damage] = json.loads(done.stdout)["damages"]
        self.assertEqual(damage["file"], self.name(self.checkpoint))
        self.assertLessEqual(damage["offset"], self.checkpoint.stat().st_size // 2)
        self.assertNotIn(str(self.data), damage["text"])

    def test_a_checkpoint_file_has_the_length_that_was_written(self):
        size = self.checkpoint.stat().st_size
        self.assertEqual(size % 4096, 0)
        with self.checkpoint.open("ab") as file:
            file.write(bytes(4096))
        self.verify(1, (self.name(self.checkpoint), size))
        os.truncate(self.checkpoint, size)
        flip(self.checkpoint, size - 1)
        self.verify(1, (self.name(self.checkpoint), size - 1))
        os.truncate(self.checkpoint, size - 4096)
        self.verify(1, (self.name(self.checkpoint), size - 4096))
        self.checkpoint.unlink()
        [text] = self.verify(1, (self.name(self.checkpoint), 0))
        self.assertIn("is missing", text)

    def test_a_log_that_is_gone_is_named(self):
        shutil.rmtree(self.data / "log-000")
        texts = self.verify(1, ("log-000", 0))
        self.assertIn("is missing", texts[0])

    def test_a_segment_before_the_replay_is_missed(self):
        first = self.data / "log-000" / "segment-00000001.log"
        first.unlink()
        [text] = self.verify(1, ("log-000/segment-00000001.log", 0))
        self.assertIn("is missing", text)
        self.assertIn(self.checkpoint.name, text)

    def test_the_small_files_are_checked(self):
        for name in ("INSTANCE", "CHECKPOINT"):
            content = (self.data / name).read_bytes()
            flip(self.data / name, 40)
            [text] = self.verify(1, (name, 0))
            self.assertNotIn(str(self.data), text)
            (self.data / name).write_bytes(content)
        (self.data / "INSTANCE").unlink()
        [text] = self.verify(1, ("INSTANCE", 0))
        self.assertIn("is missing", text)

    def test_a_checkpoint_that_is_missing_is_told_by_what_it_left(self):
        (self.data / "CHECKPOINT").unlink()
        self.verify(0)  # All that was ever written is in the log.
        told = daemon.engramctl("log", "verify", self.data).stdout
        left = f"is missing, but {self.name(self.checkpoint)} is there"
        self.assertIn(f"left over: CHECKPOINT, offset 0: {left}", told)
        (self.data / "log-000" / "segment-00000001.log").unlink()
        [text] = self.verify(1, ("CHECKPOINT", 0))
        self.assertIn(left, text)
        self.checkpoint.unlink()
        [text] = self.verify(1, ("CHECKPOINT", 0))
        self.assertIn("is missing, but log-000/segment-00000002.log is there", text)

    def test_the_quarantine_is_checked(self):
        (self.data / "quarantine").mkdir(exist_ok=True)
        file = self.data / "quarantine" / "log-000-00000001-00001000.record"
        file.write_bytes(b"no record")
        self.verify(1, (self.name(file), 0))

    def test_lines_of_replay_crashes_are_checked(self):
        line = CRASH + b"%08x\n" % crc32c(CRASH[:-len(b" crc32c ")])
        file = self.data / "REPLAY-CRASHES"
        file.write_bytes(line + line)
        self.verify(0)
        file.write_bytes(line + line[:20])
        self.verify(0)
        file.write_bytes(line + line[:20] + line)
        self.verify(0)
        file.write_bytes(line + line)
        flip(file, len(line) + 10)
        self.verify(1, ("REPLAY-CRASHES", len(line)))
        file.write_bytes(line + line)
        flip(file, len(line) - 1)
        self.verify(1, ("REPLAY-CRASHES", 0))

    def test_acknowledged_records_are_named_once(self):
        segment = self.data / "log-000" / "segment-00000001.log"
        content = bytearray(segment.read_bytes())
        at = content.index(b"x" * 1000) + 500
        content[at:at + 4] = b"yyyy"
        segment.write_bytes(content)
        told = daemon.engramctl("log", "verify", self.data)
        self.assertEqual(told.returncode, 1)
        [line] = [line for line in told.stdout.splitlines() if "  DAMAGED" in line]
        place = line[line.index(segment.name):line.index(": ", line.index("offset"))]
        self.assertEqual(line.count(place), 1, line)
        self.assertNotIn(str(self.data), line.split(", and the one in ")[0])

    def test_what_may_not_be_read_is_not_called_damaged(self):
        tool = pathlib.Path(daemon.executable("ENGRAMCTL", "tools/engramctl"))
        process = {}
        if os.geteuid() == 0:
            # The build may lie where nobody else may look.
            tool = pathlib.Path(shutil.copy(tool, self.folder / "engramctl"))
            tool.chmod(0o755)
            process = {"user": 65534, "group": 65534, "extra_groups": []}
            self.data.chmod(0o755)
            (self.data / "log-000").chmod(0o755)
        for path in (self.checkpoint, self.data / "log-000", self.data):
            mode = path.stat().st_mode
            path.chmod(0)
            for json_flag in ([], ["--json"]):
                done = subprocess.run([tool, "log", "verify", self.data, *json_flag],
                                      capture_output=True, text=True, check=False, **process)
                self.assertEqual(done.returncode, 2, done.stdout + done.stderr)
                self.assertNotIn("DAMAGED", done.stdout + done.stderr)
                self.assertIn("ermission denied", done.stdout + done.stderr)
                if not json_flag:
                    self.assertIn("run this as root", done.stdout)
            path.chmod(mode)

    def test_beside_a_daemon_that_saves_all_the_time_it_is_sound(self):
        with daemon.running({**SETTINGS, "data.directory": str(self.data)}) as running:
            saves = subprocess.Popen(
                ["sh", "-c", 'while "$0" checkpoint --address "$1"; do :; done',
                 daemon.executable("ENGRAMCTL", "tools/engramctl"), running.address_text],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                for _ in range(20):
                    done = daemon.engramctl("log", "verify", self.data)
                    self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
            finally:
                saves.kill()
                saves.wait()


if __name__ == "__main__":
    daemon.main()
