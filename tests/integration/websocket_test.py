#!/usr/bin/python3
"""Streams over WebSocket: JSON in text messages, native frames in binary ones.

Not through env: another Python in PATH has no websocket-client.
"""

import json
import math
import random
import socket
import struct
import threading
import unittest
import urllib.error
import urllib.request

import daemon
import frames
import websocket

DIMENSION = 16
WAIT_S = 60


def direction(generator, dimension=DIMENSION):
    numbers = [generator.gauss(0, 1) for _ in range(dimension)]
    length = math.sqrt(sum(x * x for x in numbers))
    return [x / length for x in numbers]


class Ended(Exception):
    """The server closed: with this code."""

    def __init__(self, code):
        super().__init__(f"closed with {code}")
        self.code = code


class Stream:
    """One WebSocket: requests go out as they are sent, messages are read in turn."""

    def __init__(self, address, path="/v1/stream", **options):
        self.socket = websocket.create_connection(
            f"ws://{address}{path}", timeout=WAIT_S, enable_multithread=True, **options)
        self.session = ""
        self.initial = None

    def send(self, **fields):
        self.socket.send(json.dumps(fields))

    def send_text(self, text):
        self.socket.send(text)

    def receive(self):
        """The next message but for heartbeats."""
        while True:
            kind, data = self.socket.recv_data()
            if kind == websocket.ABNF.OPCODE_CLOSE:
                raise Ended(struct.unpack(">H", data[:2])[0] if data else None)
            assert kind == websocket.ABNF.OPCODE_TEXT, kind
            message = json.loads(data)
            if message["type"] != "heartbeat":
                return message

    def open(self, space, **init):
        self.send(type="init", memory_space_id=space, **init)
        answer = self.receive()
        assert answer["type"] == "init_ack", answer
        self.session = answer["session_id"]
        self.initial = answer["initial_sequence"]
        self.capabilities = answer["capabilities"]
        return self

    def observe(self, sequence, identity, vector, **fields):
        self.send(type="observation", session_id=self.session, sequence_number=sequence,
                  episode={"id": identity, "what": f"this is {identity}", "embedding": vector,
                           **fields})

    def recall(self, vector, request_id=1, **fields):
        """Asks and waits for all: (results, last message)."""
        self.send(type="recall", request_id=request_id, vector=vector, **fields)
        results = []
        while True:
            answer = self.receive()
            assert answer["type"] == "recall_result", answer
            assert answer["request_id"] == request_id, answer
            results += answer["results"]
            if not answer["more_results"]:
                return results, answer

    def ack(self):
        """The next message, which is an ack: (sequence, status, memory id)."""
        message = self.receive()
        assert message["type"] == "ack", message
        assert message["session_id"] == self.session, message
        return message["sequence_number"], message["status"], message["memory_id"]

    def status(self):
        message = self.receive()
        assert message["type"] == "status", message
        return message

    def error(self):
        message = self.receive()
        assert message["type"] == "error", message
        return message

    def refusal(self):
        """The next two messages, which refuse an observation: (sequence, status)."""
        sequence, status, _ = self.ack()
        assert status == "rejected", (sequence, status)
        return sequence, self.status()

    def end(self, **fields):
        """Closes the session; the number that it ended with."""
        self.send(type="close", session_id=self.session, **fields)
        message = self.receive()
        assert message["type"] == "closed", message
        try:
            self.receive()
        except Ended as ended:
            assert ended.code == 1000, ended
        self.socket.close()
        return message["final_sequence"]

    def failure(self):
        """The code that the stream ends with, once all else is read; None: it was cut."""
        try:
            while True:
                self.receive()
        except Ended as ended:
            return ended.code
        except (websocket.WebSocketConnectionClosedException, ConnectionError):
            return None


def http_address(running):
    return running.log.wait_for(r"http: serving at (\S+)$", 0)[1]


class StreamCase(unittest.TestCase):
    """Cases on one daemon, each in a space of its own."""

    settings = {}

    @classmethod
    def setUpClass(cls):
        cls.daemon = daemon.Daemon({"listen.http": "127.0.0.1:0", **cls.settings})
        cls.address = http_address(cls.daemon)

    @classmethod
    def tearDownClass(cls):
        cls.daemon.stop()

    def setUp(self):
        self.space = self.id().rpartition(".")[2].removeprefix("test_").lower()

    def tearDown(self):
        self.assertIsNone(self.daemon.process.poll(), self.daemon.log.text())

    def stream(self, **options):
        return Stream(self.address, **options)

    def vectors(self, count, seed=1):
        generator = random.Random(seed)
        return {f"o{i}": direction(generator) for i in range(count)}

    def observe_all(self, stream, vectors, first=1):
        """Sends while acks are read; returns the acks."""
        def send():
            for i, (identity, vector) in enumerate(vectors.items()):
                stream.observe(first + i, identity, vector)
        sender = threading.Thread(target=send)
        sender.start()
        acks = [stream.ack() for _ in vectors]
        sender.join()
        return acks

    def counters(self, *names):
        """Of the streams' ingress core, which is the last one."""
        with self.daemon.client("counters") as client:
            lines = [line.split(" ", 2) for line in client.introspect(frames.STATUS).splitlines()]
            client.close()
        last = max(core for core, _, _ in lines if core.startswith("ingress"))
        values = {name: value for core, name, value in lines if core == last}
        return [int(values[name]) for name in names]

    def get(self, target):
        with urllib.request.urlopen(f"http://{self.address}{target}", timeout=WAIT_S) as answer:
            return json.load(answer)


class Observing(StreamCase):
    def test_thousands_are_acked_in_order_and_recalled(self):
        vectors = self.vectors(2000)
        stream = self.stream().open(self.space)
        self.assertEqual(stream.initial, 0)
        self.assertRegex(stream.session, "^[0-9a-f]{16}$")
        self.assertGreater(stream.capabilities["queue_capacity"], 0)
        self.assertIs(stream.capabilities["supports_snapshot_isolation"], True)
        self.assertIs(stream.capabilities["supports_backpressure"], True)
        self.assertIn("max_observations_per_second", stream.capabilities)
        acks = self.observe_all(stream, vectors)
        self.assertEqual(acks, [(i + 1, "accepted", f"o{i}") for i in range(2000)])
        for identity in random.Random(2).sample(list(vectors), 100):
            [found], last = stream.recall(vectors[identity], max_results=1, request_id=identity)
            self.assertEqual((found["id"], found["content"]), (identity, f"this is {identity}"))
            self.assertAlmostEqual(found["activation"], 1, delta=0.001)
            self.assertEqual(last["metadata"]["total_activated"], 1)
        self.assertEqual(stream.end(), 2000)

    def test_an_episodes_fields_come_back(self):
        stream = self.stream().open(self.space)
        stream.observe(
            1, "köln", [0.5, -0.25, 1e-3, 0], when="2009-02-13T23:31:30.123456789Z",
            what="Dom ☂ \"und\" Rhein\n\\ \u0001 😀", encoding_confidence=0.95, why="holiday",
            where_location="Köln", who=["Ada", "Grace"], how="by train", decay_rate=0.125,
            emotional_valence=0.5, importance=0.75, consolidation_state="recent",
            last_replay="2011-03-13T09:06:40+02:00", something_else={"deep": [1, None, {}]})
        self.assertEqual(stream.ack(), (1, "accepted", "köln"))
        [memory], _ = stream.recall([0.5, -0.25, 0, 0], include_embedding=True)
        self.assertEqual(memory["content"], "Dom ☂ \"und\" Rhein\n\\ \u0001 😀")
        self.assertEqual(memory["created_at"], "2009-02-13T23:31:30.123456789Z")
        self.assertEqual(memory["last_access"], "2011-03-13T07:06:40Z")
        self.assertEqual(memory["memory_type"], "episodic")
        self.assertEqual(memory["decay_rate"], 0.125)
        self.assertAlmostEqual(memory["confidence"], 0.95 * memory["activation"], delta=1e-5)
        self.assertEqual(memory["embedding"], [0.5, -0.25, 0.001, 0])
        metadata = memory["metadata"]
        self.assertEqual((metadata["where_location"], metadata["why"], metadata["how"]),
                         ("Köln", "holiday", "by train"))
        self.assertIn("Ada", metadata["who"])
        [found], _ = stream.recall([1, 0, 0, 0], filter={
            "metadata": {"who": "Grace", "where_location": ["Bonn", "Köln"]},
            "time_start": "2009-02-13T00:00:00Z", "time_end": "2009-02-14T00:00:00Z"})
        self.assertEqual(found["id"], "köln")
        self.assertEqual(stream.recall([1, 0, 0, 0], filter={"metadata": {"who": "Bob"}})[0], [])
        stream.end()

    def test_what_is_wrong_uses_its_number_up(self):
        good = direction(random.Random(1))
        for version in (0, 1):
            with self.subTest(version=version):
                stream = self.stream().open(f"{self.space}-{version}", protocol_version=version)
                sequence = 0
                for fields, text in WRONG_EPISODES:
                    sequence += 1
                    stream.observe(sequence, "x", **{"vector": good, **fields})
                    told, status = stream.refusal()
                    self.assertEqual(told, sequence)
                    self.assertEqual(status["state"], "error")
                    self.assertRegex(status["message"], text)
                    self.assertEqual(status["expected_sequence"], sequence + 1)
                stream.observe(sequence + 1, "a", good)
                self.assertEqual(stream.ack(), (sequence + 1, "accepted", "a"))
                # The space's dimension is settled now.
                stream.observe(sequence + 2, "b", good[1:])
                told, status = stream.refusal()
                self.assertEqual((told, status["code"]), (sequence + 2, "wrong_dimension"))
                stream.observe(sequence + 3, "b", [0.0] * DIMENSION)
                told, status = stream.refusal()
                self.assertEqual((told, status["code"]), (sequence + 3, "zero_vector"))
                self.assertEqual(stream.end(), sequence + 3)

    def test_gaps_and_repeats(self):
        good = direction(random.Random(1))
        for version in (0, 1):
            with self.subTest(version=version):
                stream = self.stream().open(f"{self.space}-{version}", protocol_version=version)
                stream.observe(1, "a", good)
                self.assertEqual(stream.ack(), (1, "accepted", "a"))
                stream.observe(5, "e", good)
                sequence, status = stream.refusal()
                self.assertEqual((sequence, status["code"], status["expected_sequence"]),
                                 (5, "sequence_gap", 2))
                self.assertIn("2", status["message"])
                stream.observe(1, "again", good)
                self.assertEqual(stream.ack()[:2], (1, "accepted"))
                stream.observe(2, "b", good)
                self.assertEqual(stream.ack(), (2, "accepted", "b"))
                self.assertEqual(stream.end(), 2)
                self.assertEqual(
                    self.get(f"/api/v1/memories/recall?space={self.space}-{version}&id=again&id=e")
                    ["results"], [])

    def test_cumulative_acks(self):
        vectors = self.vectors(500)
        stream = self.stream().open(self.space, protocol_version=1, cumulative_acks=True)
        for i, (identity, vector) in enumerate(vectors.items()):
            stream.observe(i + 1, identity, vector)
        acked = []
        while not acked or acked[-1] < 500:
            acked.append(stream.ack()[0])
        self.assertEqual(acked, sorted(set(acked)))
        self.assertEqual(stream.end(), 500)

    def test_a_session_is_resumed(self):
        vectors = list(self.vectors(30).items())
        first = self.stream().open(self.space)
        for i in range(10):
            first.observe(i + 1, *vectors[i])
        self.assertEqual([first.ack()[0] for _ in range(10)], list(range(1, 11)))
        first.socket.sock.close()
        again = self.stream().open(self.space, resume_session_id=first.session)
        self.assertEqual((again.session, again.initial), (first.session, 10))
        again.observe(11, *vectors[10])
        self.assertEqual(again.ack(), (11, "accepted", "o10"))
        # A third one fences the second.
        third = self.stream().open(self.space, resume_session_id=first.session)
        self.assertEqual(third.initial, 11)
        self.assertEqual(again.error()["code"], "fenced")
        self.assertEqual(again.failure(), 1008)
        self.assertEqual(third.end(), 11)
        for known, space, code in (("0123456789abcdef", self.space, "session_expired"),
                                   (first.session, "elsewhere", "session_space_mismatch")):
            stray = self.stream()
            stray.send(type="init", memory_space_id=space, resume_session_id=known)
            self.assertEqual(stray.error()["code"], code)
            self.assertEqual(stray.failure(), 1008)
        stray = self.stream()
        stray.send(type="init", memory_space_id=self.space, resume_session_id="no id")
        self.assertEqual(stray.error()["code"], "session_expired")
        # It may still begin a new one.
        self.assertEqual(stray.open(self.space).initial, 0)
        stray.end()


WRONG_EPISODES = (
    ({"vector": []}, "^episode.embedding: 0 values; expected 1 to 4096$"),
    ({"vector": [1.0] * 4097}, "^episode.embedding: 4097 values; expected 1 to 4096$"),
    ({"vector": [1.0, float("nan")]}, r"^episode.embedding\[1\]: NaN; expected a finite number"),
    ({"vector": [float("-inf")]}, r"^episode.embedding\[0\]: -Infinity; expected a finite number"),
    ({"vector": [1e39]}, r"^episode.embedding\[0\]: 1e\+39; expected a finite number"),
    ({"vector": ["1"]}, r'^episode.embedding\[0\]: "1"; expected a finite number'),
    ({"vector": [None]}, r"^episode.embedding\[0\]: null; expected a finite number"),
    ({"vector": "1,2"}, r'^episode.embedding: "1,2"; expected a list of numbers$'),
    ({"vector": {}}, "^episode.embedding: an object; expected a list of numbers$"),
    ({"when": "yesterday"}, '^episode.when: "yesterday"; expected a time as RFC 3339'),
    ({"when": "2026-02-29T00:00:00Z"}, "^episode.when: "),
    ({"when": "9999-01-01T00:00:00Z"}, "^episode.when: .*of the years 1678 to 2261"),
    ({"encoding_confidence": 1.5}, "^episode.encoding_confidence: 1.5; expected 0 to 1$"),
    ({"encoding_confidence": -0.1}, "^episode.encoding_confidence: -0.1; expected 0 to 1$"),
    ({"what": 7}, "^episode.what: 7; expected a text$"),
    ({"id": "x" * 257}, "^episode.id: 257 bytes; expected 1 to 256$"),
    ({"what": "y" * 70000}, "^episode: [0-9]+ bytes besides id and embedding; expected up to"),
    ({"who": "Ada"}, '^episode.who: "Ada"; expected a list of texts$'),
    ({"who": ["z" * 300]}, r"^episode.who\[0\]: 300 bytes; expected up to 255"),
    ({"importance": "high"}, "^episode.importance: "),
    ({"consolidation_state": "gone"}, '^episode.consolidation_state: "gone"; expected "unspec'),
)


class Messages(StreamCase):
    def test_what_cannot_be_read_is_told_and_the_stream_goes_on(self):
        good = direction(random.Random(1))
        stream = self.stream()
        for text, code in (("", "bad_json"), ("{", "bad_json"), ("[]", "bad_json"),
                           ("nonsense", "bad_json"), ('{"type":"init"}}', "bad_json"),
                           ('{"type":"init",}', "bad_json"), ('{"type" "init"}', "bad_json"),
                           ('{"a":"\\ud800x"}', "bad_json"), ('{"a":01}', "bad_json"),
                           ('{"a":' * 40 + "1" + "}" * 40, "bad_json"),
                           ('{"a":NaN,"type":"init"}', "bad_json"), ("7", "bad_json"),
                           ("{}", "bad_type"), ('{"type":"initialise"}', "bad_type"),
                           ('{"type":7}', "bad_type"), ('{"type":null}', "bad_type"),
                           ('{"type":"observation"}', "init_required"),
                           ('{"type":"recall"}', "init_required"),
                           ('{"type":"close"}', "init_required"),
                           ('{"type":"init","memory_space_id":"No!"}', "invalid_argument"),
                           ('{"type":"init","priority":"urgent"}', "invalid_argument"),
                           ('{"type":"init","client_buffer_size":-1}', "invalid_argument")):
            with self.subTest(text):
                stream.send_text(text)
                error = stream.error()
                self.assertEqual(error["code"], code, error)
                self.assertGreater(len(error["message"]), 10)
        stream.send_text('{"type":"init","x":tru}')
        self.assertRegex(stream.error()["message"], "^not JSON, at byte [0-9]+: ")
        stream.open(self.space)
        stream.send(type="init", memory_space_id=self.space)
        self.assertRegex(stream.error()["message"], "^init: sent twice")
        for fields, text in (
                ({"type": "observation", "episode": {}}, "^sequence_number: missing"),
                ({"type": "observation", "sequence_number": -1}, "^sequence_number: -1; expected"),
                ({"type": "observation", "sequence_number": 1.5}, "^sequence_number: 1.5; expe"),
                ({"type": "observation", "sequence_number": "1"}, '^sequence_number: "1"; expec'),
                ({"type": "flow_control"}, "^action: missing"),
                ({"type": "flow_control", "action": "stop"}, '^action: "stop"; expected "pause"'),
                ({"type": "recall", "request_id": 1}, "^vector: missing"),
                ({"type": "recall", "vector": []}, "^vector: 0 values; expected"),
                ({"type": "recall", "vector": [1], "max_results": 10001},
                 "^max_results: 10001; expected 0 to 10000"),
                ({"type": "recall", "vector": [1], "filter": {"tag": "x"}}, r"^filter.tag: there is"),
                ({"type": "recall", "vector": [1], "filter": {"metadata": {"no such": "x"}}},
                 "^filter.metadata"),
                ({"type": "recall", "vector": [1], "memory_space_id": "elsewhere"},
                 '^memory_space_id: "elsewhere"; this stream'),
                ({"type": "recall", "vector": [1], "request_id": "x" * 257}, "^request_id: 257")):
            with self.subTest(fields):
                stream.send(**fields)
                self.assertRegex(stream.error()["message"], text)
        stream.send(type="recall", request_id="mine", vector=[])
        self.assertEqual(stream.error()["request_id"], "mine")
        for fields, text in (({"session_id": "0123456789abcdef"}, "^session_id: .*; this stream's"),
                             ({"memory_space_id": "elsewhere"}, "^memory_space_id: ")):
            stream.send(type="observation", sequence_number=stream.initial + 1,
                        episode={"id": "a", "embedding": good}, **fields)
            sequence, status = stream.refusal()
            stream.initial = sequence
            self.assertRegex(status["message"], text)
        # Fields may come in any order, and twice.
        stream.send_text(json.dumps({"episode": {"embedding": good, "id": "b"},
                                     "sequence_number": 3, "type": "observation"}))
        self.assertEqual(stream.ack(), (3, "accepted", "b"))
        stream.end()

    def test_text_that_is_no_utf8_or_too_long_ends_the_stream(self):
        stream = self.stream()
        stream.socket.send(b'{"type":"\xff"}', websocket.ABNF.OPCODE_TEXT)
        self.assertIn(stream.failure(), (1007, None))
        stream = self.stream().open(self.space)
        stream.send_text(json.dumps({"type": "x", "pad": "x" * 4_000_000}))
        self.assertEqual(stream.error()["code"], "bad_type")
        try:
            stream.send_text(" " * (4 << 20) + "{}")
        except (ConnectionError, websocket.WebSocketException):
            pass
        self.assertIn(stream.failure(), (1009, None))

    def test_text_and_binary_are_not_mixed(self):
        stream = self.stream().open(self.space)
        stream.socket.send_binary(b"ENG1")
        self.assertEqual(stream.failure(), 1003)
        stream = self.stream()
        stream.socket.send_binary(frames.frame(frames.PING))
        stream.send_text("{}")
        kind, data = None, b""
        while kind != websocket.ABNF.OPCODE_CLOSE:
            kind, data = stream.socket.recv_data()
        self.assertEqual(struct.unpack(">H", data[:2])[0], 1003)

    def test_messages_in_fragments_and_pings(self):
        stream = self.stream().open(self.space)
        text = json.dumps({"type": "observation", "sequence_number": 1, "episode": {
            "id": "ä☂😀", "embedding": [0.25] * 100}}, ensure_ascii=False).encode()
        for i in range(0, len(text), 7):
            opcode = websocket.ABNF.OPCODE_TEXT if i == 0 else websocket.ABNF.OPCODE_CONT
            frame = websocket.ABNF.create_frame(text[i:i + 7], opcode, int(i + 7 >= len(text)))
            stream.socket.send_frame(frame)
            if i % 21 == 0:
                stream.socket.ping("are you there")
        self.assertEqual(stream.ack(), (1, "accepted", "ä☂😀"))
        stream.end()

    def test_recalls_with_snapshots_and_in_parts(self):
        vectors = self.vectors(1000)
        stream = self.stream().open(self.space)
        self.observe_all(stream, vectors)
        found, last = stream.recall(vectors["o7"], max_results=1000, snapshot_isolation=True)
        self.assertEqual((len({each["id"] for each in found}), found[0]["id"]), (1000, "o7"))
        self.assertGreater(last["snapshot_sequence"], 0)
        best = sorted(vectors, key=lambda i: -sum(
            a * b for a, b in zip(vectors["o7"], vectors[i])))[:10]
        found, _ = stream.recall(vectors["o7"], similarity_threshold=0.5)
        self.assertEqual([each["id"] for each in found], best[:len(found)])
        self.assertGreater(min(each["activation"] for each in found), 0.5)
        stream.send(type="recall", request_id=2, vector=[1, 2])
        self.assertEqual(stream.error()["code"], "wrong_dimension")
        stream.send(type="recall", request_id=3, vector=vectors["o7"],
                    snapshot_time="2001-01-01T00:00:00Z")
        self.assertEqual(stream.error()["code"], "snapshot_too_old")
        # The latest of what a filter matches.
        found, _ = stream.recall(None, filter={"metadata": {"memory_type": "episodic"}},
                                 max_results=5)
        self.assertEqual(len(found), 5)
        stream.end()

    def test_spaces_from_header_and_query(self):
        by_query = self.stream(path=f"/v1/stream?space={self.space}")
        by_query.open("")
        by_query.observe(1, "a", [1.0])
        by_query.ack()
        by_query.send(type="recall", vector=[1], memory_space_id=self.space)
        self.assertEqual(by_query.receive()["type"], "recall_result")
        by_query.end()
        by_header = self.stream(header={"x-memory-space": self.space})
        by_header.send(type="init", memory_space_id="elsewhere")
        self.assertRegex(by_header.error()["message"], "^x-memory-space: ")
        by_header.open(self.space).end()


class Hidden(StreamCase):
    """Upgrades that are refused, and streams that end anyhow."""

    def refused(self, **options):
        with self.assertRaises(websocket.WebSocketBadStatusException) as caught:
            self.stream(**options)
        return caught.exception.status_code

    def test_origins(self):
        port = self.address.rpartition(":")[2]
        for origin in ("https://example.com", "null", f"http://127.0.0.1.example.com:{port}",
                       "http://localhost.example.com", "file://"):
            self.assertEqual(self.refused(origin=origin), 403, origin)
        for origin in ("http://localhost:3000", "https://LOCALHOST", "http://127.0.0.1",
                       "http://[::1]:8", f"http://{self.address}"):
            self.stream(origin=origin).open(self.space).end()
        # The page's own host, whatever it is called.
        self.stream(origin="https://db.example.com", host="db.example.com:8080").open(
            self.space).end()

    def test_wrong_paths(self):
        self.assertEqual(self.refused(path="/v1/streams"), 404)
        self.assertEqual(self.refused(path="/"), 404)
        self.assertEqual(self.refused(path="/v1/stream?space=%zz"), 404)

    def test_streams_that_end_anyhow(self):
        vectors = list(self.vectors(20).items())
        streams = []
        for i in range(50):
            stream = self.stream().open(self.space)
            for n, (identity, vector) in enumerate(vectors):
                stream.observe(n + 1, f"s{i}-{identity}", vector)
            streams.append(stream)
        for i, stream in enumerate(streams):
            if i % 5 == 0:
                stream.socket.sock.close()
            elif i % 5 == 1:
                linger = struct.pack("ii", 1, 0)
                stream.socket.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                stream.socket.sock.close()
            elif i % 5 == 2:
                self.assertEqual([stream.ack()[0] for _ in range(20)], list(range(1, 21)))
                self.assertEqual(stream.end(), 20)
            elif i % 5 == 3:
                stream.socket.close()
            else:
                stream.socket.sock.sendall(b"\xff\xff garbage that is no frame")
                stream.failure()
        daemon.wait_until(self.is_quiet, "every stream is given back")

    def test_closes_that_nobody_answers(self):
        """The server has closed; the client goes on sending, or says nothing, and stays."""
        streams = []
        for i in range(6):
            stream = self.stream().open(self.space)
            stream.send(type="close")
            self.assertEqual(stream.receive()["type"], "closed")
            # What is read here is no close frame that would be answered.
            if i % 2 == 0:
                frame = websocket.ABNF.create_frame("{}", websocket.ABNF.OPCODE_TEXT).format()
                stream.socket.sock.sendall(frame)
                stream.socket.sock.sendall(frame[:3])
            streams.append(stream)
        for stream in streams:
            # Until it is cut; the handshake of a close has 10 s.
            while stream.socket.sock.recv(4096):
                pass
        daemon.wait_until(self.is_quiet, "every stream is given back")

    def is_quiet(self):
        opened, closed = self.counters("connections_opened", "connections_closed")
        return 0 < opened == closed


class Binary(StreamCase):
    def test_native_frames_in_any_split(self):
        """As over TCP: what is sent and received here are the same bytes."""
        stream = self.stream()
        received = bytearray()

        def next_frame():
            while True:
                if len(received) >= 32:
                    frame, length, crc = frames.decode_header(bytes(received[:32]))
                    if len(received) >= 32 + length:
                        body = bytes(received[32:32 + length])
                        del received[:32 + length]
                        return frame._replace(body=body)
                received.extend(stream.socket.recv())

        generator = random.Random(3)
        stream.socket.send_binary(frames.frame(
            frames.HELLO, frames.hello_body(self.space.encode(), metric=frames.L2)))
        hello = frames.decode_hello_ack(next_frame())
        records = [frames.record(b"n%d" % i, direction(generator), payload=b"p%d" % i)
                   for i in range(100)]
        sent = b"".join(frames.frame(frames.OBSERVE, frames.observe_body(records[i:i + 10]),
                                     session=hello.session, sequence=i + 1)
                        for i in range(0, 100, 10))
        while sent:
            size = generator.choice([1, 3, 31, 33, 500, 5000])
            stream.socket.send_binary(sent[:size])
            sent = sent[size:]
        acked = 0
        while acked < 100:
            frame = next_frame()
            self.assertEqual(frame.type, frames.ACK)
            acked = frame.sequence
        # One message with 40 recalls, whose answers come together.
        vector = direction(random.Random(3))
        stream.socket.send_binary(b"".join(
            frames.frame(frames.RECALL, frames.recall_body(vector, 5), session=hello.session,
                         sequence=n, flags=frames.WITH_PAYLOAD) for n in range(1, 11)))
        for _ in range(10):
            answer = next_frame()
            self.assertEqual(answer.type, frames.RESULT)
            _, _, hits = frames.decode_result(answer)
            self.assertEqual((hits[0].id, hits[0].payload), (b"n0", b"p0"))
        stream.socket.send_binary(frames.frame(frames.CLOSE, session=hello.session))
        self.assertEqual([next_frame().type for _ in range(2)], [frames.ACK, frames.CLOSE])
        self.assertEqual(stream.failure(), 1000)

    def test_what_is_no_frame_is_refused_as_over_tcp(self):
        stream = self.stream()
        stream.socket.send_binary(b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n")
        data = stream.socket.recv()
        header, length, _ = frames.decode_header(data[:32])
        nak = frames.decode_nak(header._replace(body=data[32:32 + length]))
        self.assertEqual(nak.name, "bad_magic")
        self.assertEqual(stream.failure(), 1000)


class Beating(StreamCase):
    """Pauses, and what an idle stream hears."""

    def test_pause_refuses_and_holds(self):
        vectors = list(self.vectors(10).values())
        for version in (0, 1):
            with self.subTest(version=version):
                stream = self.stream().open(f"{self.space}-{version}", protocol_version=version)
                stream.observe(1, "a", vectors[0])
                self.assertEqual(stream.ack(), (1, "accepted", "a"))
                stream.send(type="flow_control", session_id=stream.session, action="pause")
                self.assertEqual(stream.status()["state"], "paused")
                stream.send(type="recall", request_id=9, vector=vectors[0])
                stream.observe(2, "b", vectors[1])
                sequence, status = stream.refusal()
                self.assertEqual((sequence, status["state"], status["code"]),
                                 (2, "paused", "paused"))
                expected = 3 if version == 0 else 2
                self.assertEqual(status["expected_sequence"], expected)
                stream.send(type="flow_control", session_id=stream.session, action="resume")
                self.assertEqual(stream.status()["state"], "active")
                answer = stream.receive()
                self.assertEqual((answer["request_id"], [each["id"] for each in answer["results"]]),
                                 (9, ["a"]))
                stream.observe(expected, "b", vectors[1])
                self.assertEqual(stream.ack(), (expected, "accepted", "b"))
                stream.end()


class Overloaded(StreamCase):
    settings = {"memory.limit_mib": 64}

    def test_refusals_for_room_by_the_rules_of_each(self):
        """Memory ends: Engram's client goes on after each refusal, ours goes back."""
        generator = random.Random(4)
        vectors = [direction(generator, 4096) for _ in range(20)]
        texts = [json.dumps([round(x, 3) for x in vector]) for vector in vectors]
        old = self.stream().open(self.space)
        refused, sequence = [], 0
        while len(refused) < 5:
            sequence += 1
            self.assertLess(sequence, 5000)
            old.send_text('{"type":"observation","sequence_number":%d,"episode":{"id":"o%d",'
                          '"embedding":%s}}' % (sequence, sequence, texts[sequence % 20]))
            told, status, _ = old.ack()
            self.assertEqual(told, sequence)
            if status == "rejected":
                why = old.status()
                self.assertEqual((why["state"], why["code"]), ("overloaded", "memory_full"))
                self.assertGreater(why["retry_after_ms"], 0)
                self.assertEqual(why["expected_sequence"], sequence + 1)
                refused.append(sequence)
        new = self.stream().open(self.space, protocol_version=1)
        new.observe(1, "n1", vectors[1])
        new.observe(2, "n2", vectors[2])
        told, why = new.refusal()
        self.assertEqual((told, why["code"], why["expected_sequence"]), (1, "memory_full", 1))
        request = urllib.request.Request(
            f"http://{self.address}/api/v1/memories/remember?space={self.space}",
            data=json.dumps({"id": "r", "embedding": vectors[3]}).encode())
        with self.assertRaises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=WAIT_S)
        self.assertEqual(caught.exception.code, 429)
        self.assertGreaterEqual(int(caught.exception.headers["Retry-After"]), 1)
        told = json.load(caught.exception)["error"]
        self.assertEqual(told["code"], "memory_full")
        self.assertGreater(told["retry_after_ms"], 0)
        old.end()


class Killed(StreamCase):
    def test_nothing_lost_or_doubled(self):
        order = list(self.vectors(3000).items())
        stream = self.stream().open(self.space)

        def send():
            try:
                for i, (identity, vector) in enumerate(order):
                    stream.observe(i + 1, identity, vector)
            except (OSError, websocket.WebSocketException):
                pass
        sender = threading.Thread(target=send)
        sender.start()
        acked = [stream.ack()[0] for _ in range(1000)]
        self.assertEqual(acked, list(range(1, 1001)))
        self.daemon.kill()
        stream.failure()
        sender.join()
        self.daemon.spawn()
        self.daemon.wait_ready()
        type(self).address = http_address(self.daemon)
        again = self.stream().open(self.space, resume_session_id=stream.session)
        self.assertGreaterEqual(again.initial, 1000)
        rest = dict(order[again.initial:])
        self.assertEqual([ack[0] for ack in self.observe_all(again, rest, again.initial + 1)],
                         list(range(again.initial + 1, 3001)))
        again.end()
        [space] = [each for each in self.get("/api/v1/spaces")["spaces"]
                   if each["id"] == self.space]
        self.assertEqual(space["observations"], 3000)


class Stopping(unittest.TestCase):
    def test_streams_are_settled_and_told(self):
        running = daemon.Daemon({"listen.http": "127.0.0.1:0"})
        address = http_address(running)
        vectors = [direction(random.Random(i)) for i in range(200)]
        streams = [Stream(address).open("stopping") for _ in range(5)]
        idle = Stream(address)
        for stream in streams:
            for i, vector in enumerate(vectors):
                stream.observe(i + 1, f"{stream.session}-{i}", vector)
            self.assertEqual(stream.ack()[0], 1)
        running.terminate()
        last = {}
        for stream in streams:
            acked = 1
            while True:
                message = stream.receive()
                if message["type"] == "closed":
                    break
                self.assertEqual((message["type"], message["sequence_number"]), ("ack", acked + 1))
                acked += 1
            self.assertEqual(message["final_sequence"], acked)
            last[stream.session] = acked
            self.assertEqual(stream.failure(), 1001)
        self.assertEqual(idle.failure(), 1001)
        self.assertEqual(running.wait(), 0)
        running.log.finish()
        running.spawn()
        running.wait_ready()
        address = http_address(running)
        for session, acked in last.items():
            again = Stream(address).open("stopping", resume_session_id=session)
            self.assertEqual(again.initial, acked)
            again.end()
        running.stop()


if __name__ == "__main__":
    daemon.main()
