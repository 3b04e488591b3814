#!/usr/bin/env python3
"""Starts that cannot work: exit code 1, and a message that says what to do about it."""

import os
import pathlib
import pwd
import re
import socket
import subprocess
import tempfile
import unittest

import daemon
import frames


class ConfigurationTest(unittest.TestCase):

    def assert_refused(self, text, *patterns, forbidden="ready"):
        code, log = daemon.start_that_fails(text)
        self.assertEqual(code, 1, log)
        for pattern in patterns:
            self.assertRegex(log, pattern)
        self.assertNotIn(forbidden, log)

    def test_all_faults_are_named_at_once_with_their_lines(self):
        self.assert_refused(
            '[listen]\ntpc = "127.0.0.1:0"\nbackend = "carrier pigeon"\n'
            '[memory]\nlimit_mib = "much"\n[index]\nm = 1\n[clouds]\nnumber = 9\n',
            r"engram\.toml:2: listen\.tpc: unknown field; did you mean tcp\?",
            r'engram\.toml:3: listen\.backend: "carrier pigeon" is not known; write .*"io_uring"',
            r'engram\.toml:5: memory\.limit_mib: "much" is no whole number; write',
            r"engram\.toml:7: index\.m: 1 is out of range; write a whole number from",
            r"engram\.toml:8: clouds: unknown section; there are .*listen")

    def test_each_field_says_what_it_expects(self):
        for text, pattern in (
                ("[listen]\ntcp = 7654\n", r"listen\.tcp: 7654 is no address in quotes"),
                ('[listen]\ntcp = "here"\n', r"listen\.tcp: .*PORT"),
                ('[listen]\ntcp = "127.0.0.1:65536"\n', r"listen\.tcp: "),
                ("[limits]\nmax_connections = 0\n", r"limits\.max_connections: 0 is out of range"),
                ("[data]\ndirectory = 1\n", r"data\.directory: 1 is no text"),
                ("[cores]\ningress = 0\n", r"cores\.ingress: "),
                ('[cores]\nidle = "snooze"\n', r"cores\.idle: .*\"sleep\""),
                ('[memory]\nhuge_pages = "always"\n', r"memory\.huge_pages: .*\"off\""),
                ("[index]\ndefault_ef = 0\n", r"index\.default_ef: 0 is out of range"),
                ("listen = 5\n", r"listen: "),
                ("[listen\n", r"engram\.toml:1: ")):
            with self.subTest(text):
                self.assert_refused(text, pattern)

    def test_a_processor_that_is_not_there(self):
        for key in ("ingress", "shard", "control"):
            with self.subTest(key):
                self.assert_refused(
                    f'[listen]\ntcp = "127.0.0.1:0"\n[cores]\n{key} = [4093]\n',
                    rf"cores\.{key}: processor 4093 .*choose from \d")

    def test_a_configuration_that_cannot_be_read(self):
        done = subprocess.run([daemon.executable("ENGRAMD", "src/engramd"), "--config",
                               "/nonexistent/engram.toml"], capture_output=True, text=True,
                              timeout=60, check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn("/nonexistent/engram.toml", done.stderr)

    def test_the_documented_configuration_is_taken_and_says_the_defaults(self):
        """Every field that config/engram.toml shows, also those behind a '#', is a known one."""
        text = (daemon.ROOT / "config" / "engram.toml").read_text()
        # A third processor, for recall, may not be there, and socket 0 need not be ours.
        text = re.sub(r"^# (?!recall|sockets)(\w+ = |\[\[space\]\])", r"\1", text, flags=re.M)
        text = re.sub(r"^(tcp|grpc) = .*", r'\1 = "127.0.0.1:0"', text, flags=re.M)
        text = text.replace("8192", "512")
        if len(os.sched_getaffinity(0)) < 2:
            self.skipTest("needs two processors")
        first, second = sorted(os.sched_getaffinity(0))[:2]
        text = re.sub(r"= \[0\]", f"= [{first}]", text).replace("= [1]", f"= [{second}]")
        with daemon.running(config_text=text) as running, \
                running.client("documented", metric=frames.L2) as client:
            self.assertEqual(client.observe([frames.record(b"x", [1.0])]), [])
            self.assertTrue((running.path / "engram-data").is_dir())


def settings(directory, **more):
    return daemon.toml({"listen.tcp": "127.0.0.1:0", "listen.grpc": "", "listen.http": "",
                        "data.directory": str(directory), "memory.limit_mib": 512, **more})


class MachineTest(unittest.TestCase):

    def test_the_port_is_taken(self):
        with socket.create_server(("127.0.0.1", 0)) as holder, \
                tempfile.TemporaryDirectory() as directory:
            address = f"127.0.0.1:{holder.getsockname()[1]}"
            for backend in ("auto", "posix"):
                code, log = daemon.start_that_fails(settings(
                    directory, **{"listen.tcp": address, "listen.backend": backend}))
                self.assertEqual(code, 1, log)
                self.assertRegex(log, rf"{address}.*another port")

    def test_an_address_that_this_machine_does_not_have(self):
        with tempfile.TemporaryDirectory() as directory:
            # 192.0.2.0/24 is for documentation (RFC 5737).
            code, log = daemon.start_that_fails(
                settings(directory, **{"listen.tcp": "192.0.2.1:0"}))
        self.assertEqual(code, 1, log)
        self.assertRegex(log, r"192\.0\.2\.1:0.*ip address")

    def test_the_data_directory_is_held_by_another_daemon(self):
        with daemon.running() as running:
            code, log = daemon.start_that_fails(settings(running.path / "data"))
            self.assertEqual(code, 1, log)
            self.assertRegex(log, rf"data is in use by process {running.process.pid}.*another")
            with running.client("undisturbed", metric=frames.L2) as client:
                self.assertEqual(client.observe([frames.record(b"x", [1.0])]), [])

    def test_a_removed_lock_lets_no_second_daemon_in(self):
        with daemon.running() as running:
            (running.path / "data" / "LOCK").unlink()
            code, log = daemon.start_that_fails(settings(running.path / "data"))
            self.assertEqual(code, 1, log)
            self.assertRegex(log, r"data is in use by another process: stop")

    def test_the_lock_does_not_outlive_a_killed_daemon(self):
        with tempfile.TemporaryDirectory() as directory:
            text = settings(directory)
            killed = daemon.Daemon(config_text=text)
            killed.process.kill()
            killed.process.wait()
            with self.assertRaises(AssertionError):
                killed.stop()
            with daemon.running(config_text=text) as running, running.client("after") as client:
                client.ping()

    def test_the_data_directory_cannot_be_made(self):
        with tempfile.NamedTemporaryFile() as file:
            code, log = daemon.start_that_fails(settings(f"{file.name}/data"))
            self.assertEqual(code, 1, log)
            self.assertRegex(log, rf"{file.name}/data.*choose another")

    def test_the_data_directory_is_somebody_elses(self):
        with tempfile.TemporaryDirectory() as directory:
            (pathlib.Path(directory) / "letters.txt").write_text("dear")
            code, log = daemon.start_that_fails(settings(directory))
            self.assertEqual(code, 1, log)
            self.assertRegex(log, r"letters\.txt.*choose an empty directory")
            self.assertEqual((pathlib.Path(directory) / "letters.txt").read_text(), "dear")

    def test_the_data_directory_cannot_be_written(self):
        # Root may write everywhere, so it starts the daemon as nobody.
        nobody = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
        user = nobody.get("user", os.geteuid())
        names = {each.pw_uid: each.pw_name for each in pwd.getpwall()}
        with tempfile.TemporaryDirectory() as directory:
            os.chmod(directory, 0o555)
            for path in (directory, f"{directory}/data"):
                try:
                    code, log = daemon.start_that_fails(settings(path), **nobody)
                except PermissionError as error:
                    self.skipTest(f"as root, and nobody may not run engramd: {error}")
                self.assertEqual(code, 1, log)
                self.assertRegex(log, rf"{directory}.*user {names.get(user, user)}.*choose another")


class LossTest(unittest.TestCase):
    """Files of a data directory that are gone or damaged."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.data = pathlib.Path(folder.name) / "data"
        self.text = settings(self.data, **{"data.segment_mib": 1})

    def store(self):
        with daemon.running(config_text=self.text) as running, \
                running.client("s", metric=frames.L2) as client:
            for number in range(10):
                client.observe([frames.record(b"%d" % number, [float(number)])])
            done = daemon.engramctl("checkpoint", address=running.address_text)
            self.assertEqual(done.returncode, 0, done.stderr)

    def assert_refused(self, *patterns):
        code, log = daemon.start_that_fails(self.text)
        self.assertEqual(code, 1, log)
        self.assertNotIn("ready", log)
        for pattern in patterns:
            self.assertRegex(log, pattern)

    def test_a_checkpoint_that_is_missing_is_missed_where_the_log_has_lost_its_beginning(self):
        self.store()
        (self.data / "CHECKPOINT").rename(self.data / "elsewhere")
        with daemon.running(config_text=self.text) as running:
            self.assertRegex(running.log.text(), r"10 observations stored again: 10 from the log")
        (self.data / "log-000" / "segment-00000001.log").unlink()
        self.assert_refused(r"\[error\] .*data/CHECKPOINT is missing, but log-000/checkpoint-000",
                            r"put that file back, or restore a backup")

    def test_a_checkpoint_file_that_cannot_be_loaded(self):
        self.store()
        with daemon.running(config_text=self.text) as running:
            self.assertRegex(running.log.text(),
                             r"10 observations stored again: 10 from the checkpoint "
                             r"\(0 of 0 MiB read\), 0 from the log \(\d+ of \d+ MiB read\)")
        file, = (self.data / "log-000").glob("checkpoint-*")
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 1
        remedy = r"restore a backup .*moving the file CHECKPOINT"
        for content in (bytes(damaged), whole[:len(whole) // 2], None):
            file.unlink()
            if content is not None:
                file.write_bytes(content)
            self.assert_refused(rf"\[error\] .*log-000/{file.name}.*{remedy}")
        (self.data / "CHECKPOINT").unlink()
        with daemon.running(config_text=self.text) as running:
            self.assertRegex(running.log.text(), r"10 observations stored again: 10 from the log")


class BackendTest(unittest.TestCase):

    def test_the_start_up_log_says_which_backend_auto_chose(self):
        with daemon.running() as running:
            forbidden = daemon.io_uring_forbidden()
            self.assertRegex(running.log.text(),
                             r"network: .*epoll" if forbidden else r"network: .*io_uring")

    def test_ipv6(self):
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError as error:
            self.skipTest(f"no IPv6 here: {error}")
        with daemon.running({"listen.tcp": "[::1]:0"}) as running, \
                running.client("six", metric=frames.L2) as client:
            self.assertEqual(running.address[0], "::1")
            self.assertEqual(client.observe([frames.record(b"x", [1.0])]), [])


if __name__ == "__main__":
    daemon.main()
