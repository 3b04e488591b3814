#!/usr/bin/env python3
"""What needs no daemon: engramctl config and engramctl topology. And what engramd says of fields
that it does not honour yet."""

import json
import pathlib
import tempfile
import tomllib
import unittest

import daemon
import frames

FOUR_CORES = "pack:1 core:4 pu:1"
TWO_SOCKETS = "pack:2 [numa] l3:1 core:16 pu:2(indexes=2*32:32*1)"


class ConfigCommandTest(unittest.TestCase):

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = pathlib.Path(directory.name) / "engram.toml"

    def run_on(self, text, *arguments):
        self.path.write_text(text)
        return daemon.engramctl("config", *arguments, self.path, "--synthetic", FOUR_CORES)

    def test_check_takes_a_sound_file(self):
        done = self.run_on("[cores]\nshard = [2, 3]\n", "check")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertEqual(done.stdout, f"{self.path}: no faults\n")

    def test_check_says_what_is_not_honoured_yet(self):
        done = self.run_on("[limits]\nmin_batch_size = 20\n", "check")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("limits.min_batch_size is set, but not honoured yet", done.stdout)

    def test_check_says_all_faults_on_standard_error(self):
        text = "[cores]\nshard = [9]\n[index]\nm = 1\nalhpa = 2\n"
        done = self.run_on(text, "check")
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertEqual(done.stderr.splitlines(), [
            f"{self.path}:2: cores.shard: processor 9 is not in this machine; choose from 0-3",
            f"{self.path}:4: index.m: 1 is out of range; write a whole number from 2 to 64",
            f"{self.path}:5: index.alhpa: unknown field; did you mean alpha?"])
        done = self.run_on(text, "check", "--json")
        self.assertEqual(done.returncode, 1)
        answer = json.loads(done.stdout)
        self.assertFalse(answer["ok"])
        self.assertEqual([(fault["line"], fault["field"]) for fault in answer["faults"]],
                         [(2, "cores.shard"), (4, "index.m"), (5, "index.alhpa")])

    def test_check_of_what_cannot_be_read(self):
        for path in ("/nonexistent.toml", "/"):
            done = daemon.engramctl("config", "check", path)
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            self.assertIn(f"{path}: cannot read", done.stderr)
        self.path.write_bytes(b'[data]\ndirectory = "\xff\xfe"\n')
        done = daemon.engramctl("config", "check", self.path, "--json")
        self.assertEqual(done.returncode, 1)
        self.assertFalse(json.loads(done.stdout)["ok"])

    def test_wrong_usage(self):
        for arguments in (["config"], ["config", "check"], ["config", "clean"],
                          ["topology", "--synthetic"]):
            self.assertEqual(daemon.engramctl(*arguments).returncode, 2, arguments)

    def test_show_is_a_file_that_check_takes(self):
        text = ('[listen]\ngrpc = ""\n[index]\nalpha = 1.2\n[limits]\nmin_batch_size = 20\n'
                '[[space]]\nname = "films"\ndimension = 768\nquota_mib = 5\n'
                'filter_keys = ["lang"]\n')
        first = self.run_on(text, "show")
        self.assertEqual(first.returncode, 0, first.stderr)
        shown = tomllib.loads(first.stdout)
        self.assertEqual(shown["cores"], {"mode": "pipelined", "idle": "hybrid", "control": [0],
                                          "ingress": [1], "shard": [2, 3]})
        self.assertEqual(shown["listen"], {"tcp": ["127.0.0.1:7654"], "grpc": "",
                                           "backend": "auto"})
        self.assertEqual(shown["data"]["durability"], "fsync")
        checked = self.run_on(first.stdout, "check")
        self.assertEqual(checked.returncode, 0, checked.stderr)
        self.assertEqual(tomllib.loads(self.run_on(first.stdout, "show").stdout), shown)
        as_json = json.loads(self.run_on(text, "show", "--json").stdout)
        self.assertEqual(as_json["not_honoured_yet"], ["limits.min_batch_size"])
        self.assertEqual(as_json["index"]["filter_keys"], ["source", "category"])
        self.assertEqual(as_json["space"][0]["filter_keys"], ["lang"])
        for section, fields in shown.items():
            if section == "space":
                continue
            for key, value in fields.items():
                self.assertEqual(as_json[section][key], value, (section, key))

    def test_show_without_a_file_runs_the_daemon(self):
        done = daemon.engramctl("config", "show")
        self.assertEqual(done.returncode, 0, done.stderr)
        text = done.stdout.replace("127.0.0.1:7654", "127.0.0.1:0").replace(":50051", ":0").replace(":8080", ":0")
        with daemon.running(config_text=text + "\n") as running:
            self.assertNotIn("not honoured", running.log.text())


class TopologyCommandTest(unittest.TestCase):

    def test_the_suggestion_is_a_file_that_check_takes(self):
        for machine in (FOUR_CORES, TWO_SOCKETS, "pack:1 core:1 pu:1", "pack:2 core:8 pu:2"):
            done = daemon.engramctl("topology", "--suggest", "--synthetic", machine)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertLessEqual(max(map(len, done.stdout.splitlines())), 100)
            with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
                file.write(done.stdout)
                file.flush()
                checked = daemon.engramctl("config", "check", file.name, "--synthetic", machine)
                self.assertEqual((checked.returncode, checked.stderr), (0, ""))

    def test_json(self):
        done = daemon.engramctl("topology", "--suggest", "--json", "--synthetic", TWO_SOCKETS)
        answer = json.loads(done.stdout)
        self.assertEqual(len(answer["cpus"]), 64)
        self.assertEqual([node["numa_node"] for node in answer["nodes"]], [0, 1])
        self.assertEqual(answer["suggested"]["control"], [0])
        self.assertEqual(answer["suggested"]["mode"], "pipelined")
        self.assertNotIn("suggested", json.loads(daemon.engramctl("topology", "--json").stdout))

    def test_this_machine(self):
        done = daemon.engramctl("topology")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertRegex(done.stdout, r"^machine: \d+ socket")

    def test_words_that_are_no_machine(self):
        done = daemon.engramctl("topology", "--synthetic", "a big one")
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertIn('"a big one" is no machine', done.stderr)


class SpacesTest(unittest.TestCase):

    def test_a_configured_space_is_there_from_the_start(self):
        text = daemon.toml({"listen.tcp": "127.0.0.1:0", "listen.grpc": "", "listen.http": "",
                            "memory.limit_mib": 512})
        text += '[[space]]\nname = "films"\ndimension = 2\nmetric = "l2"\nprecision = "bf16"\n'
        with daemon.running(config_text=text) as running:
            for fields, reason in (({"metric": frames.COSINE}, "metric_mismatch"),
                                   ({"metric": frames.L2, "dimension": 3}, "dimension_mismatch")):
                with running.client() as client:
                    with self.assertRaises(frames.Refused) as refused:
                        client.hello("films", **fields)
                    self.assertEqual(refused.exception.nak.name, reason)
            with running.client("films", metric=frames.L2, dimension=2) as client:
                self.assertEqual(client.observe([frames.record(b"x", [1.0, 2.0])]), [])
                self.assertEqual([hit.id for hit in client.recall([1.0, 2.0], 1)], [b"x"])


class NotHonouredTest(unittest.TestCase):

    def test_engramd_names_the_fields_in_one_line(self):
        with daemon.running({"limits.overload_threshold": 0.95, "limits.max_sessions": 50,
                             "limits.min_batch_size": 20}) as running:
            self.assertRegex(running.log.text(),
                             r"set, but not honoured yet: limits\.min_batch_size, "
                             r"limits\.overload_threshold \(")

    def test_a_file_without_them_says_nothing(self):
        with daemon.running({"limits.max_sessions": 50}) as running:
            self.assertNotIn("not honoured", running.log.text())


if __name__ == "__main__":
    daemon.main()
