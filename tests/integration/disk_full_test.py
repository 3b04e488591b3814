#!/usr/bin/env python3
"""A disk that is full: writes are refused, recalls go on, also after a restart, and once there is
room all goes on by itself."""

import pathlib
import subprocess
import tempfile
import unittest

import daemon
import frames

DISK_MIB, OTHERS_MIB, PAYLOAD = 20, 3, 60_000


class SmallDisk:
    """A file system of its own, in a mount namespace that lives as long as `process`."""

    def __init__(self):
        self._directory = tempfile.TemporaryDirectory(prefix="engramd-disk-")
        path = self._directory.name
        self.process = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c",
             f"mount -t tmpfs -o size={DISK_MIB}m none '{path}' && echo mounted && exec cat"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.mounted = self.process.stdout.readline() == "mounted\n"
        pid = self.process.pid
        self.prefix = ("nsenter", "--preserve-credentials", "--user", "--mount", "--target",
                       str(pid))
        self.path = pathlib.Path(path)
        self.seen_from_here = pathlib.Path(f"/proc/{pid}/root{path}")

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self._directory.cleanup()


class DiskFullTest(unittest.TestCase):

    def setUp(self):
        self.disk = SmallDisk()
        self.addCleanup(self.disk.close)
        if not self.disk.mounted:
            self.skipTest("no mount namespace may be made here")

    def fill(self):
        """Takes all the room that is left."""
        with open(self.disk.seen_from_here / "others", "ab", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass

    def observe(self, client, number):
        """Whatever the credit is. The refusal's name, or None."""
        record = frames.record(b"%d" % number, [float(number), 1.0], payload=b"p" * PAYLOAD)
        sequence, seen = client.acked + 1, len(client.naks)
        client.send(frames.frame(frames.OBSERVE, frames.observe_body([record]),
                                 session=client.session, sequence=sequence))
        while client.acked < sequence and len(client.naks) == seen:
            client.ping()
        return client.naks[seen].name if len(client.naks) > seen else None

    def recall(self, client, count):
        return {hit.id: len(hit.payload) for hit in client.recall([0.0, 0.0], count + 1,
                                                                  payload=True)}

    def test_a_full_disk_refuses_serves_and_recovers(self):
        (self.disk.seen_from_here / "others").write_bytes(bytes(OTHERS_MIB << 20))
        self.run_with(self.refuses_serves_and_recovers)

    def test_what_a_drop_leaves_dead_is_freed_without_being_asked(self):
        self.run_with(self.frees_what_is_dropped)

    def run_with(self, check):
        running = daemon.Daemon({"data.directory": str(self.disk.path / "data"),
                                 "data.segment_mib": 1, "data.checkpoint_mib": 4096},
                                prefix=self.disk.prefix)
        try:
            check(running)
        finally:
            running.stop()

    def observe_until_full(self, client):
        """How many are stored."""
        stored, refusal = 0, None
        while refusal != "disk_full" and stored * PAYLOAD < DISK_MIB << 20:
            refusal = self.observe(client, stored)
            stored += refusal is None
        self.assertEqual(refusal, "disk_full")
        self.assertGreater(stored * PAYLOAD, DISK_MIB << 19)
        return stored

    def frees_what_is_dropped(self, running):
        with running.client("kept", metric=frames.L2) as client:
            self.assertIsNone(self.observe(client, 1))
        with running.client("bulk", metric=frames.L2) as client:
            self.observe_until_full(client)
        dropped = daemon.engramctl("drop", "bulk", "--yes", address=running.address_text)
        self.assertEqual(dropped.returncode, 0, dropped.stderr)
        with running.client("kept", metric=frames.L2) as client:
            daemon.wait_until(lambda: self.observe(client, 2) is None, "the disk has room")
            for number in range(3, 60):
                daemon.wait_until(lambda: self.observe(client, number) is None, "room goes on")
            self.assertEqual(len(self.recall(client, 59)), 59)

    def refuses_serves_and_recovers(self, running):
        with running.client("s", metric=frames.L2) as client:
            stored = self.observe_until_full(client)
            self.assertTrue(running.log.wait_for(r"\[error\] log-000 has no room", 30))
            self.assertEqual(client.counters()["log_without_room"], 1)
            self.assertEqual(self.recall(client, stored),
                             {b"%d" % i: PAYLOAD for i in range(stored)})
        self.fill()
        running.kill()
        running.spawn()
        running.wait_ready()
        self.assertTrue(running.log.wait_for(
            r"\[error\] .*Recalls are served, writes are refused", 0))
        with running.client("s", metric=frames.L2) as client:
            self.assertEqual(len(self.recall(client, stored)), stored)
            self.assertEqual(self.observe(client, stored), "disk_full")
            (self.disk.seen_from_here / "others").unlink()
            daemon.wait_until(lambda: self.observe(client, stored) is None, "there is room")
            self.assertEqual(len(self.recall(client, stored + 1)), stored + 1)
            self.assertTrue(running.log.wait_for(
                r"\[info\] log-000 has its next segment again", 30))
            daemon.wait_until(lambda: client.counters()["log_without_room"] == 0, "all is well")


if __name__ == "__main__":
    daemon.main()
