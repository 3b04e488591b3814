#!/usr/bin/env python3
"""kill -9 at random moments under load: what was acked is there afterwards, exact and once.

engramctl load --resume streams rows over several sessions while a second client of this file's own
updates and deletes. engramd is killed again and again, also while it recovers, and started on the
same directory and port. At the end everything was acked, the count is exact, and each id is found
by its own vector with its own payload. The other case cuts connections and leaves engramd alone.

    kill_test.py --kills 100      the long form; 20 without it
    kill_test.py --seed N         the same rows, operations and kill moments again

ENGRAM_KILLS and ENGRAM_SEED say the same where options cannot be given.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import daemon
import frames

SPACE = "kill"
DIMENSION = 32
CONNECTIONS = 4
ROWS_PER_KILL = 200
ROWS_PER_S = 400     # so slow that each kill finds the load under way
RECOVERY_KILLS = 0.2  # part of the kills that come before the daemon is ready again,
EARLY_KILLS = 0.3     # and that come while the clients resume
EARLY_S = 0.3
OPERATION_IDS = 150
OPERATIONS_UNDER_WAY = 12
OPERATIONS_PAUSE_S = 0.002  # between frames of them, so that the rows come to their turn
DEADLINE_S = 60      # for what has to happen at all


def runs_for(process, seconds):
    """Whether the process is still there after this time; returns at once when it ends."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def free_port(rng):
    """One below those that the kernel gives to clients, so that nobody takes it meanwhile."""
    first = int(pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for _ in range(1000):
        port = rng.randrange(first // 2, first)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no port is free")


class Rows:
    """Vectors and payloads from a seed, and the files that engramctl reads."""

    def __init__(self, count, rng, directory):
        self.count = count
        self.vectors = [random_vector(rng) for _ in range(count)]
        # Of very different lengths, some empty, some with bytes beyond ASCII.
        self.payloads = [f"text {row} ä€ ".encode() * rng.choice((0, 1, 1, 3, 20, 150))
                         for row in range(count)]
        self.data, self.texts = directory / "rows.fvecs", directory / "rows.txt"
        self.data.write_bytes(b"".join(struct.pack(f"<i{DIMENSION}f", DIMENSION, *vector)
                                       for vector in self.vectors))
        self.texts.write_bytes(b"".join(payload + b"\n" for payload in self.payloads))


def random_vector(rng):
    """Numbers that f32 holds exactly, so that a vector's distance to itself is 0."""
    return [rng.randrange(-1 << 20, 1 << 20) / 4096 for _ in range(DIMENSION)]


class Loader:
    """engramctl load --resume, in the background."""

    def __init__(self, address, rows, rate, *more):
        arguments = ["load", "--address", address, "--space", SPACE, "--metric", "l2",
                     "--data", rows.data, "--texts", rows.texts, "--connections", CONNECTIONS,
                     "--batch", 2, "--rate", rate, "--json",
                     *(more or ("--resume", "--retry-for", DEADLINE_S))]
        self.process = subprocess.Popen(
            [daemon.executable("ENGRAMCTL", "tools/engramctl"), *map(str, arguments)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def report(self, timeout_s=300):
        """Its JSON, once it has ended well."""
        out, err = self.process.communicate(timeout=timeout_s)
        if self.process.returncode != 0 or err:
            raise AssertionError(f"engramctl: {self.process.returncode} {err}\n{out}")
        return json.loads(out)

    def abandon(self):
        self.process.kill()
        self.process.communicate()


class Operator:
    """Updates and deletes over one session that is resumed, and what they have to come to.

    Operation i has sequence i + 1. After a resume hello_ack says up to which one all are stored:
    then the state is that of exactly these, which check() compares, and the others are sent again.
    """

    def __init__(self, address, rng):
        self._address = address
        self._rng = rng
        self._operations = []  # (id, vector, payload); no vector: a delete
        self._session = 0
        self._acked = 0
        self._client = None
        self.resumes = 0
        self.checked = 0
        self.ahead = 0
        self.stop = threading.Event()
        self.abandoned = threading.Event()

    def run(self):
        """Until stop, and then until everything is acked; or until abandoned."""
        try:
            while not self._done() and not self.abandoned.wait(OPERATIONS_PAUSE_S):
                try:
                    if self._client is None:
                        self._connect()
                    self._send_some()
                except (ConnectionError, frames.ConnectionEnded):
                    self._note_acked()
                    self._drop()
                except frames.Refused as error:
                    if error.nak.name not in ("shutting_down", "recovering", "handshake_timeout"):
                        raise
                    self._drop()
        finally:
            self._drop()

    def live(self):
        """{id: (vector, payload)} after all operations."""
        return {identity: (vector, payload) for identity, (vector, payload, _)
                in self._state(len(self._operations)).items() if vector is not None}

    def counts(self):
        deletes = sum(vector is None for _, vector, _ in self._operations)
        return {"operations": len(self._operations), "deletes": deletes, "resumes": self.resumes,
                "ahead": self.ahead, "checked": self.checked}

    def check(self, client, upto, sample=None):
        """Compares ids with the state after `upto` operations; all ids, or `sample` of them.

        Ids with later operations, which may be under way, are passed over.
        """
        later = {identity for identity, _, _ in self._operations[upto:]}
        state = sorted(item for item in self._state(upto).items() if item[0] not in later)
        for identity, (vector, payload, former) in (
                self._rng.sample(state, sample) if sample and sample < len(state) else state):
            self.checked += 1
            if vector is not None:
                check_found(client, identity, vector, payload)
            for old in former[-3:]:
                hits = [hit for hit in client.recall(old, 10) if hit.id == identity]
                if any(hit.score == 0 or vector is None for hit in hits):
                    raise AssertionError(f"{identity}: what was replaced or deleted is back: "
                                         f"{hits}")

    def _done(self):
        return self.stop.is_set() and self._acked == len(self._operations)

    def _state(self, upto):
        """{id: (vector or None, payload, former vectors)}"""
        state = {}
        for identity, vector, payload in self._operations[:upto]:
            last = state.get(identity)
            former = last[2] + [last[0]] if last and last[0] else last[2] if last else []
            state[identity] = (vector, payload, former)
        return state

    def _connect(self):
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                socket.create_connection(self._address).close()
                break
            except ConnectionError:
                if self.abandoned.wait(OPERATIONS_PAUSE_S) or time.monotonic() > deadline:
                    raise
        self._client = frames.Client(self._address)
        try:
            stored = self._client.hello(SPACE, session=self._session, metric=frames.L2).sequence
        except frames.Refused as error:
            # A server keeps no session of which it took nothing.
            if error.nak.name != "session_expired" or self._acked > 0:
                raise
            self._session = 0
            raise frames.ConnectionEnded("begin anew") from error
        if self._session:
            self.resumes += 1
            self.ahead += stored - self._acked
            if not self._acked <= stored <= len(self._operations):
                raise AssertionError(f"{self._acked} operations were acked of "
                                     f"{len(self._operations)}, hello_ack says {stored}")
            self.check(self._client, stored, sample=5)
        self._session = self._client.session
        self._acked = stored

    def _send_some(self):
        """One frame of new operations, or of those that were sent before and not settled."""
        client = self._client
        first = client.next_sequence - 1
        if first == len(self._operations) and not self.stop.is_set():
            self._operations += [self._draw() for _ in range(self._rng.randrange(1, 5))]
        batch = self._operations[first:first + 4]
        if batch:
            client.send_observe([
                frames.record(identity, vector, payload=payload) if vector is not None
                else frames.record(identity, op=frames.DELETE)
                for identity, vector, payload in batch])
        client.wait_acked(max(client.next_sequence - 1 - OPERATIONS_UNDER_WAY, self._acked)
                          if batch else len(self._operations))
        self._note_acked()
        if client.naks:
            raise AssertionError(f"refused: {client.naks}")

    def _draw(self):
        identity = b"op-%d" % self._rng.randrange(OPERATION_IDS)
        if self._rng.random() < 0.3:
            return identity, None, b""
        return identity, random_vector(self._rng), b"%s at %d" % (identity, len(self._operations))

    def _note_acked(self):
        if self._client is not None and self._client.session == self._session:
            self._acked = max(self._acked, self._client.acked)

    def _drop(self):
        if self._client is not None:
            self._client.socket.close()
        self._client = None


def check_found(client, identity, vector, payload):
    """The id is the nearest to its own vector, at distance 0, once, with its payload."""
    for effort in ({}, {"ef": 10_000}):
        hits = client.recall(vector, 3, payload=True, **effort)
        own = [hit for hit in hits if hit.id == identity]
        if len(own) == 1 and own[0].score == 0 and own[0].payload == payload:
            return
        if len(own) > 1:
            break
    raise AssertionError(f"{identity} is not found as it was stored: {hits}")


def check_rows(client, rows):
    for row, (vector, payload) in enumerate(zip(rows.vectors, rows.payloads)):
        check_found(client, b"%d" % row, vector, payload)


def stored_count(address):
    """Observations of the space as engramctl tells them."""
    done = daemon.engramctl("spaces", "--json", address=address)
    if done.returncode != 0:
        raise AssertionError(done.stderr)
    return {space["name"]: space["observations"]
            for space in json.loads(done.stdout)["spaces"]}.get(SPACE, 0)


def counted(client):
    return sum(space.observations for space in client.introspect(frames.SPACES)
               if space.name == SPACE)


class KillTest(unittest.TestCase):

    kills = 20
    seed = 0

    def setUp(self):
        print(f"seed {self.seed}: again with --seed {self.seed} --kills {self.kills}", flush=True)
        self.rng = random.Random(self.seed)
        directory = tempfile.TemporaryDirectory(prefix="kill-test-")
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)

    def test_kill_9_under_load(self):
        rows = Rows(max(1000, ROWS_PER_KILL * self.kills), self.rng, self.directory)
        # Each kill waits for its own number of stored rows, so none comes after the load.
        moments = sorted(self.rng.randrange(rows.count * 9 // 10) for _ in range(self.kills))
        settings = {"listen.tcp": f"127.0.0.1:{free_port(self.rng)}"}
        with daemon.running(settings) as running, contextlib.ExitStack() as stack:
            operator = Operator(running.address, random.Random(self.seed + 1))
            loader = Loader(running.address_text, rows, ROWS_PER_S)
            stack.callback(loader.abandon)
            failures = []
            operating = threading.Thread(target=keep_failure, args=(operator.run, failures))
            operating.start()
            stack.callback(operating.join)
            stack.callback(operator.abandoned.set)
            recovering = False
            for moment in moments:
                kind = self.rng.random()
                # Never twice in a row, so that clients come back between two of them.
                recovering = not recovering and kind < RECOVERY_KILLS
                if recovering:
                    running.kill()
                    running.spawn()
                    runs_for(running.process, self.rng.uniform(0, 0.2))
                elif kind < RECOVERY_KILLS + EARLY_KILLS:
                    runs_for(running.process, self.rng.uniform(0, EARLY_S))
                else:
                    self.wait_stored(running, loader, failures, moment)
                    # Into any phase of a group commit.
                    runs_for(running.process, self.rng.uniform(0, 0.02))
                running.kill()
                running.spawn()
                running.wait_ready()
            report = loader.report()
            operator.stop.set()
            operating.join()
            self.assertEqual(failures, [])
            print(f"load {report}\noperations {operator.counts()}", flush=True)
            self.check_report(report, rows)
            self.check_all(running, rows, operator)
            # And once more after an orderly end.
            running.terminate()
            self.assertEqual(running.wait(), 0)
            running.spawn()
            running.wait_ready()
            self.check_all(running, rows, operator)

    def test_what_durability_memory_loses_is_sent_again(self):
        settings = {"listen.tcp": f"127.0.0.1:{free_port(self.rng)}",
                    "data.durability": "memory", "data.flush_interval_ms": 500}
        rows = Rows(2000, self.rng, self.directory)
        with daemon.running(settings) as running, contextlib.ExitStack() as stack:
            loader = Loader(running.address_text, rows, 500)
            stack.callback(loader.abandon)
            self.wait_stored(running, loader, [], 100)
            # An orderly end, after which every session is known for good.
            running.terminate()
            self.assertEqual(running.wait(), 0)
            running.spawn()
            running.wait_ready()
            for kill in range(1, 5):
                self.wait_stored(running, loader, [], 100 + 250 * kill)
                # What is acked when the load ends nobody would send again.
                loader.process.send_signal(signal.SIGSTOP)
                if stored_count(running.address_text) < rows.count:
                    running.kill()
                    running.spawn()
                    running.wait_ready()
                loader.process.send_signal(signal.SIGCONT)
            report = loader.report()
            print(f"load {report}", flush=True)
            self.assertEqual((report["observations_acked"], report["refused"]), (rows.count, {}))
            self.assertGreater(report["rolled_back"], 0)
            self.assertEqual(stored_count(running.address_text), rows.count)
            with running.client(SPACE, features=frames.NO_SESSION) as client:
                check_rows(client, rows)

    def wait_stored(self, running, loader, failures, rows):
        """Waits until as many observations are there; the load has to be under way still."""
        deadline = time.monotonic() + DEADLINE_S
        with running.client(SPACE, features=frames.NO_SESSION) as client:
            while counted(client) < rows:
                self.assertEqual(failures, [])
                self.assertLess(time.monotonic(), deadline, f"{rows} rows are not stored")
                if not runs_for(loader.process, 0.002):
                    self.fail(f"the load ended before the kills: {loader.report()}")

    def check_report(self, report, rows):
        self.assertEqual((report["observations_sent"], report["observations_acked"]),
                         (rows.count, rows.count))
        self.assertEqual((report["refused"], report["rolled_back"]), ({}, 0))
        if self.kills > 0:
            self.assertGreater(report["reconnects"], 0)

    def check_all(self, running, rows, operator):
        live = operator.live()
        self.assertEqual(stored_count(running.address_text), rows.count + len(live))
        with running.client(SPACE, features=frames.NO_SESSION) as client:
            check_rows(client, rows)
            for identity, (vector, payload) in live.items():
                check_found(client, identity, vector, payload)
            operator.check(client, operator.counts()["operations"])


def keep_failure(run, failures):
    """What went wrong in a thread, for the one that waits for it."""
    try:
        run()
    except Exception as error:  # pylint: disable=broad-except
        failures.append(f"{type(error).__name__}: {error}")


class Cutter:
    """A relay to the daemon that ends each connection by RST after a random number of bytes."""

    def __init__(self, target, rng, cuts):
        self._target = target
        self._rng = rng
        self.cuts_left = cuts
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address_text = "127.0.0.1:%d" % self._listener.getsockname()[1]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self):
        self._stop.set()
        self._thread.join()
        self._listener.close()

    def _run(self):
        pairs = {}  # either end: (the other end, [bytes left])
        while not self._stop.is_set():
            for ready in select.select([self._listener, *pairs], [], [], 0.05)[0]:
                if ready is self._listener:
                    client, server = ready.accept()[0], socket.create_connection(self._target)
                    left = [self._rng.randrange(20_000) if self.cuts_left > 0 else 1 << 62]
                    self.cuts_left -= 1
                    pairs[client], pairs[server] = (server, left), (client, left)
                elif ready in pairs:
                    self._relay(ready, pairs)
        for end in pairs:
            end.close()

    def _relay(self, end, pairs):
        other, left = pairs[end]
        try:
            data = end.recv(min(65_536, max(1, left[0])))
            other.sendall(data)
        except ConnectionError:
            data = b""
        left[0] -= len(data)
        if data and left[0] > 0:
            return
        self.cuts += left[0] <= 0
        for each in (end, other):
            del pairs[each]
            each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            each.close()


class LoaderTest(unittest.TestCase):
    """The loader's own part: engramd is not killed with anything in it."""

    def test_a_load_may_begin_before_the_daemon(self):
        rng = random.Random(KillTest.seed)
        with tempfile.TemporaryDirectory(prefix="kill-test-") as directory, \
                daemon.running({"listen.tcp": f"127.0.0.1:{free_port(rng)}"}) as running:
            rows = Rows(100, rng, pathlib.Path(directory))
            running.kill()
            # Alone it covers the first connections; a second of it is not enough here.
            for more in ((), ("--resume",)):
                with self.assertRaisesRegex(AssertionError, "engramctl: 3 .*cannot connect"):
                    Loader(running.address_text, rows, 1_000_000, "--retry-for", 1, *more).report()
            for more in ((), ("--resume",)):
                loader = Loader(running.address_text, rows, 1_000_000, "--retry-for", DEADLINE_S,
                                *more)
                self.assertTrue(runs_for(loader.process, 0.1))  # some attempts are in vain
                running.spawn()
                running.wait_ready()
                report = loader.report()
                self.assertEqual((report["observations_acked"], report["reconnects"]),
                                 (rows.count, 0))
                running.kill()
            running.spawn()
            running.wait_ready()

    def test_without_resume_a_broken_connection_is_an_error(self):
        rng = random.Random(KillTest.seed)
        with tempfile.TemporaryDirectory(prefix="kill-test-") as directory, \
                daemon.running() as running:
            rows = Rows(2000, rng, pathlib.Path(directory))
            cutter = Cutter(running.address, rng, cuts=60)
            try:
                with self.assertRaisesRegex(AssertionError, "1 .*\n.* sent and not settled"):
                    Loader(cutter.address_text, rows, 1_000_000, "--retry-for", 5).report()
            finally:
                cutter.stop()

    def test_resume_needs_a_time(self):
        done = daemon.engramctl("load", "--data", "x.fvecs", "--resume")
        self.assertEqual(done.returncode, 2)
        self.assertIn("--retry-for", done.stderr)

    def test_cut_connections_are_resumed(self):
        rng = random.Random(KillTest.seed)
        print(f"seed {KillTest.seed}", flush=True)
        with tempfile.TemporaryDirectory(prefix="kill-test-") as directory, \
                daemon.running() as running:
            rows = Rows(2000, rng, pathlib.Path(directory))
            cutter = Cutter(running.address, rng, cuts=60)
            try:
                report = Loader(cutter.address_text, rows, 1_000_000).report()
            finally:
                cutter.stop()
            print(f"load {report}; {cutter.cuts} cuts", flush=True)
            self.assertEqual((report["observations_sent"], report["observations_acked"],
                              report["refused"], report["rolled_back"]),
                             (rows.count, rows.count, {}, 0))
            self.assertGreaterEqual(report["reconnects"], cutter.cuts // 2)
            self.assertGreater(report["resumed_ahead"], 0)
            self.assertEqual(stored_count(running.address_text), rows.count)
            with running.client(SPACE, features=frames.NO_SESSION) as client:
                check_rows(client, rows)
                space = [space for space in client.introspect(frames.SPACES)
                         if space.name == SPACE][0]
                self.assertEqual(space.retired, 0, "an observation was stored twice")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--kills", type=int, default=int(os.environ.get("ENGRAM_KILLS") or 20))
    parser.add_argument("--seed", type=int, default=int(os.environ.get("ENGRAM_SEED")
                                                        or random.SystemRandom().getrandbits(32)))
    options, rest = parser.parse_known_args()
    KillTest.kills, KillTest.seed = options.kills, options.seed
    sys.argv[1:] = rest
    daemon.main()
