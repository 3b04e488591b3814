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
import re
import subprocess
import sys
import tempfile
import threading
import unittest
from concurrent import futures

import daemon
import frames

sys.path.insert(0, os.environ.get("ENGRAM_PROTO_PYTHON") or
                str(daemon.ROOT / "build" / "release" / "src" / "proto"))
import grpc  # noqa: E402
from google.protobuf import descriptor_pb2  # noqa: E402
from google.protobuf.descriptor import FieldDescriptor  # noqa: E402
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


# Engram's messages and enums, as its clients know them: field, number, type. Unchangeable.
ENGRAM_API = """
RememberRequest: memory_space_id 1 string; memory 2 Memory in memory_type; episode 3 Episode in
  memory_type; auto_link 10 bool; link_threshold 11 float
RememberResponse: memory_id 1 string; storage_confidence 2 Confidence; linked_memories 3
  string[]; initial_state 4 ConsolidationState
RecallRequest: memory_space_id 1 string; cue 2 Cue; max_results 10 int32; include_metadata 11
  bool; trace_activation 12 bool
RecallResponse: memories 1 Memory[]; recall_confidence 2 Confidence; metadata 3 RecallMetadata;
  traces 4 ActivationTrace[]
ActivationTrace: memory_id 1 string; activation_level 2 float; activation_path 3 string[];
  timestamp 4 Timestamp
ForgetRequest: memory_space_id 1 string; memory_id 2 string in target; pattern 3 Cue in target;
  mode 10 ForgetMode
ForgetResponse: memories_affected 1 int32; forget_confidence 2 Confidence; reversible 3 bool
IntrospectRequest: memory_space_id 1 string; metrics 2 string[]; include_health 3 bool;
  include_statistics 4 bool
IntrospectResponse: metrics 1 map<string,float>; health 2 HealthStatus; statistics 3
  MemoryStatistics; active_processes 4 string[]; metrics_snapshot_json 5 string
HealthStatus: healthy 1 bool; components 2 map<string,ComponentHealth>; summary 3 string
ComponentHealth: operational 1 bool; performance 2 float; status_message 3 string
MemoryStatistics: total_memories 1 int64; by_type 2 map<string,int64>; avg_activation 3 float;
  avg_confidence 4 float; total_associations 5 int64; oldest_memory 6 Timestamp; newest_memory 7
  Timestamp
ObservationRequest: memory_space_id 1 string; init 2 StreamInit in operation; observation 3
  Episode in operation; flow 4 FlowControl in operation; close 5 StreamClose in operation;
  session_id 10 string; sequence_number 11 uint64
ObservationResponse: init_ack 1 StreamInitAck in result; ack 2 ObservationAck in result; status
  3 StreamStatus in result; session_id 10 string; sequence_number 11 uint64; server_timestamp 12
  Timestamp
StreamInit: client_buffer_size 1 uint32; enable_backpressure 2 bool; max_batch_size 3 uint32
StreamInitAck: session_id 1 string; initial_sequence 2 uint64; capabilities 3 StreamCapabilities
StreamCapabilities: max_observations_per_second 1 uint32; queue_capacity 2 uint32;
  supports_backpressure 3 bool; supports_snapshot_isolation 4 bool
ObservationAck: status 1 Status; memory_id 2 string; committed_at 3 Timestamp
ObservationAck.Status = STATUS_UNSPECIFIED STATUS_ACCEPTED STATUS_INDEXED STATUS_REJECTED
StreamStatus: state 1 State; message 2 string; queue_depth 3 uint32; queue_capacity 4 uint32;
  pressure 5 float
StreamStatus.State = STATE_UNSPECIFIED STATE_ACTIVE STATE_PAUSED STATE_BACKPRESSURE
  STATE_OVERLOADED STATE_ERROR STATE_CLOSED
StreamClose: drain_queue 1 bool; last_sequence 2 uint64
FlowControl: action 1 Action; buffer_remaining 2 int32; preferred_rate 3 float; reason 4 string
FlowControl.Action = ACTION_UNSPECIFIED ACTION_PAUSE ACTION_RESUME ACTION_SLOW_DOWN
  ACTION_SPEED_UP ACTION_BUFFER_STATUS
StreamingRecallRequest: memory_space_id 1 string; session_id 2 string; cue 3 Cue; max_results 4
  uint32; snapshot_isolation 5 bool; snapshot_time 6 Timestamp
StreamingRecallResponse: results 1 Memory[]; more_results 2 bool; metadata 3 RecallMetadata;
  snapshot_sequence 4 uint64
StreamRequest: memory_space_id 1 string; event_types 2 StreamEventType[]; min_importance 3 float
StreamResponse: event_type 1 StreamEventType; timestamp 2 Timestamp; description 3 string;
  metadata 4 map<string,string>; importance 5 float
ForgetMode = FORGET_MODE_UNSPECIFIED FORGET_MODE_SUPPRESS FORGET_MODE_DELETE
  FORGET_MODE_OVERWRITE
StreamEventType = STREAM_EVENT_TYPE_UNSPECIFIED STREAM_EVENT_TYPE_ACTIVATION
  STREAM_EVENT_TYPE_STORAGE STREAM_EVENT_TYPE_RECALL STREAM_EVENT_TYPE_CONSOLIDATION
  STREAM_EVENT_TYPE_ASSOCIATION STREAM_EVENT_TYPE_DECAY
Confidence: value 1 float; category 2 ConfidenceCategory; reasoning 3 string
Episode: id 1 string; when 2 Timestamp; what 3 string; embedding 4 float[]; encoding_confidence
  5 Confidence; where_location 10 string; who 11 string[]; why 12 string; how 13 string;
  decay_rate 20 float; emotional_valence 21 float; importance 22 float; consolidation_state 30
  ConsolidationState; last_replay 31 Timestamp
Memory: id 1 string; embedding 2 float[]; activation 3 float; confidence 4 Confidence;
  last_access 5 Timestamp; created_at 6 Timestamp; decay_rate 7 float; content 10 string;
  metadata 11 map<string,string>; tags 20 string[]; memory_type 21 MemoryType
Cue: id 1 string; embedding 2 EmbeddingCue in cue_type; context 3 ContextCue in cue_type;
  temporal 4 TemporalCue in cue_type; semantic 5 SemanticCue in cue_type; pattern 6 PatternCue
  in cue_type; threshold 10 Confidence; max_results 11 int32; spread_activation 12 bool;
  activation_decay 13 float
EmbeddingCue: vector 1 float[]; similarity_threshold 2 float
ContextCue: time_start 1 Timestamp; time_end 2 Timestamp; location 3 string; participants 4
  string[]
TemporalCue:
SemanticCue: query 1 string; fuzzy_threshold 2 float; required_tags 3 string[]; excluded_tags 4
  string[]
PatternCue:
RecallMetadata: total_activated 1 int32; above_threshold 2 int32; avg_activation 3 float;
  recall_time_ms 4 int64; activation_path 5 string[]
ConfidenceCategory = CONFIDENCE_CATEGORY_UNSPECIFIED CONFIDENCE_CATEGORY_NONE
  CONFIDENCE_CATEGORY_LOW CONFIDENCE_CATEGORY_MEDIUM CONFIDENCE_CATEGORY_HIGH
  CONFIDENCE_CATEGORY_CERTAIN
MemoryType = MEMORY_TYPE_UNSPECIFIED MEMORY_TYPE_EPISODIC MEMORY_TYPE_SEMANTIC
  MEMORY_TYPE_PROCEDURAL MEMORY_TYPE_WORKING
ConsolidationState = CONSOLIDATION_STATE_UNSPECIFIED CONSOLIDATION_STATE_RECENT
  CONSOLIDATION_STATE_CONSOLIDATING CONSOLIDATION_STATE_CONSOLIDATED
  CONSOLIDATION_STATE_RECONSOLIDATING
"""
ENGRAM_CALLS = {  # whether the request and the response are streams
    "Remember": (False, False), "Recall": (False, False), "Forget": (False, False),
    "Introspect": (False, False), "ObserveStream": (True, True), "RecallStream": (False, True),
    "MemoryStream": (True, True), "Stream": (False, True)}


def type_of(field):
    """A field's type, as ENGRAM_API writes it."""
    message, enum = field.message_type, field.enum_type
    if message and message.GetOptions().map_entry:
        return f"map<string,{type_of(message.fields_by_name['value'])}>"
    if message or enum:
        name = (message or enum).name
    else:
        name = next(key for key, value in vars(FieldDescriptor).items()
                    if key.startswith("TYPE_") and value == field.type)[5:].lower()
    if field.label == FieldDescriptor.LABEL_REPEATED:
        name += "[]"
    return name + (f" in {field.containing_oneof.name}" if field.containing_oneof else "")


def api_of(module):
    """What a module's messages and enums are, a line each; without what is the appliance's own."""
    def enum(name, descriptor):
        return f"{name} = " + " ".join(value.name for value in descriptor.values)
    for name, descriptor in module.DESCRIPTOR.message_types_by_name.items():
        yield f"{name}: " + "; ".join(f"{field.name} {field.number} {type_of(field)}"
                                      for field in descriptor.fields if field.number < 100)
        for inner in descriptor.enum_types:
            yield enum(f"{name}.{inner.name}", inner)
    for name, descriptor in module.DESCRIPTOR.enum_types_by_name.items():
        yield enum(name, descriptor)


class Contract(unittest.TestCase):
    def test_messages_are_those_that_engrams_clients_know(self):
        wanted = re.sub(r"\n ", "", ENGRAM_API).strip().split("\n")
        ours = {line.strip() for module in (s, m) for line in api_of(module)}
        self.assertEqual([line for line in wanted if line not in ours], [])

    def test_calls_are_those_that_engrams_clients_know(self):
        service = s.DESCRIPTOR.services_by_name["EngramService"]
        self.assertEqual(service.full_name, "engram.v1.EngramService")
        file = descriptor_pb2.FileDescriptorProto()
        s.DESCRIPTOR.CopyToProto(file)
        self.assertEqual({method.name: (method.client_streaming, method.server_streaming)
                          for method in file.service[0].method}, ENGRAM_CALLS)
        for method in service.methods:
            stem = {"ObserveStream": "Observation", "MemoryStream": "Observation",
                    "RecallStream": "StreamingRecall"}.get(method.name, method.name)
            self.assertEqual((method.input_type.name, method.output_type.name),
                             (stem + "Request", stem + "Response"))


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

    def health(self):
        return self.Introspect(s.IntrospectRequest(include_health=True)).health

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

    def test_suppress_hides_and_restore_brings_back(self):
        def forget(identity, mode=s.FORGET_MODE_SUPPRESS, **fields):
            done = self.client.Forget(s.ForgetRequest(
                memory_space_id=self.space, memory_id=identity, mode=mode, **fields))
            self.assertEqual(done.forget_confidence.value, 1)
            return done.memories_affected, done.reversible

        def found():
            """What a recall, a get, a scroll and a count have of "a" and "b"."""
            recalled = self.client.recall(self.space, [1, 0], include_embedding=True).memories
            got = self.client.get(self.space, "a", "b", include_embedding=True)
            scrolled = self.client.Recall(s.RecallRequest(
                memory_space_id=self.space, scroll=s.ScrollRequest())).memories
            count = self.client.Introspect(s.IntrospectRequest(
                memory_space_id=self.space, include_statistics=True)).statistics.total_memories
            self.assertEqual({memory.id for memory in recalled}, {memory.id for memory in got})
            self.assertEqual({memory.id for memory in scrolled}, {memory.id for memory in got})
            self.assertEqual(count, len(got))
            return {memory.id: (memory.content, list(memory.embedding), memory.tags[:],
                                memory.confidence.value, memory.created_at.seconds)
                    for memory in got}
        self.assertEqual(forget("a"), (0, False))  # Nobody has written to the space.
        self.client.Remember(s.RememberRequest(memory_space_id=self.space, memory=m.Memory(
            id="a", embedding=[0.6, 0.8], content="about a", tags=["x"],
            confidence=m.Confidence(value=0.5), created_at=Timestamp(seconds=77))))
        self.client.remember(self.space, "b", [0, 1], what="about b")
        before = found()
        self.assertEqual(set(before), {"a", "b"})
        for _ in range(2):
            self.assertEqual(forget("unknown"), (0, False))
            self.assertEqual(forget("a", restore=True), (0, False))
            self.assertEqual(forget("a"), (1, True))
            self.assertEqual(set(found()), {"b"})
            self.assertEqual(forget("a"), (0, False))
            self.assertEqual(forget("a", restore=True), (1, False))
            self.assertEqual(found(), before)
        # A Remember replaces what is hidden, and a delete removes it.
        self.assertEqual(forget("a"), (1, True))
        self.assertTrue(self.client.remember(self.space, "a", [1, 0], what="new").existed)
        self.assertEqual(found()["a"][0], "new")
        self.assertEqual(forget("a", restore=True), (0, False))
        for mode in (s.FORGET_MODE_DELETE, s.FORGET_MODE_OVERWRITE):
            self.assertEqual(forget("a"), (1, True))
            self.assertEqual(forget("a", mode), (1, False))
            self.assertEqual(forget("a", mode), (0, False))
            self.assertEqual(forget("a", restore=True), (0, False))
            self.assertEqual(set(found()), {"b"})
            self.assertFalse(self.client.remember(self.space, "a", [1, 0], what="again").existed)
            self.assertEqual(found()["a"][0], "again")

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
                ("episode.who[1]: 256 bytes; expected up to 255, as recalls filter by it",
                 episode(who=["Ada", "x" * 256])),
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
        served = "; this appliance recalls by cue.embedding or cue.context (or by ids or scroll)"
        cue = embedding_cue([1, 2, 3])
        for text, fields in (
                ("cue: not set; expected cue, ids or scroll", {}),
                ("cue, ids, scroll: more than one is set; expected one of them",
                 {"cue": cue, "ids": ["a"]}),
                ("cue.cue_type: not set" + served, {"cue": m.Cue(id="x")}),
                ("all_spaces: true; it needs cue.embedding",
                 {"cue": m.Cue(context=m.ContextCue()), "all_spaces": True}),
                ("filter: set without a cue; this appliance filters what cue.embedding finds",
                 {"filter": m.Filter(required_tags=["x"])}),
                ('filter.metadata[0].key: "color"; the space filters by who, where_location, '
                 "memory_type, source, category; list it in filter_keys of the configuration",
                 {"cue": cue, "filter": m.Filter(metadata=[
                     m.MetadataCondition(key="color", values=["red"])])}),
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
                ("mode: 9; expected FORGET_MODE_SUPPRESS, FORGET_MODE_DELETE or "
                 "FORGET_MODE_OVERWRITE", {"memory_id": "a", "mode": 9}),
                ("restore: true with mode FORGET_MODE_UNSPECIFIED; expected mode "
                 "FORGET_MODE_SUPPRESS with it", {"memory_id": "a", "restore": True}),
                ("restore: true with mode FORGET_MODE_DELETE; expected mode "
                 "FORGET_MODE_SUPPRESS with it",
                 {"memory_id": "a", "mode": s.FORGET_MODE_DELETE, "restore": True})):
            with self.subTest(text):
                self.assert_fails(INVALID, text, self.client.Forget,
                                  s.ForgetRequest(memory_space_id=self.space, **fields))

    def test_bytes_that_are_no_request(self):
        def raw(method):
            call = self.client.channel.unary_unary(f"/engram.v1.EngramService/{method}")
            return lambda request: call(request, timeout=CALL_DEADLINE_S)
        for method in ("Remember", "Recall", "Forget", "Introspect"):
            of = f" (as engram.v1.{method}Request)"
            self.assert_fails(INVALID, "tag: no number of a field; expected a field as protobuf "
                              "writes it" + of, raw(method), b"\xff\xff\xff")
            self.assert_fails(
                INVALID, "memory_space_id: byte 1 is 0xff, which is no UTF-8 there; expected text "
                "in UTF-8" + of, raw(method), b"\x0a\x02a\xff")
        self.assert_fails(
            INVALID, "episode.who[1]: byte 0 is 0x80, which is no UTF-8 there; expected text in "
            "UTF-8 (as engram.v1.RememberRequest)", raw("Remember"),
            b"\x1a\x08\x5a\x03Ada\x5a\x01\x80")
        self.assertNotIn("libprotobuf", self.daemon.log.text())

    def test_what_is_only_kept(self):
        for text, fields in (
                ("episode.importance: inf; expected a finite number", {"importance": math.inf}),
                ("episode.last_replay: 0 s and -5 ns; expected a time of the years 1678 to 2261, "
                 "with 0 to 999999999 ns", {"last_replay": Timestamp(nanos=-5)}),
                ("episode.consolidation_state: 55; expected a ConsolidationState, 0 to 4",
                 {"consolidation_state": 55}),
                ("episode.encoding_confidence.category: 77; expected a ConfidenceCategory, 0 to 5",
                 {"encoding_confidence": m.Confidence(category=77)})):
            episode = m.Episode(embedding=[1], **{key: value for key, value in fields.items()
                                                  if not isinstance(value, int)})
            for key, value in fields.items():
                if isinstance(value, int):
                    setattr(episode, key, value)
            self.assert_fails(INVALID, text, self.client.Remember,
                              s.RememberRequest(memory_space_id=self.space, episode=episode))

    def test_introspect(self):
        self.assert_fails(INVALID, "metrics: 1001 names; expected up to 1000",
                          self.client.Introspect, s.IntrospectRequest(metrics=["x"] * 1001))

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
        empty = ("x-memory-space", "")
        for with_empty in ([*metadata, empty], [empty, *metadata]):
            self.client.Remember(s.RememberRequest(episode=m.Episode(id="c", embedding=[1])),
                                 metadata=with_empty)
        self.assertEqual(len(self.client.get(self.space, "a", "b", "c")), 3)

    def test_a_request_that_is_too_large(self):
        with self.assertRaises(grpc.RpcError) as caught:
            self.client.remember(self.space, "a", [1], what="x" * (5 << 20))
        self.assertEqual(caught.exception.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)

    def test_what_is_not_served_says_so(self):
        def text(method):
            return (f"{method} is not served: this appliance serves Engram's streaming API, of "
                    "which this version has Remember, Recall, Forget, Introspect, ObserveStream, "
                    "MemoryStream and RecallStream")
        self.assert_fails(UNIMPLEMENTED, text("Stream"),
                          lambda: list(self.client.Stream(s.StreamRequest())))
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

    def test_a_client_that_is_killed(self):
        """With calls under way and answers that it did not read; tearDown looks what is left."""
        for i in range(40):
            self.client.remember(self.space, f"{i}", [1, i], what="x" * 60_000)
        program = (
            "from grpc_test import *\n"
            "channel = grpc.insecure_channel(sys.argv[1])\n"
            "request = s.RecallRequest(memory_space_id=sys.argv[2], scroll=s.ScrollRequest())\n"
            "calls = [service_pb2_grpc.EngramServiceStub(channel).Recall.future(request)\n"
            "         for _ in range(60)]\n"
            "calls[0].result()\n"
            "print('under way', flush=True)\n"
            "threading.Event().wait()\n")
        for _ in range(3):
            with subprocess.Popen(
                    [sys.executable, "-c", program, self.client.address, self.space],
                    cwd=os.path.dirname(os.path.abspath(__file__)), stdout=subprocess.PIPE,
                    text=True) as process:
                self.assertEqual(process.stdout.readline(), "under way\n")
                process.kill()
        self.assertEqual(self.client.get(self.space, "7")[0].content, "x" * 60_000)

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


    def test_a_native_payload_says_what_it_is(self):
        episode = m.Episode(what="seen natively", who=["ann", "bob"])
        memory = m.Memory(content="known natively", tags=["red"])
        with self.daemon.client(self.space, metric=frames.COSINE) as native:
            refused = native.observe([
                frames.record(b"episode", [1.0, 0.0], payload=episode.SerializeToString()),
                frames.record(b"no episode", [0.0, 1.0], payload=b"\x1a\xff")],
                payload_kind=frames.EPISODE)
            refused += native.observe([
                frames.record(b"memory", [-1.0, 0.0], payload=memory.SerializeToString()),
                frames.record(b"no memory", [0.0, -1.0], payload=b"\x52\x01\xff")],
                payload_kind=frames.MEMORY)
            self.assertEqual(refused, [])
            kinds = {hit.id: hit.payload_kind for hit in native.recall([1.0, 0.0], k=4)}
            native.close()
        self.assertEqual(kinds, {b"episode": 1, b"no episode": 1, b"memory": 2, b"no memory": 2})
        seen, known = self.client.get(self.space, "episode", "memory")
        self.assertEqual((seen.content, seen.metadata["who"]), ("seen natively", "ann, bob"))
        self.assertEqual((known.content, list(known.tags)), ("known natively", ["red"]))
        for text, payload in (("no episode", b"\x1a\xff"), ("no memory", b"\x52\x01\xff")):
            [odd] = self.client.get(self.space, text)
            self.assertEqual((odd.content, odd.payload), ("", payload))
        found = self.client.recall(self.space, [1, 0], max_results=4).memories
        self.assertEqual(len(found), 4, "what cannot be read does not fail a recall")


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

    def test_what_the_readme_shows(self):
        """Word for word, at the default address, which the configuration does not name."""
        readme = (daemon.ROOT / "README.md").read_text()
        program, shown = re.search(r"```python\n(.*?)```.*?```\n(.*?)```", readme, re.S).groups()
        with tempfile.TemporaryDirectory(prefix="engramd-test-") as directory:
            config = daemon.toml({"listen.tcp": "127.0.0.1:0", "data.directory": directory,
                                  "memory.limit_mib": 256})
            try:
                running = daemon.Daemon(config_text=config)
            except RuntimeError as error:
                if "listen.grpc: cannot listen on 127.0.0.1:50051" in str(error):
                    self.skipTest("another program has 127.0.0.1:50051")
                raise
            done = subprocess.run(
                [sys.executable, "-c", program], capture_output=True, text=True, check=False,
                timeout=CALL_DEADLINE_S,
                env={**os.environ, "PYTHONPATH": os.environ["ENGRAM_PROTO_PYTHON"]})
            running.stop()
        self.assertEqual((done.stderr, done.stdout), ("", shown))

    def test_full_memory_says_when_to_call_again(self):
        with daemon.running({"listen.grpc": "127.0.0.1:0", "memory.limit_mib": 64}) as running:
            client = Client(running)
            with contextlib.closing(client):
                vector = [1.0] * 4096
                with self.assertRaises(grpc.RpcError) as caught:
                    for i in range(20_000):
                        vector[i % 4096] += 1
                        client.remember("default", f"{i}", vector, what="x" * 60_000)
                error = caught.exception
                self.assertEqual(error.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)
                self.assertRegex(error.details(), "^memory_full: .*; call again in [0-9]+ ms$")
                trailers = dict(error.trailing_metadata())
                status = error_details_pb2.RpcStatus.FromString(
                    trailers["grpc-status-details-bin"])
                self.assertEqual((status.code, status.message),
                                 (error.code().value[0], error.details()))
                [detail] = status.details
                self.assertEqual(detail.type_url, "type.googleapis.com/google.rpc.RetryInfo")
                delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
                told_ms = int(re.search("in ([0-9]+) ms", error.details())[1])
                self.assertEqual(delay.ToMilliseconds(), told_ms)
                self.assertGreater(told_ms, 0)
                # What is there is found still.
                self.assertEqual(client.get("default", "0")[0].id, "0")

    def test_health_tells_of_a_damaged_record(self):
        """A balancer leaves it in its place, as recalls are answered."""
        running = daemon.Daemon({"listen.grpc": "127.0.0.1:0"})
        client = Client(running)
        with contextlib.closing(client):
            text = "find me in the segment"
            client.remember("default", "x", [1, 2], what=text)
            segment = running.path / "data" / "log-000" / "segment-00000001.log"
            place = segment.read_bytes().index(text.encode())
            with segment.open("r+b") as file:
                file.seek(place)
                file.write(b"lose")
            self.assertTrue(client.health().healthy)
            client.get("default", "x")
            daemon.wait_until(lambda: not client.health().healthy, "the damage is told")
            health = client.health()
            self.assertFalse(health.components["control"].operational)
            self.assertIn("control: 1 damaged place", health.summary)
            self.assertTrue(running.log.wait_for(
                r"\[error\] log-000/segment-00000001\.log is damaged at offset", 30))
            self.assertEqual(client.channel.unary_unary("/grpc.health.v1.Health/Check")(
                b"", timeout=CALL_DEADLINE_S), b"\x08\x01", "SERVING")
        running.stop()

    def test_health_says_that_the_server_goes(self):
        """A balancer that watches hears it before the port is gone."""
        running = daemon.Daemon({"listen.grpc": "127.0.0.1:0"})
        client = Client(running)
        with contextlib.closing(client):
            watch = client.channel.unary_stream("/grpc.health.v1.Health/Watch")(
                b"\x0a\x17engram.v1.EngramService", timeout=CALL_DEADLINE_S)
            self.assertEqual(next(watch), b"\x08\x01", "SERVING")
            running.terminate()
            self.assertEqual(next(watch), b"\x08\x02", "NOT_SERVING")
            with self.assertRaises(grpc.RpcError):
                next(watch)
        running.stop()

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
