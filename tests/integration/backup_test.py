#!/usr/bin/env python3
"""engramctl backup of a running daemon, and restore.

Under load a backup has everything that was acked before it began, and of the load that went on a
beginning without gaps. A backup that is damaged or was cut off is refused, and so is a target that
is in use.
"""

import fcntl
import json
import os
import pathlib
import random
import signal
import struct
import subprocess
import tempfile
import unittest

import daemon
import frames

DIMENSION = 16
BEFORE = 400
LOADED = 60_000
HOLD, RELEASE = 4, 5  # of introspect


def vector_of(rng):
    """Numbers that f32 holds exactly."""
    return [rng.randrange(-1 << 20, 1 << 20) / 4096 for _ in range(DIMENSION)]


class BackupTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="engramd-backup-")
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.backup = self.folder / "backup"
        rng = random.Random(11)
        self.vectors = [vector_of(rng) for _ in range(BEFORE)]
        self.payloads = [b"payload %d " % row * rng.choice((1, 3, 200)) for row in range(BEFORE)]

    def observe_all(self, running, space="before"):
        with running.client(space, metric=frames.L2) as client:
            for row in range(0, BEFORE, 50):
                records = [frames.record(b"id%d" % i, self.vectors[i], payload=self.payloads[i])
                           for i in range(row, row + 50)]
                self.assertEqual(client.observe(records), [])
            client.close()

    def assert_all_there(self, running, space="before"):
        with running.client(space, features=1) as client:
            for row in range(BEFORE):
                hit = client.recall(self.vectors[row], 1, payload=True)[0]
                self.assertEqual((hit.id, hit.score, hit.payload),
                                 (b"id%d" % row, 0, self.payloads[row]))
            client.close()

    def make_backup(self, running, *more):
        done = daemon.engramctl("backup", self.backup, "--json", *more,
                                address=running.address_text)
        self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)
        return json.loads(done.stdout)

    def restored(self, settings=None):
        """A daemon on what the backup has."""
        data = self.folder / "restored"
        done = daemon.engramctl("restore", self.backup, data)
        self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)
        return daemon.running({"data.directory": str(data), **(settings or {})})

    def test_under_load_it_has_all_that_was_acked_before(self):
        rng = random.Random(12)
        rows = self.folder / "rows.fvecs"
        loaded = [vector_of(rng) for _ in range(LOADED)]
        rows.write_bytes(b"".join(struct.pack(f"<i{DIMENSION}f", DIMENSION, *row)
                                  for row in loaded))
        # Small segments, so that many are filled and recycled.
        with daemon.running({"data.segment_mib": 1}) as running:
            self.observe_all(running)
            load = subprocess.Popen(
                [daemon.executable("ENGRAMCTL", "tools/engramctl"), "load", "--address",
                 running.address_text, "--data", str(rows), "--space", "during", "--metric", "l2",
                 "--rate", "6000", "--resume", "--retry-for", "30"],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            try:
                with running.client("during", features=1) as client:
                    while not self.has(client, loaded[12_000], b"12000"):
                        pass
                    client.close()
                report = self.make_backup(running)
                self.assertIsNone(load.poll(), "the load has ended before the backup had")
            finally:
                load.kill()
                load.communicate()
            self.assertGreater(report["files"], 4)
            self.assertGreater(report["bytes"], 12_000 * DIMENSION * 4)
            self.assert_all_there(running)
        with self.restored() as running:
            self.assert_all_there(running)
            done = daemon.engramctl("spaces", "--json", address=running.address_text)
            count = {space["name"]: space["observations"]
                     for space in json.loads(done.stdout)["spaces"]}["during"]
            self.assertGreater(count, 12_000)
            self.assertLess(count, LOADED)
            with running.client("during", features=1) as client:
                for row in (0, 1, count // 2, count - 2, count - 1):
                    self.assertTrue(self.has(client, loaded[row], b"%d" % row), (row, count))
                self.assertFalse(self.has(client, loaded[count], b"%d" % count), "a prefix")
                client.close()
            # It is a daemon like any other.
            self.observe_all(running, "after")
            self.assert_all_there(running, "after")

    def has(self, client, vector, identity):
        try:
            hits = client.recall(vector, 1)
        except frames.Refused:
            return False
        return bool(hits) and hits[0].id == identity and hits[0].score == 0

    def test_a_turned_bit_is_named_and_nothing_is_restored(self):
        with daemon.running() as running:
            self.observe_all(running)
            self.make_backup(running)
        files = sorted(file for file in (self.backup / "data").rglob("*") if file.is_file())
        self.assertGreaterEqual(len(files), 4, files)
        target = self.folder / "restored"
        for file in [*files, self.backup / "BACKUP"]:
            whole = file.read_bytes()
            place = random.Random(file.name).randrange(len(whole))
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1:])
            done = daemon.engramctl("restore", self.backup, target)
            self.assertEqual(done.returncode, 1, file)
            self.assertIn(f"{file}, offset 0: ", done.stderr)
            self.assertFalse(target.exists())
            # Cut short, and gone.
            file.write_bytes(whole[:-1])
            done = daemon.engramctl("restore", self.backup, target)
            self.assertEqual(done.returncode, 1, file)
            end = 0 if file.name == "BACKUP" else len(whole) - 1
            self.assertIn(f"{file}, offset {end}: ", done.stderr)
            file.unlink()
            done = daemon.engramctl("restore", self.backup, target)
            self.assertEqual(done.returncode, 1, file)
            self.assertIn(file.name, done.stderr)
            self.assertFalse(target.exists())
            file.write_bytes(whole)
        with self.restored() as running:
            self.assert_all_there(running)

    def test_what_is_in_use_is_refused(self):
        with daemon.running() as running:
            self.observe_all(running)
            self.backup.mkdir()
            (self.backup / "mine").write_text("x")
            done = daemon.engramctl("backup", self.backup, address=running.address_text)
            self.assertEqual(done.returncode, 1)
            self.assertIn("not an empty directory", done.stderr)
            self.assertEqual([file.name for file in self.backup.iterdir()], ["mine"])
            (self.backup / "mine").unlink()
            self.make_backup(running)
            done = daemon.engramctl("restore", self.backup, self.backup)
            self.assertEqual(done.returncode, 1)
            done = daemon.engramctl("restore", self.folder / "nothing", self.folder / "restored")
            self.assertEqual(done.returncode, 1)
            done = daemon.engramctl("backup", self.folder / "other", "--data", self.folder,
                                    address=running.address_text)
            self.assertEqual(done.returncode, 1)
            self.assertIn("no data directory", done.stderr)

    def test_a_tool_that_dies_holds_nothing_for_long(self):
        with daemon.running() as running:
            self.observe_all(running)
            with running.client("any", features=1) as client:
                client.introspect(4)
                while client.counters()["checkpoints_held"] != 1:
                    pass
                done = daemon.engramctl("checkpoint", "--json", address=running.address_text)
                self.assertEqual(done.returncode, 0, done.stderr)
                self.assertEqual(client.counters()["checkpoints_held"], 0)

    def hold(self, client):
        client.introspect(HOLD)
        while client.counters()["checkpoints_held"] != 1:
            client.introspect(HOLD)

    def test_a_hold_is_its_connections_alone_and_ends_with_it(self):
        with daemon.running() as running:
            self.observe_all(running)
            with running.client("any", features=1) as first, \
                    running.client("any", features=1) as second:
                self.hold(first)
                with self.assertRaises(frames.Refused) as refused:
                    second.introspect(HOLD)
                nak = refused.exception.nak
                self.assertEqual((nak.name, nak.flags), ("busy", 0))
                self.assertIn("holds the files", nak.text)
                self.assertGreater(nak.retry_after_ms, 0)
                second.introspect(RELEASE)
                self.assertEqual(second.counters()["checkpoints_held"], 1)
                # Said at once, and nothing is begun.
                self.hold(first)
                done = daemon.engramctl("backup", self.backup, address=running.address_text)
                self.assertEqual(done.returncode, 1)
                self.assertIn("holds the files", done.stderr)
                self.assertFalse(self.backup.exists())
                self.hold(first)
                first.close()
                while second.counters()["checkpoints_held"] != 0:
                    pass
                self.make_backup(running)

    def test_a_hold_that_has_lapsed_makes_no_backup(self):
        with daemon.running() as running:
            self.observe_all(running)
            data = running.path / "data"
            (data / "quarantine").mkdir(exist_ok=True)
            stuck = data / "quarantine" / "log-003-0000002a-00001f40.record"
            # The last file that is copied. Whoever opens it waits until this process lets go.
            lease = os.open(stuck, os.O_RDWR | os.O_CREAT)
            self.addCleanup(os.close, lease)
            before = signal.signal(signal.SIGIO, signal.SIG_IGN)
            self.addCleanup(signal.signal, signal.SIGIO, before)
            try:
                fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            except OSError as error:
                self.skipTest(f"leases of files: {error}")
            backup = subprocess.Popen(
                [daemon.executable("ENGRAMCTL", "tools/engramctl"), "backup", "--address",
                 running.address_text, str(self.backup)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            try:
                with running.client("any", features=1) as client:
                    while client.counters()["checkpoints_held"] != 1:
                        self.assertIsNone(backup.poll())
                    while client.counters()["checkpoints_held"] == 1:
                        self.assertIsNone(backup.poll())
                    client.close()
                fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_UNLCK)
                _, said = backup.communicate(timeout=60)
            finally:
                backup.kill()
                backup.communicate()
            self.assertEqual(backup.returncode, 1, said)
            self.assertIn("stood still", said)
            self.assertFalse((self.backup / "BACKUP").exists())

    def test_what_the_checkpoint_names_is_there(self):
        settings = {"data.segment_mib": 1, "data.checkpoint_mib": 4096, "cores.shard": [0]}
        with daemon.running(settings) as running:
            with running.client("large", metric=frames.L2) as client:
                for row in range(60):
                    self.assertEqual(client.observe([frames.record(
                        b"%d" % row, [float(row), 1.0], payload=b"x" * 60_000)]), [])
                client.close()
            done = daemon.engramctl("checkpoint", address=running.address_text)
            self.assertEqual(done.returncode, 0, done.stderr)
            first = sorted((running.path / "data" / "log-000").glob("segment-*"))[0]
            aside = running.path / "aside"
            first.rename(aside)
            done = daemon.engramctl("backup", self.backup, address=running.address_text)
            self.assertEqual(done.returncode, 1, done.stdout)
            self.assertIn(f"log-000/{first.name}", done.stderr)
            self.assertIn("is missing", done.stderr)
            self.assertFalse(self.backup.exists())
            aside.rename(first)

    def test_a_damaged_record_leaves_no_half_backup_and_the_message_says_what_to_do(self):
        settings = {"data.segment_mib": 1, "data.checkpoint_mib": 4096, "cores.shard": [0]}
        with daemon.running(settings) as running:
            with running.client("large", metric=frames.L2) as client:
                for row in range(40):
                    self.assertEqual(client.observe([frames.record(
                        b"%d" % row, [float(row), 1.0], payload=b"x" * 60_000)]), [])
                client.close()
            data = running.path / "data"
            segment = sorted((data / "log-000").glob("segment-*"))[0]
            content = segment.read_bytes()
            at = content.index(b"x" * 1000) + 500
            with segment.open("r+b") as file:
                file.seek(at)
                file.write(b"yyyy")
            for is_there in (False, True):
                if is_there:
                    self.backup.mkdir()
                done = daemon.engramctl("backup", self.backup, address=running.address_text)
                self.assertEqual(done.returncode, 1, done.stdout)
                for part in (f"log-000/{segment.name}, offset ", f"engramctl log verify {data}",
                             "engramctl export SPACE", "earlier backup", "No backup was made"):
                    self.assertIn(part, done.stderr)
                self.assertEqual(self.backup.exists(), is_there)
                if is_there:
                    self.assertEqual(os.listdir(self.backup), [])

    def test_a_target_inside_of_what_is_copied_or_below_nothing_is_refused(self):
        nowhere = self.folder / "nowhere"
        with daemon.running() as running:
            self.observe_all(running)
            data = running.path / "data"
            link = self.folder / "link"
            link.symlink_to(data)
            for target in (data / "backup", link / "backup", nowhere / "backup"):
                done = daemon.engramctl("backup", target, address=running.address_text)
                self.assertEqual(done.returncode, 1, done.stdout)
                self.assertIn(str(target), done.stderr)
                self.assertIn(str(nowhere if target.parent == nowhere else data), done.stderr)
                self.assertFalse(target.exists())
            self.assertFalse(nowhere.exists())
            self.make_backup(running)
        before = sorted(self.backup.rglob("*"))
        for target in (self.backup / "in", self.backup / "data" / "in", nowhere / "restored"):
            done = daemon.engramctl("restore", self.backup, target)
            self.assertEqual(done.returncode, 1, done.stdout)
            self.assertIn(str(target), done.stderr)
            self.assertIn(str(nowhere if target.parent == nowhere else self.backup), done.stderr)
        self.assertEqual(sorted(self.backup.rglob("*")), before)
        self.assertFalse(nowhere.exists())

    def test_another_daemons_directory_is_refused(self):
        with daemon.running() as running, daemon.running() as other:
            self.observe_all(running)
            done = daemon.engramctl("backup", self.backup, "--data", other.path / "data",
                                    address=running.address_text)
            self.assertEqual(done.returncode, 1)
            self.assertIn("another engramd", done.stderr)
            self.assertFalse(self.backup.exists())
            self.make_backup(running, "--data", running.path / "data")

    def test_a_target_that_cannot_be_replaced_is_refused_before_anything_is_copied(self):
        with daemon.running() as running:
            self.observe_all(running)
            self.make_backup(running)
        target = self.folder / "restored"
        beside = self.folder / "restored.restoring"

        def refused(prefix, text):
            done = subprocess.run(
                [*prefix, daemon.executable("ENGRAMCTL", "tools/engramctl"), "restore",
                 str(self.backup), str(target)], capture_output=True, text=True, check=False)
            self.assertEqual(done.returncode, 1, done.stdout)
            self.assertIn(text, done.stderr)

        for leads_to in (self.folder / "nowhere", self.folder / "empty"):
            (self.folder / "empty").mkdir(exist_ok=True)
            target.symlink_to(leads_to)
            refused([], "is a link")
            self.assertFalse(beside.exists())
            target.unlink()
        beside.mkdir()
        (beside / "mine").write_text("x")
        refused([], f"{beside} is in the way")
        self.assertEqual([file.name for file in beside.iterdir()], ["mine"])
        (beside / "mine").unlink()
        beside.rmdir()
        target.mkdir()
        for mount in ("mount -t tmpfs none", f"mount --bind '{self.folder / 'empty'}'"):
            in_mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c",
                        f"{mount} \"$1\" || exit 77; shift; exec \"$@\"", "sh", str(target)]
            if subprocess.run([*in_mount, "true"], capture_output=True, check=False).returncode:
                continue  # Not allowed here.
            refused(in_mount, "is a mount point")
            self.assertFalse(beside.exists())
        # An empty directory that is none of these is replaced.
        with self.restored() as running:
            self.assert_all_there(running)
        self.assertEqual(target.stat().st_mode & 0o777, 0o700)


if __name__ == "__main__":
    daemon.main()
