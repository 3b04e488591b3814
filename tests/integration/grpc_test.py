#!/usr/bin/python3
"""Engram's unary calls over gRPC, with the project's own protos and Debian's python3-grpcio.

Not through env: another Python in PATH has no grpcio. ENGRAM_PROTO_PYTHON names the folder with the
generated modules.
"""

import contextlib
import json
import math
import os
import random
import sys
import threading
import unittest
from concurrent import futures

import daemon
import frames

sys.path.insert(0, os.environ.get("ENGRAM_PROTO_PYTHON") or
                str(daemon.ROOT / "build" / "release" / "src" / "proto"))
import grpc  # noqa: E402
from google.protobuf import descriptor_pb2  # noqa: E402
from google.protobuf.timestamp_pb2 import Timestamp  # noqa: E402

from engram.v1 import error_details_pb2  # noqa: E402
from engram.v1 import memory_pb2 as m  # noqa: E402
from engram.v1 import service_pb2 as s  # noqa: E402
from engram.v1 import service_pb2_grpc  # noqa: E402

DIMENSION = 64
CALL_DEADLINE_S = 60
COUNTERS = ("gateway.calls_started", "gateway.calls_answered", "gateway.calls_refused",
            "gateway.calls_under_way")
INVALID = grpc.StatusCode.INVALID_ARGUMENT
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED


def direction(generator, dimension=DIMENSION):
    """A random unit vector."""
    vector = [generator.gauss(0, 1) for _ in range(dimension)]
    length = math.sqrt(sum(x * x for x in vector))
    return [x / length for x in vector]


def cosine(a, b):
    return (sum(x * y for x, y in zip(a, b)) /
            math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b)))


def embedding_cue(vector, **fields):
    threshold = fields.pop("similarity_threshold", 0)
    return m.Cue(embedding=m.EmbeddingCue(vector=vector, similarity_threshold=threshold), **fields)


class Client:
    """A channel to a daemon and a stub; every call has a deadline."""

    def __init__(self, running):
        self.address = running.log.wait_for(r"grpc: serving engram.v1.EngramService at (.*)$", 0)[1]
        # A channel of its own, not one that earlier clients share.
        self.channel = grpc.insecure_channel(self.address, [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", 64 << 20)])
        self.stub = service_pb2_grpc.EngramServiceStub(self.channel)

    def __getattr__(self, name):
        method = getattr(self.stub, name)

        def call(request, **options):
            options.setdefault("timeout", CALL_DEADLINE_S)
            return method(request, **options)
        return call

    def remember(self, space, identity, vector, **fields):
        return self.Remember(s.RememberRequest(memory_space_id=space, episode=m.Episode(
            id=identity, embedding=vector, **fields)))

    def recall(self, space, vector, **fields):
        return self.Recall(s.RecallRequest(
            memory_space_id=space, cue=embedding_cue(vector), **fields))

    def get(self, space, *ids, **fields):
        return list(self.Recall(
            s.RecallRequest(memory_space_id=space, ids=ids, **fields)).memories)

    def metrics(self, *names):
        return self.Introspect(s.IntrospectRequest(metrics=names)).metrics

    def close(self):
        self.channel.close()


class GrpcCase(unittest.TestCase):
    """Cases on one daemon, each in a space of its own."""

    settings = {}

    @classmethod
    def setUpClass(cls):
        cls.daemon = daemon.Daemon({"listen.grpc": "127.0.0.1:0", **cls.settings})
        cls.client = Client(cls.daemon)

    @classmethod
    def tearDownClass(cls):
        cls.client.close()
        cls.daemon.stop()

    def setUp(self):
        self.space = self.id().rpartition(".")[2].removeprefix("test_").lower()

    def tearDown(self):
        """Nothing is left behind at the gateway, and every call was answered."""
        self.assertIsNone(self.daemon.process.poll(), self.daemon.log.text())
        # A cancelled call may still be on its way. The call that asks is answered when it reads.
        for _ in range(1000):
            metrics = self.client.metrics(*COUNTERS)
            started, answered, refused, under_way = (metrics[name] for name in COUNTERS)
            if (started, under_way) == (answered + refused, 0):
                return
        self.fail(f"calls are left behind: {dict(metrics)}")

    def assert_fails(self, code, text, call, *arguments, **options):
        with self.assertRaises(grpc.RpcError) as caught:
            call(*arguments, **options)
        self.assertEqual(caught.exception.code(), code, caught.exception.details())
        self.assertEqual(caught.exception.details(), text)


class Calls(GrpcCase):
    def test_thousand_remembered_and_recalled(self):
        generator = random.Random(7)
        vectors = {f"m{i}": direction(generator) for i in range(1000)}
        for identity, vector in vectors.items():
            done = self.client.remember(self.space, identity, vector, what=f"this is {identity}",
                                        encoding_confidence=m.Confidence(value=0.9))
            self.assertEqual(done.memory_id, identity)
            self.assertFalse(done.existed)
        self.assertEqual(done.storage_confidence.value, 1)
        self.assertEqual(done.initial_state, m.CONSOLIDATION_STATE_RECENT)
        self.assertGreater(done.committed_at.seconds, 1_600_000_000)
        self.assertEqual(list(done.linked_memories), [])
        right = 0
        for _ in range(50):
            query = direction(generator)
            wanted = sorted(vectors, key=lambda name: -cosine(query, vectors[name]))[:10]
            answer = self.client.recall(self.space, query, max_results=10, include_metadata=True,
                                        trace_activation=True)
            found = answer.memories
            self.assertEqual(len(found), 10)
            right += len(set(wanted) & {memory.id for memory in found})
            similarities = [cosine(query, vectors[memory.id]) for memory in found]
            self.assertEqual(similarities, sorted(similarities, reverse=True))
            for memory, similarity in zip(found, similarities):
                self.assertEqual(memory.content, f"this is {memory.id}")
                self.assertAlmostEqual(memory.activation, similarity, delta=0.02)
                self.assertAlmostEqual(memory.confidence.value, 0.9 * memory.activation, delta=1e-5)
                self.assertEqual(memory.memory_type, m.MEMORY_TYPE_EPISODIC)
                self.assertEqual(len(memory.embedding), 0)
            self.assertEqual(answer.recall_confidence.value, found[0].confidence.value)
            self.assertEqual(answer.metadata.total_activated, 10)
            self.assertEqual(answer.metadata.above_threshold, 10)
            self.assertAlmostEqual(answer.metadata.avg_activation,
                                   sum(memory.activation for memory in found) / 10, delta=1e-5)
            self.assertEqual(len(answer.traces), 0)
        self.assertGreaterEqual(right / 500, 0.99, "recall@10")

    def test_every_vector_is_found_by_itself_right_after_its_answer(self):
        generator = random.Random(8)
        for i in range(100):
            vector = direction(generator)
            self.client.remember(self.space, f"m{i}", vector)
            self.assertEqual(self.client.recall(self.space, vector).memories[0].id, f"m{i}")

    def test_an_episodes_fields_come_back(self):
        when = Timestamp(seconds=1_234_567_890, nanos=123_456_789)
        replay = Timestamp(seconds=1_300_000_000)
        self.client.remember(
            self.space, "köln", [0.5, -0.25, 1, 0], when=when, what="Dom ☂ und Rhein",
            encoding_confidence=m.Confidence(value=0.95, reasoning="saw it"),
            where_location="Köln", who=["Ada", "Grace"], why="holiday", how="by train",
            decay_rate=0.125, emotional_valence=0.5, importance=0.75,
            consolidation_state=m.CONSOLIDATION_STATE_CONSOLIDATED, last_replay=replay)
        [memory] = self.client.recall(self.space, [0.5, -0.25, 1, 0],
                                      include_embedding=True).memories
        self.assertEqual(memory.id, "köln")
        self.assertEqual(memory.content, "Dom ☂ und Rhein")
        self.assertEqual(memory.created_at, when)
        self.assertEqual(memory.last_access, replay)
        self.assertEqual(memory.decay_rate, 0.125)
        self.assertEqual(memory.confidence.category, m.CONFIDENCE_CATEGORY_HIGH)
        self.assertEqual(memory.confidence.reasoning, "saw it")
        self.assertEqual(dict(memory.metadata), {
            "where_location": "Köln", "who": "Ada, Grace", "why": "holiday", "how": "by train",
            "emotional_valence": "0.5", "importance": "0.75",
            "consolidation_state": "CONSOLIDATION_STATE_CONSOLIDATED"})
        # As the space keeps it: cosine compares directions.
        self.assertAlmostEqual(cosine(memory.embedding, [0.5, -0.25, 1, 0]), 1, delta=1e-3)

    def test_a_memorys_fields_come_back(self):
        created = Timestamp(seconds=-5, nanos=1)
        stored = m.Memory(
            id="m", embedding=[1, 2], activation=0.5, confidence=m.Confidence(value=1),
            last_access=Timestamp(seconds=9), created_at=created, decay_rate=0.5, content="text",
            metadata={"a": "b", "ü": ""}, tags=["x", "y"], memory_type=m.MEMORY_TYPE_SEMANTIC)
        done = self.client.Remember(s.RememberRequest(
            memory_space_id=self.space, memory=stored, auto_link=True, link_threshold=0.5))
        self.assertEqual(list(done.linked_memories), [])
        [memory] = self.client.get(self.space, "m")
        self.assertEqual(memory.confidence.category, m.CONFIDENCE_CATEGORY_CERTAIN)
        self.assertEqual(memory.activation, 0)
        wanted = m.Memory()
        wanted.CopyFrom(stored)
        wanted.ClearField("embedding")
        wanted.activation = 0
        wanted.confidence.category = m.CONFIDENCE_CATEGORY_CERTAIN
        self.assertEqual(memory, wanted)

    def test_what_is_left_out_has_defaults(self):
        first = self.client.Remember(s.RememberRequest(episode=m.Episode(embedding=[1, 0, 0])))
        second = self.client.Remember(s.RememberRequest(memory=m.Memory(embedding=[0, 1, 0])))
        for done in (first, second):
            self.assertRegex(done.memory_id, "^[0-9a-f]{32}$")
        self.assertNotEqual(first.memory_id, second.memory_id)
        memories = self.client.get("default", first.memory_id, second.memory_id)
        self.assertEqual([memory.id for memory in memories], [first.memory_id, second.memory_id])
        for memory in memories:
            self.assertAlmostEqual(memory.confidence.value, 0.7, delta=1e-6)
            self.assertLess(abs(memory.created_at.seconds - first.committed_at.seconds), 60)
        for i in range(20):
            self.client.Remember(s.RememberRequest(episode=m.Episode(embedding=[1, i, 0])))
        self.assertEqual(len(self.client.recall("", [1, 0, 0]).memories), 10)

    def test_thresholds_and_numbers_of_results(self):
        for i in range(10):
            angle = i * math.pi / 18  # 0 to 90 degrees
            self.client.remember(self.space, f"{i}", [math.cos(angle), math.sin(angle)],
                                 encoding_confidence=m.Confidence(value=0.5))

        def found(cue, **fields):
            answer = self.client.Recall(
                s.RecallRequest(memory_space_id=self.space, cue=cue, **fields))
            return [int(memory.id) for memory in answer.memories]
        self.assertEqual(found(embedding_cue([1, 0])), list(range(10)))
        self.assertEqual(found(embedding_cue([1, 0], similarity_threshold=0.9)), [0, 1, 2])
        self.assertEqual(found(embedding_cue([1, 0], threshold=m.Confidence(value=0.45))),
                         [0, 1, 2])
        low = m.Confidence(category=m.CONFIDENCE_CATEGORY_LOW)  # 0.1: similarity of 0.2
        self.assertEqual(found(embedding_cue([1, 0], threshold=low)), list(range(8)))
        self.assertEqual(found(embedding_cue([1, 0], max_results=2)), [0, 1])
        self.assertEqual(found(embedding_cue([1, 0]), max_results=3), [0, 1, 2])
        self.assertEqual(found(embedding_cue([1, 0], max_results=2), max_results=3), [0, 1])
        self.assertEqual(found(embedding_cue([1, 0], max_results=4), max_results=3), [0, 1, 2])
        self.assertEqual(found(embedding_cue([1, 0]), ef_search=500, max_results=1000),
                         list(range(10)))

    def test_remember_replaces_and_forget_removes(self):
        for mode in (s.FORGET_MODE_UNSPECIFIED, s.FORGET_MODE_DELETE, s.FORGET_MODE_OVERWRITE):
            self.assertFalse(self.client.remember(self.space, "a", [1, 0], what="old").existed)
            self.assertTrue(self.client.remember(self.space, "a", [0, 1], what="new").existed)
            self.client.remember(self.space, "b", [1, 1])
            found = self.client.recall(self.space, [0, 1]).memories
            self.assertEqual([memory.id for memory in found], ["a", "b"])
            self.assertEqual(found[0].content, "new")
            request = s.ForgetRequest(memory_space_id=self.space, memory_id="a", mode=mode)
            done = self.client.Forget(request)
            self.assertEqual((done.memories_affected, done.reversible), (1, False))
            self.assertEqual(done.forget_confidence.value, 1)
            found = self.client.recall(self.space, [0, 1]).memories
            self.assertEqual([memory.id for memory in found], ["b"])
            self.assertEqual(self.client.get(self.space, "a"), [])
            self.assertEqual(self.client.Forget(request).memories_affected, 0)

    def test_suppress_is_refused_and_changes_nothing(self):
        self.client.remember(self.space, "a", [1, 0])
        self.assert_fails(
            UNIMPLEMENTED,
            "mode: FORGET_MODE_SUPPRESS is not served yet, and nothing was hidden or removed; "
            "FORGET_MODE_DELETE removes the memory for good",
            self.client.Forget, s.ForgetRequest(memory_space_id=self.space, memory_id="a",
                                                mode=s.FORGET_MODE_SUPPRESS))
        self.assertEqual([memory.id for memory in self.client.get(self.space, "a")], ["a"])

    def test_get_by_ids_in_their_order(self):
        for i in range(100):
            self.client.remember(self.space, f"m{i}", [1, i])
        ids = [f"m{i}" for i in range(99, -1, -1)]
        ids[10] = "nobody"
        memories = self.client.get(self.space, *ids, include_embedding=True)
        ids.remove("nobody")
        self.assertEqual([memory.id for memory in memories], ids)
        self.assertEqual(len(memories[0].embedding), 2)
        self.assertEqual([memory.id for memory in self.client.get(self.space, "m1", "m1")],
                         ["m1", "m1"])

    def test_scroll_hands_out_all_once(self):
        for i in range(300):
            self.client.remember(self.space, f"m{i}", [1, i], what=f"{i}")
        for limit in (7, 0, 1000):
            seen = []
            request = s.RecallRequest(memory_space_id=self.space, scroll=s.ScrollRequest(
                limit=limit))
            while True:
                page = self.client.Recall(request)
                seen += [memory.id for memory in page.memories]
                if not page.next_cursor:
                    break
                self.assertGreater(len(page.memories), 0)
                request.scroll.cursor = page.next_cursor
            self.assertEqual(len(seen), 300)
            self.assertEqual(set(seen), {f"m{i}" for i in range(300)})

    def test_a_space_that_nobody_wrote_to_is_empty(self):
        self.assertEqual(len(self.client.recall(self.space, [1, 0]).memories), 0)
        self.assertEqual(self.client.get(self.space, "a"), [])
        page = self.client.Recall(s.RecallRequest(memory_space_id=self.space,
                                                  scroll=s.ScrollRequest()))
        self.assertEqual((len(page.memories), page.next_cursor), (0, ""))
        done = self.client.Forget(s.ForgetRequest(memory_space_id=self.space, memory_id="a"))
        self.assertEqual(done.memories_affected, 0)
        statistics = self.client.Introspect(s.IntrospectRequest(
            memory_space_id=self.space, include_statistics=True)).statistics
        self.assertEqual(statistics.total_memories, 0)

    def test_a_snapshot_has_its_stamp(self):
        self.client.remember(self.space, "a", [1, 0])
        answer = self.client.recall(self.space, [1, 0], snapshot_isolation=True)
        self.assertEqual([memory.id for memory in answer.memories], ["a"])
        self.assertGreater(answer.snapshot_sequence, 0)
        self.assertEqual(self.client.recall(self.space, [1, 0]).snapshot_sequence, 0)


class Errors(GrpcCase):
    def test_remember(self):
        self.client.remember(self.space, "a", [1, 2, 3])
        nan, infinity = float("nan"), float("inf")

        def episode(**fields):
            return {"episode": m.Episode(**{"id": "b", "embedding": [1, 2, 3], **fields})}
        for text, fields in (
                ("memory_type: not set; expected memory or episode", {}),
                (f'episode.embedding: 2 values; the space "{self.space}" has dimension 3',
                 episode(embedding=[1, 2])),
                (f'memory.embedding: 4 values; the space "{self.space}" has dimension 3',
                 {"memory": m.Memory(embedding=[1, 2, 3, 4])}),
                ("episode.embedding: 0 values; expected 1 to 4096", episode(embedding=[])),
                ("episode.embedding: 4097 values; expected 1 to 4096",
                 episode(embedding=[1] * 4097)),
                ("episode.embedding[1]: nan; expected finite numbers",
                 episode(embedding=[1, nan, 3])),
                ("episode.embedding[2]: -inf; expected finite numbers",
                 episode(embedding=[1, 2, -infinity])),
                (f'episode.embedding: all 3 values are 0; the space "{self.space}" compares '
                 "directions (cosine) and needs one that is not", episode(embedding=[0, 0, 0])),
                ("episode.id: 257 bytes; expected 1 to 256", episode(id="x" * 257)),
                ("episode: 65540 bytes besides id and embedding; expected up to 65536",
                 episode(what="x" * 65536)),
                ("episode.encoding_confidence.value: 1.5; expected 0 to 1",
                 episode(encoding_confidence=m.Confidence(value=1.5))),
                ("memory.confidence.value: nan; expected 0 to 1",
                 {"memory": m.Memory(embedding=[1, 2, 3], confidence=m.Confidence(value=nan))}),
                ("episode.when: 1 s and -1 ns; expected a time of the years 1678 to 2261, with 0 "
                 "to 999999999 ns", episode(when=Timestamp(seconds=1, nanos=-1))),
                ("memory.created_at: 99999999999 s and 0 ns; expected a time of the years 1678 to "
                 "2261, with 0 to 999999999 ns",
                 {"memory": m.Memory(embedding=[1], created_at=Timestamp(seconds=99999999999))})):
            with self.subTest(text):
                self.assert_fails(INVALID, text, self.client.Remember,
                                  s.RememberRequest(memory_space_id=self.space, **fields))
        page = self.client.Recall(s.RecallRequest(memory_space_id=self.space,
                                                  scroll=s.ScrollRequest()))
        self.assertEqual([memory.id for memory in page.memories], ["a"])

    def test_recall(self):
        self.client.remember(self.space, "a", [1, 2, 3])
        served = "; this appliance recalls by cue.embedding (or by ids or scroll)"
        cue = embedding_cue([1, 2, 3])
        for text, fields in (
                ("cue: not set; expected cue, ids or scroll", {}),
                ("cue, ids, scroll: more than one is set; expected one of them",
                 {"cue": cue, "ids": ["a"]}),
                ("cue.cue_type: not set" + served, {"cue": m.Cue(id="x")}),
                ("cue.cue_type: context" + served, {"cue": m.Cue(context=m.ContextCue())}),
                ("cue.cue_type: temporal" + served, {"cue": m.Cue(temporal=m.TemporalCue())}),
                ("cue.cue_type: semantic" + served,
                 {"cue": m.Cue(semantic=m.SemanticCue(query="x"))}),
                ("cue.cue_type: pattern" + served, {"cue": m.Cue(pattern=m.PatternCue())}),
                (f'cue.embedding.vector: 2 values; the space "{self.space}" has dimension 3',
                 {"cue": embedding_cue([1, 2])}),
                ("cue.embedding.vector: 0 values; expected 1 to 4096", {"cue": embedding_cue([])}),
                ("cue.embedding.vector[0]: inf; expected finite numbers",
                 {"cue": embedding_cue([float("inf"), 1, 2])}),
                (f'cue.embedding.vector: all 3 values are 0; the space "{self.space}" compares '
                 "directions (cosine) and needs one that is not", {"cue": embedding_cue([0] * 3)}),
                ("max_results: 1001; expected 0 to 1000", {"cue": cue, "max_results": 1001}),
                ("max_results: -1; expected 0 to 1000", {"cue": cue, "max_results": -1}),
                ("cue.max_results: -7; expected 0 to 1000",
                 {"cue": embedding_cue([1, 2, 3], max_results=-7)}),
                ("cue.threshold.value: -0.5; expected 0 to 1",
                 {"cue": embedding_cue([1, 2, 3], threshold=m.Confidence(value=-0.5))}),
                ("cue.embedding.similarity_threshold: nan; expected a finite number",
                 {"cue": embedding_cue([1, 2, 3], similarity_threshold=float("nan"))}),
                ("ef_search: 10001; expected 0 to 10000", {"cue": cue, "ef_search": 10001}),
                ("ids: 101 ids; expected up to 100", {"ids": ["a"] * 101}),
                ("ids[1]: empty; expected 1 to 256 bytes", {"ids": ["a", ""]}),
                ("scroll.limit: 1001; expected 0 to 1000",
                 {"scroll": s.ScrollRequest(limit=1001)}),
                ('scroll.cursor: "yesterday"; expected next_cursor of the page before, or nothing',
                 {"scroll": s.ScrollRequest(cursor="yesterday")})):
            with self.subTest(text):
                self.assert_fails(INVALID, text, self.client.Recall,
                                  s.RecallRequest(memory_space_id=self.space, **fields))

    def test_forget(self):
        for text, fields in (
                ("target: not set; expected memory_id", {}),
                ("pattern: set; this appliance forgets by memory_id", {"pattern": m.Cue(id="x")}),
                ("memory_id: empty; expected 1 to 256 bytes", {"memory_id": ""}),
                ("memory_id: 300 bytes; expected 1 to 256", {"memory_id": "x" * 300}),
                ("mode: 9; expected FORGET_MODE_DELETE or FORGET_MODE_OVERWRITE",
                 {"memory_id": "a", "mode": 9})):
            with self.subTest(text):
                self.assert_fails(INVALID, text, self.client.Forget,
                                  s.ForgetRequest(memory_space_id=self.space, **fields))

    def test_space_names_on_every_call(self):
        calls = (
            (self.client.Remember,
             lambda name: s.RememberRequest(memory_space_id=name,
                                            episode=m.Episode(embedding=[1]))),
            (self.client.Recall,
             lambda name: s.RecallRequest(memory_space_id=name, cue=embedding_cue([1]))),
            (self.client.Forget, lambda name: s.ForgetRequest(memory_space_id=name, memory_id="a")),
            (self.client.Introspect, lambda name: s.IntrospectRequest(memory_space_id=name)))
        for call, request in calls:
            for name in ("With Capitals", "x" * 65, "dot.dot", "ü"):
                shown = name if len(name) <= 64 else "x" * 64 + "..."
                self.assert_fails(
                    INVALID, f'memory_space_id: "{shown}"; expected 1 to 64 of [a-z0-9_-]', call,
                    request(name))
            self.assert_fails(
                INVALID, 'x-memory-space: "other"; the request\'s memory_space_id is "one"', call,
                request("one"), metadata=[("x-memory-space", "other")])
            self.assert_fails(
                INVALID, 'x-memory-space: "NO"; expected 1 to 64 of [a-z0-9_-]', call, request(""),
                metadata=[("x-memory-space", "NO")])
            self.assert_fails(
                INVALID, "x-memory-space: given twice with different values; expected one space",
                call, request(""), metadata=[("x-memory-space", "a"), ("x-memory-space", "b")])

    def test_metadata_names_the_space(self):
        metadata = [("x-memory-space", self.space)]
        self.client.Remember(s.RememberRequest(episode=m.Episode(id="a", embedding=[1])),
                             metadata=metadata)
        self.client.Remember(s.RememberRequest(
            memory_space_id=self.space, episode=m.Episode(id="b", embedding=[1])),
            metadata=metadata)
        self.assertEqual(len(self.client.get(self.space, "a", "b")), 2)

    def test_a_request_that_is_too_large(self):
        with self.assertRaises(grpc.RpcError) as caught:
            self.client.remember(self.space, "a", [1], what="x" * (5 << 20))
        self.assertEqual(caught.exception.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)

    def test_what_is_not_served_says_so(self):
        def text(method):
            return (f"{method} is not served: this appliance serves Engram's streaming API, of "
                    "which this version has Remember, Recall, Forget and Introspect")
        none = iter([])
        for method, call in (
                ("ObserveStream", lambda: list(self.client.ObserveStream(none))),
                ("MemoryStream", lambda: list(self.client.MemoryStream(none))),
                ("RecallStream", lambda: list(self.client.RecallStream(
                    s.StreamingRecallRequest()))),
                ("Stream", lambda: list(self.client.Stream(s.StreamRequest())))):
            self.assert_fails(UNIMPLEMENTED, text(method), call)
        for method in ("/engram.v1.EngramService/Consolidate", "/engram.v1.EngramService/Dream",
                       "/elsewhere.Service/Call"):
            call = self.client.channel.unary_unary(method)
            self.assert_fails(UNIMPLEMENTED, text(method), call, b"\x0a\x01x",
                              timeout=CALL_DEADLINE_S)


class Surroundings(GrpcCase):
    def test_introspect(self):
        for i in range(30):
            self.client.remember(self.space, f"m{i}", [1, i])
        self.client.remember(self.space + "2", "x", [1])
        answer = self.client.Introspect(s.IntrospectRequest(
            memory_space_id=self.space, include_health=True, include_statistics=True))
        self.assertEqual(answer.statistics.total_memories, 30)
        self.assertEqual(answer.metrics["space.observations"], 30)
        self.assertEqual(answer.metrics["space.dimension"], 2)
        self.assertGreaterEqual(answer.metrics["gateway.calls_answered"], 31)
        self.assertTrue(answer.health.healthy)
        self.assertEqual(answer.health.summary, "all shards answer")
        self.assertTrue(answer.health.components["gateway"].operational)
        self.assertTrue(answer.health.components["shard0"].operational)
        snapshot = json.loads(answer.metrics_snapshot_json)
        self.assertEqual(snapshot["space.observations"], 30)
        self.assertEqual(snapshot.keys(), answer.metrics.keys())
        bare = self.client.Introspect(s.IntrospectRequest(
            memory_space_id=self.space, metrics=["space.observations", "no.such"]))
        self.assertEqual(dict(bare.metrics), {"space.observations": 30})
        self.assertFalse(bare.HasField("health") or bare.HasField("statistics"))

    def test_health(self):
        """grpc.health.v1, spoken by hand: Debian has no Python package of it."""
        check = self.client.channel.unary_unary("/grpc.health.v1.Health/Check")
        serving = b"\x08\x01"
        for service in (b"", b"engram.v1.EngramService"):
            request = b"\x0a" + bytes([len(service)]) + service if service else b""
            self.assertEqual(check(request, timeout=CALL_DEADLINE_S), serving)
        with self.assertRaises(grpc.RpcError) as caught:
            check(b"\x0a\x04nope", timeout=CALL_DEADLINE_S)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.NOT_FOUND)

    def test_reflection(self):
        """grpc.reflection.v1alpha, likewise: the service's file is what we compiled."""
        call = self.client.channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        name = b"engram.v1.EngramService"
        listing, by_symbol = call(iter([b"\x3a\x00", b"\x22" + bytes([len(name)]) + name]),
                                  timeout=CALL_DEADLINE_S)
        self.assertIn(name, listing)
        self.assertIn(b"grpc.health.v1.Health", listing)
        file = descriptor_pb2.FileDescriptorProto()
        s.DESCRIPTOR.CopyToProto(file)
        self.assertIn(file.service[0].SerializeToString(), by_symbol)

    def test_64_callers_at_once(self):
        generator = random.Random(9)
        rows = [[(f"c{c}-{i}", direction(generator, 8)) for i in range(25)] for c in range(64)]

        def caller(row):
            client = Client(self.daemon)
            with contextlib.closing(client):
                for identity, vector in row:
                    client.remember(self.space, identity, vector)
                    found = client.recall(self.space, vector, max_results=3).memories
                    self.assertEqual(found[0].id, identity)
            return len(row)
        with futures.ThreadPoolExecutor(64) as pool:
            self.assertEqual(sum(pool.map(caller, rows)), 64 * 25)
        answer = self.client.Introspect(s.IntrospectRequest(memory_space_id=self.space,
                                                            include_statistics=True))
        self.assertEqual(answer.statistics.total_memories, 64 * 25)

    def test_cancelled_calls_leave_nothing_behind(self):
        """Cancelled at any moment of their way; every call that was started is accounted for."""
        self.client.remember(self.space, "a", [1, 0])
        request = s.RecallRequest(memory_space_id=self.space, cue=embedding_cue([1, 0]))
        for parity in (0, 1) * 10:
            calls = [self.client.stub.Recall.future(request, timeout=CALL_DEADLINE_S)
                     for _ in range(20)]
            for call in calls[parity::2]:
                call.cancel()
            for call in calls[1 - parity::2]:
                self.assertEqual(call.result().memories[0].id, "a")

    def test_a_deadline_that_cannot_be_kept(self):
        self.client.remember(self.space, "a", [1, 0])
        request = s.RecallRequest(memory_space_id=self.space, cue=embedding_cue([1, 0]))
        for timeout in (1e-6, 1e-4, 3e-4):
            for _ in range(20):
                try:
                    self.client.Recall(request, timeout=timeout)
                except grpc.RpcError as error:
                    self.assertEqual(error.code(), grpc.StatusCode.DEADLINE_EXCEEDED)
        self.assertEqual(self.client.recall(self.space, [1, 0]).memories[0].id, "a")

    def test_native_frames_and_grpc_see_the_same(self):
        with self.daemon.client(self.space, metric=frames.COSINE) as native:
            refused = native.observe([
                frames.record(b"text", [1.0, 0.0], payload="Grüße".encode()),
                frames.record(b"bytes", [0.0, 1.0], payload=b"\xff\x00\x80"),
                frames.record(b"\xfe\xff", [1.0, 1.0])])
            self.assertEqual(refused, [])
            native.close()
        text, binary = self.client.get(self.space, "text", "bytes")
        self.assertEqual((text.content, text.payload), ("Grüße", b""))
        self.assertEqual((binary.content, binary.payload), ("", b"\xff\x00\x80"))
        [odd] = self.client.recall(self.space, [1, 1], max_results=1).memories
        self.assertEqual((odd.id, odd.id_bytes), ("", b"\xfe\xff"))


class Start(unittest.TestCase):
    def test_off(self):
        with daemon.running({"listen.grpc": ""}) as running:
            self.assertNotIn("grpc: serving", running.log.text())

    def test_a_port_that_is_taken(self):
        with daemon.running({"listen.grpc": "127.0.0.1:0"}) as running:
            client = Client(running)
            with contextlib.closing(client):
                code, log = daemon.start_that_fails(daemon.toml({
                    "listen.tcp": "127.0.0.1:0", "listen.grpc": client.address,
                    "memory.limit_mib": 256}))
                self.assertEqual(code, 1, log)
                self.assertIn(f"listen.grpc: cannot listen on {client.address}: another program "
                              "has it, or this machine has no such address. Choose another, or "
                              '"" to switch gRPC off', log)
                client.remember("default", "a", [1])

    def test_stop_answers_every_call(self):
        """SIGTERM while calls come in: each is answered, or told that the server has gone."""
        running = daemon.Daemon({"listen.grpc": "127.0.0.1:0"})
        begun = threading.Semaphore(0)
        stored = []

        def caller(number):
            client = Client(running)
            with contextlib.closing(client):
                for i in range(1_000_000):
                    try:
                        client.remember("default", f"{number}-{i}", [1, i])
                    except grpc.RpcError as error:
                        return error.code()
                    stored.append(i)
                    if i == 10:
                        begun.release()
            return None
        with futures.ThreadPoolExecutor(8) as pool:
            callers = [pool.submit(caller, number) for number in range(8)]
            for _ in callers:
                self.assertTrue(begun.acquire(timeout=daemon.STOP_DEADLINE_S))
            running.terminate()
            codes = {call.result(daemon.STOP_DEADLINE_S) for call in callers}
        running.stop()
        # CANCELLED: it reached gRPC when that was gone already.
        self.assertLessEqual(codes, {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})
        self.assertGreaterEqual(len(stored), 8 * 11)


if __name__ == "__main__":
    daemon.main()
