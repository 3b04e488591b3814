#!/usr/bin/env python3
"""A disk that is full: writes are refused, recalls go on, also after a restart, and once there is
room all goes on by itself."""

import pathlib
import subprocess
import tempfile
import unittest

import daemon
import frames

DISK_MIB, OTHERS_MIB, PAYLOAD = 16, 3, 60_000


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
        running = daemon.Daemon({"data.directory": str(self.disk.path / "data"),
                                 "data.segment_mib": 1, "data.checkpoint_mib": 4096},
                                prefix=self.disk.prefix)
        try:
            self.check(running)
        finally:
            running.stop()

    def check(self, running):
        stored, refusal = 0, None
        with running.client("s", metric=frames.L2) as client:
            while refusal != "disk_full" and stored * PAYLOAD < DISK_MIB << 20:
                refusal = self.observe(client, stored)
                stored += refusal is None
            self.assertEqual(refusal, "disk_full")
            self.assertGreater(stored * PAYLOAD, DISK_MIB << 19)
            self.assertTrue(running.log.wait_for(r"log-000 has no room", 30))
            self.assertEqual(self.recall(client, stored),
                             {b"%d" % i: PAYLOAD for i in range(stored)})
        self.fill()
        running.kill()
        running.spawn()
        running.wait_ready()
        self.assertTrue(running.log.wait_for(r"Recalls are served, writes are refused", 0))
        with running.client("s", metric=frames.L2) as client:
            self.assertEqual(len(self.recall(client, stored)), stored)
            self.assertEqual(self.observe(client, stored), "disk_full")
            (self.disk.seen_from_here / "others").unlink()
            daemon.wait_until(lambda: self.observe(client, stored) is None, "there is room")
            self.assertEqual(len(self.recall(client, stored + 1)), stored + 1)
        self.assertTrue(running.log.wait_for(r"log-000 has its next segment again", 30))


if __name__ == "__main__":
    daemon.main()
