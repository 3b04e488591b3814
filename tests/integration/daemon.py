"""engramd in a temporary directory on a free port, and the runner of these tests.

ENGRAMD and ENGRAMCTL name the executables. A started daemon's log is read by a thread, so that
waiting for a line is waiting for a condition and not for a time.
"""

import contextlib
import ctypes
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import xml.etree.ElementTree as ElementTree

import frames

ROOT = pathlib.Path(__file__).resolve().parents[2]
SAMPLE_DATA = ROOT / "tools" / "sample-data"
START_DEADLINE_S = 60
# engramd's own deadline to drain is 10 s; a loaded machine gets more before it counts as stuck.
STOP_DEADLINE_S = 40
WAIT_DEADLINE_S = 60


def executable(variable, default):
    path = os.environ.get(variable) or ROOT / "build" / "release" / default
    if not os.access(path, os.X_OK):
        sys.exit(f"{path} is no program: build it, or name it in {variable}")
    return str(path)


def io_uring_forbidden():
    """Why io_uring cannot be used here, or "" where it can. Asks the kernel, not engramd."""
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(256)
    descriptor = libc.syscall(425, 4, parameters)  # io_uring_setup, same number everywhere.
    if descriptor < 0:
        return f"io_uring_setup: {os.strerror(ctypes.get_errno())}"
    os.close(descriptor)
    return ""


def raise_open_files(wanted):
    """Lifts the soft limit of open files as far as allowed; returns what there is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


def wait_until(done, what):
    """Asks the daemon again and again; fails with what was awaited."""
    deadline = time.monotonic() + WAIT_DEADLINE_S
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not so in {WAIT_DEADLINE_S} s")


class Log:
    """Lines of a stream, read by a thread as they come."""

    def __init__(self, stream):
        self._lines = []
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream):
        for line in stream:
            with self._changed:
                self._lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        stream.close()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait_for(self, pattern, deadline_s):
        """The match in the first line that has one, or None when the stream ended without it."""
        def search():
            return next(filter(None, (re.search(pattern, line) for line in self._lines)), None)
        with self._changed:
            if not self._changed.wait_for(lambda: search() or self._ended, deadline_s):
                raise TimeoutError(f"no line with {pattern!r} in {deadline_s} s:\n{self.text()}")
            return search()

    def finish(self):
        self._thread.join(STOP_DEADLINE_S)
        return self.text()

    def text(self):
        return "\n".join(self._lines)


class Daemon:
    """A running engramd. Settings are given as {"listen.backend": "posix", ...}. `prefix` is a
    command that runs the command behind it."""

    def __init__(self, settings=None, config_text=None, prefix=()):
        self._prefix = prefix
        self._directory = tempfile.TemporaryDirectory(prefix="engramd-test-")
        self.path = pathlib.Path(self._directory.name)
        self.config = self.path / "engram.toml"
        self.config.write_text(config_text or toml({
            "listen.tcp": "127.0.0.1:0", "listen.grpc": "", "listen.http": "",
            "data.directory": str(self.path / "data"),
            "memory.limit_mib": 1024, **(settings or {})}))
        self.spawn()
        try:
            self.wait_ready()
        except RuntimeError:
            self._directory.cleanup()
            raise

    def spawn(self):
        """Starts the process, also again after kill(), and does not wait for it."""
        self.process = subprocess.Popen(
            [*self._prefix, executable("ENGRAMD", "src/engramd"), "--config", str(self.config)],
            cwd=self.path,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            errors="replace")
        self.log = Log(self.process.stderr)

    def wait_ready(self):
        if not self.log.wait_for(r"\bready$", START_DEADLINE_S):
            self.process.wait()
            raise RuntimeError(f"engramd did not start:\n{self.log.finish()}")
        listening = self.log.wait_for(r"listening on (.*):(\d+)$", 0)
        self.address = (listening[1].strip("[]"), int(listening[2]))
        self.address_text = f"{listening[1]}:{listening[2]}"

    def client(self, space=None, **fields):
        """A connection; with a space, one that has said hello."""
        client = frames.Client(self.address)
        if space is not None:
            client.hello(space, **fields)
        return client

    def kill(self):
        """SIGKILL. Raises with the log when the process had ended by itself before."""
        self.process.kill()
        code = self.process.wait()
        text = self.log.finish()
        if code != -signal.SIGKILL:
            raise AssertionError(f"engramd ended with {code} before it was killed:\n{text}")

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)

    def wait(self):
        """Waits for the end and returns the exit code."""
        return self.process.wait(STOP_DEADLINE_S)

    def stop(self):
        """SIGTERM, if it runs still. Raises with the log unless it exits 0, in time."""
        try:
            if self.process.poll() is None:
                self.terminate()
            code = self.wait()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            code = f"still running {STOP_DEADLINE_S} s after SIGTERM"
        text = self.log.finish()
        self._directory.cleanup()
        if code != 0:
            raise AssertionError(f"engramd ended with {code}:\n{text}")
        return text


def toml(settings):
    """TOML of {"table.key": value}."""
    tables = {}
    for name, value in settings.items():
        table, key = name.split(".")
        # JSON's strings, numbers and lists are TOML's too.
        tables.setdefault(table, []).append(f"{key} = {json.dumps(value)}")
    return "".join(f"[{table}]\n" + "\n".join(lines) + "\n\n" for table, lines in tables.items())


@contextlib.contextmanager
def running(settings=None, config_text=None):
    """A daemon for the length of a with statement."""
    daemon = Daemon(settings, config_text)
    try:
        yield daemon
    except BaseException:
        print(f"engramd's log:\n{daemon.log.text()}", file=sys.stderr)
        with contextlib.suppress(AssertionError):
            daemon.stop()
        raise
    daemon.stop()


def start_that_fails(config_text, **process):
    """Runs engramd, which is to refuse to start. Returns (exit code, log)."""
    with tempfile.TemporaryDirectory(prefix="engramd-test-") as directory:
        os.chmod(directory, 0o755)  # process may name another user.
        config = pathlib.Path(directory) / "engram.toml"
        config.write_text(config_text)
        done = subprocess.run(
            [executable("ENGRAMD", "src/engramd"), "--config", str(config)], cwd=directory,
            capture_output=True, text=True, timeout=START_DEADLINE_S, check=False, **process)
        return done.returncode, done.stderr


def engramctl(*arguments, address=None, timeout_s=300, typed=""):
    """Runs engramctl; returns its CompletedProcess, standard output and error as text.

    `typed` is what comes from standard input."""
    environment = {**os.environ}
    environment.pop("ENGRAM_ADDRESS", None)
    if address is not None:
        environment["ENGRAM_ADDRESS"] = address
    return subprocess.run(
        [executable("ENGRAMCTL", "tools/engramctl"), *map(str, arguments)], capture_output=True,
        text=True, timeout=timeout_s, env=environment, input=typed, check=False)


class DaemonCase(unittest.TestCase):
    """Test cases that share one daemon, and that it has to survive.

    After each case a fresh client observes and recalls in a space of its own; after the last one
    SIGTERM has to end the daemon with 0.
    """

    settings = {}
    daemon = None

    @classmethod
    def setUpClass(cls):
        if cls.settings.get("listen.backend") == "io_uring" and io_uring_forbidden():
            raise unittest.SkipTest(io_uring_forbidden())
        cls.daemon = Daemon(cls.settings)

    @classmethod
    def tearDownClass(cls):
        if cls.daemon is not None:
            cls.daemon.stop()

    def tearDown(self):
        self.assert_serves()

    def assert_serves(self):
        """A fresh client observes something of its own and finds it."""
        self.assertIsNone(self.daemon.process.poll(), self.daemon.log.text())
        vector = [1.0, 2.0, float(time.monotonic_ns() % 1000)]
        with self.daemon.client("serves", metric=frames.L2) as client:
            identity = b"%d" % client.session
            self.assertEqual(client.observe([frames.record(identity, vector)]), [])
            hits = client.recall(vector, 1000)
            self.assertIn(identity, [hit.id for hit in hits if hit.score == 0])
            self.assertEqual(client.observe([frames.record(identity, op=frames.DELETE)]), [])
            client.close()

    def assert_refused(self, nak, name, *, flags, refused_type):
        """The nak has this reason by name and code, and a text for a person."""
        self.assertEqual((nak.name, nak.reason), (name, frames.REASONS[name]), nak.text)
        self.assertEqual((nak.flags, nak.refused_type), (flags, refused_type), nak)
        self.assertGreater(len(nak.text), 10)


def on_each_backend(case):
    """Class decorator: makes CaseIoUring and CasePosix of a DaemonCase, and removes the case."""
    module = sys.modules[case.__module__]
    for name, backend in (("IoUring", "io_uring"), ("Posix", "posix")):
        made = type(case.__name__ + name, (case,),
                    {"settings": {**case.settings, "listen.backend": backend},
                     "__module__": case.__module__})
        setattr(module, made.__name__, made)
    return None


class _Result(unittest.TextTestResult):
    """Keeps each case for the report."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.cases = {}

    def _note(self, test, tag=None, message=""):
        # A case with failing subtests is told as a success too: the first word counts.
        self.cases.setdefault(test.id().replace("__main__.", ""), (tag, message))

    def addSuccess(self, test):
        super().addSuccess(test)
        self._note(test)

    def addError(self, test, err):
        super().addError(test, err)
        self._note(test, "failure", self.errors[-1][1])

    def addFailure(self, test, err):
        super().addFailure(test, err)
        self._note(test, "failure", self.failures[-1][1])

    def addSubTest(self, test, subtest, err):
        super().addSubTest(test, subtest, err)
        if err is not None:
            self._note(test, "failure", f"{subtest}: {err[1]}")

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self._note(test, "skipped", reason)


def write_report(path, cases):
    """The XML that GoogleTest writes, as much of it as tools/test_runner.py counts."""
    root = ElementTree.Element("testsuites", tests=str(len(cases)))
    suite = ElementTree.SubElement(root, "testsuite", name=path.stem, tests=str(len(cases)))
    for name, (tag, message) in cases.items():
        group, _, method = name.rpartition(".")
        case = ElementTree.SubElement(suite, "testcase", name=method, classname=group,
                                      result="skipped" if tag == "skipped" else "completed")
        if tag:
            # XML 1.0 has no control characters.
            message = re.sub(r"[^\t\n\x20-\ud7ff]", "?", message)
            ElementTree.SubElement(case, tag, message=message)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def main():
    """Runs the cases of the started file; with GTEST_OUTPUT=xml:DIR/ it leaves a report there."""
    runner = unittest.TextTestRunner(verbosity=2, resultclass=_Result)
    program = unittest.main(module="__main__", testRunner=runner, exit=False)
    output = os.environ.get("GTEST_OUTPUT", "")
    if output.startswith("xml:") and output.endswith("/"):
        # Named as the program is, which is how the counter finds it.
        name = os.path.basename(sys.argv[0]) + ".xml"
        write_report(pathlib.Path(output.removeprefix("xml:")) / name, program.result.cases)
    sys.exit(not program.result.wasSuccessful())
