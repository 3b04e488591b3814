#!/usr/bin/python3
"""Engram's streams over gRPC: ObserveStream, MemoryStream, RecallStream.

Not through env: another Python in PATH has no grpcio.
"""

import queue
import random
import struct
import threading

import daemon
import grpc
import grpc_test
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_test import DIMENSION, INVALID, direction, embedding_cue, m, s

ACCEPTED = s.ObservationAck.STATUS_ACCEPTED
REJECTED = s.ObservationAck.STATUS_REJECTED
WAIT_S = 60


class Stream:
    """One stream of observations: requests go out as they are sent, responses are read in turn."""

    _END = object()

    def __init__(self, client, method="ObserveStream", metadata=None):
        self._requests = queue.Queue()
        self._responses = getattr(client.stub, method)(
            iter(self._requests.get, self._END), metadata=metadata)
        self.session = ""
        self.initial = 0

    def send(self, **fields):
        self._requests.put(s.ObservationRequest(**fields))

    def receive(self):
        return next(self._responses)

    def open(self, space, session="", **init):
        self.send(memory_space_id=space, session_id=session, init=s.StreamInit(**init))
        response = self.receive()
        assert response.WhichOneof("result") == "init_ack", response
        self.session = response.init_ack.session_id
        self.initial = response.init_ack.initial_sequence
        assert response.session_id == self.session
        self.capabilities = response.init_ack.capabilities
        return self

    def observe(self, sequence, identity, vector, **fields):
        self.send(sequence_number=sequence,
                  observation=m.Episode(id=identity, embedding=vector, **fields))

    def ack(self):
        """The next response, which is an ack: (sequence, status, memory id)."""
        response = self.receive()
        assert response.WhichOneof("result") == "ack", response
        return response.sequence_number, response.ack.status, response.ack.memory_id

    def status(self):
        response = self.receive()
        assert response.WhichOneof("result") == "status", response
        return response.status

    def refusal(self):
        """The next two responses, which refuse an observation: (sequence, status message)."""
        sequence, status, _ = self.ack()
        assert status == REJECTED, (sequence, status)
        return sequence, self.status()

    def end(self):
        """Nothing more is sent; what is left is received."""
        self._requests.put(self._END)
        return list(self._responses)

    def failure(self):
        """The status that ends the stream, once all else is read: (code, details)."""
        try:
            while True:
                self.receive()
        except grpc.RpcError as error:
            return error.code(), error.details()
        except StopIteration:
            return grpc.StatusCode.OK, ""

    def cancel(self):
        self._responses.cancel()
        self._requests.put(self._END)


class StreamCase(grpc_test.GrpcCase):
    def stream(self, method="ObserveStream", **options):
        return Stream(self.client, method, **options)

    def observe_all(self, stream, vectors, first=1):
        """Sends while acks are read; returns the acks."""
        def send():
            for i, (identity, vector) in enumerate(vectors.items()):
                stream.observe(first + i, identity, vector, what=f"this is {identity}")
        sender = threading.Thread(target=send)
        sender.start()
        acks = [stream.ack() for _ in vectors]
        sender.join()
        return acks

    def vectors(self, count, seed=1, prefix="o"):
        generator = random.Random(seed)
        return {f"{prefix}{i}": direction(generator) for i in range(count)}


class Observing(StreamCase):
    def test_thousands_are_acked_in_order_and_recalled(self):
        vectors = self.vectors(2000)
        stream = self.stream().open(self.space)
        self.assertEqual(stream.initial, 0)
        self.assertGreater(stream.capabilities.queue_capacity, 0)
        self.assertTrue(stream.capabilities.supports_snapshot_isolation)
        self.assertEqual(stream.capabilities.protocol_version, 1)
        acks = self.observe_all(stream, vectors)
        self.assertEqual(acks, [(i + 1, ACCEPTED, f"o{i}") for i in range(2000)])
        for identity in random.Random(2).sample(list(vectors), 100):
            found = self.client.recall(self.space, vectors[identity], max_results=1).memories[0]
            self.assertEqual((found.id, found.content), (identity, f"this is {identity}"))
        self.assertEqual(stream.end(), [])
        self.assertEqual(stream.failure(), (grpc.StatusCode.OK, ""))

    def test_close_tells_the_last_number(self):
        stream = self.stream().open(self.space)
        self.observe_all(stream, self.vectors(5))
        stream.send(close=s.StreamClose())
        response = stream.receive()
        self.assertEqual(response.status.state, s.StreamStatus.STATE_CLOSED)
        self.assertEqual(response.sequence_number, 5)
        self.assertEqual(stream.failure(), (grpc.StatusCode.OK, ""))

    def test_what_is_wrong_uses_its_number_up(self):
        good = direction(random.Random(1))
        for version in (0, 1):
            with self.subTest(version=version):
                space = f"{self.space}-{version}"
                stream = self.stream().open(space, protocol_version=version)
                stream.observe(1, "first", good)
                self.assertEqual(stream.ack(), (1, ACCEPTED, "first"))
                stream.observe(2, "bad", good[1:])
                stream.observe(3, "nan", [float("nan")] + good[1:])
                stream.observe(4, "zero", [0.0] * DIMENSION)
                stream.observe(5, "long" * 100, good)
                stream.observe(6, "sure", good, encoding_confidence=m.Confidence(value=2))
                stream.observe(7, "last", good)
                expected = [
                    ("wrong_dimension", "episode.embedding: .*got 63, expected 64"),
                    ("not_finite", "episode.embedding: "), ("zero_vector", "episode.embedding: "),
                    ("bad_field", "^episode.id: 400 bytes; expected 1 to 256$"),
                    ("bad_field", "^episode.encoding_confidence.value: 2; expected 0 to 1$")]
                for i, (code, message) in enumerate(expected):
                    sequence, status = stream.refusal()
                    self.assertEqual((sequence, status.code), (2 + i, code))
                    self.assertEqual(status.state, s.StreamStatus.STATE_ERROR)
                    self.assertRegex(status.message, message)
                    self.assertEqual(status.expected_sequence, sequence + 1)
                self.assertEqual(stream.ack(), (7, ACCEPTED, "last"))
                stream.end()
                again = self.stream().open(space, session=stream.session)
                self.assertEqual(again.initial, 7)
                again.end()

    def test_gaps_and_repeats(self):
        vectors = list(self.vectors(6).values())
        for version in (0, 1):
            with self.subTest(version=version):
                stream = self.stream().open(f"{self.space}-{version}", protocol_version=version)
                stream.observe(1, "a", vectors[0])
                self.assertEqual(stream.ack(), (1, ACCEPTED, "a"))
                stream.observe(3, "c", vectors[2])
                stream.observe(4, "d", vectors[3])
                # Who goes back hears of the gap once.
                for sequence in (3, 4) if version == 0 else (3,):
                    told, status = stream.refusal()
                    self.assertEqual((told, status.code, status.expected_sequence),
                                     (sequence, "sequence_gap", 2))
                stream.observe(2, "b", vectors[1])
                self.assertEqual(stream.ack(), (2, ACCEPTED, "b"))
                stream.observe(1, "other", vectors[5])
                self.assertEqual(stream.ack()[:2], (1, ACCEPTED))
                stream.observe(3, "c", vectors[2])
                self.assertEqual(stream.ack(), (3, ACCEPTED, "c"))
                self.assertEqual(stream.end(), [])
                found = {memory.id for memory in self.client.recall(
                    f"{self.space}-{version}", vectors[0]).memories}
                self.assertEqual(found, {"a", "b", "c"})

    def test_resumed_and_fenced(self):
        first = self.stream().open(self.space)
        self.observe_all(first, self.vectors(10))
        second = self.stream().open(self.space, session=first.session)
        self.assertEqual((second.session, second.initial), (first.session, 10))
        self.assertEqual(first.failure()[0], grpc.StatusCode.ABORTED)
        self.assertEqual(self.observe_all(second, self.vectors(3, 2, "p"), first=11),
                         [(11 + i, ACCEPTED, f"p{i}") for i in range(3)])
        second.end()

    def test_sessions_that_are_not_known_are_not_taken_for_new(self):
        for session in ("0123456789abcdef", "no number", "0"):
            stream = self.stream()
            stream.send(memory_space_id=self.space, session_id=session, init=s.StreamInit())
            code, details = stream.failure()
            self.assertEqual(code, grpc.StatusCode.NOT_FOUND)
            self.assertRegex(details, "^session_expired: ")

    def test_begun_wrongly(self):
        stream = self.stream()
        stream.observe(1, "a", [1.0])
        self.assertEqual(stream.failure(), (
            grpc.StatusCode.FAILED_PRECONDITION,
            "init: not sent; expected as the first message of a stream"))
        stream = self.stream().open(self.space)
        stream.send(init=s.StreamInit())
        self.assertEqual(stream.failure()[0], grpc.StatusCode.FAILED_PRECONDITION)
        stream = self.stream()
        stream.send(memory_space_id="No Space", init=s.StreamInit())
        self.assertEqual(stream.failure(), (
            INVALID, 'memory_space_id: "No Space"; expected 1 to 64 of [a-z0-9_-]'))
        stream = self.stream(metadata=[("x-memory-space", "elsewhere")])
        stream.send(memory_space_id=self.space, init=s.StreamInit())
        self.assertEqual(stream.failure()[0], INVALID)
        self.assertEqual(self.stream().end(), [])

    def test_strays_are_refused_in_band(self):
        good = direction(random.Random(1))
        stream = self.stream().open(self.space)
        stream.send(memory_space_id="elsewhere", sequence_number=1,
                    observation=m.Episode(id="a", embedding=good))
        sequence, status = stream.refusal()
        self.assertEqual((sequence, status.code), (1, "bad_field"))
        self.assertRegex(status.message, '^memory_space_id: "elsewhere"; this stream')
        stream.send(session_id="0123456789abcdef", sequence_number=2,
                    observation=m.Episode(id="a", embedding=good))
        self.assertEqual(stream.refusal()[0], 2)
        stream.send()
        self.assertRegex(stream.status().message, "^operation: not set")
        stream.send(recall=s.StreamingRecallRequest(cue=embedding_cue(good), request_id=5))
        answer = stream.receive().recall_result
        self.assertEqual((answer.request_id, answer.error.code), (5, "invalid_argument"))
        stream.observe(3, "a", good)
        self.assertEqual(stream.ack(), (3, ACCEPTED, "a"))
        stream.end()

    def test_batches_with_cumulative_acks(self):
        vectors = self.vectors(600)
        stream = self.stream().open(self.space, protocol_version=1, cumulative_acks=True)
        episodes = [m.Episode(id=i, embedding=v) for i, v in vectors.items()]
        episodes[100] = m.Episode(id="o100")
        for first in range(0, 600, 64):
            stream.send(sequence_number=first + 1,
                        batch=s.ObservationBatch(observations=episodes[first:first + 64]))
        acked, refused = 0, []
        while acked < 600:
            response = stream.receive()
            self.assertGreaterEqual(response.sequence_number, acked)
            if response.WhichOneof("result") == "status":
                refused.append((response.sequence_number, response.status.message))
            acked = response.sequence_number
        self.assertEqual(refused, [(101, "episode.embedding: 0 values; expected 1 to 4096")])
        stream.end()
        self.assertEqual(len(self.client.get(self.space, *[f"o{i}" for i in range(95, 105)])), 9)

    def test_packed_vectors(self):
        generator = random.Random(3)
        stream = self.stream().open(self.space)
        vectors = {}
        for i, (kind, code, each) in enumerate([(m.VECTOR_TYPE_F32, "f", 4),
                                                (m.VECTOR_TYPE_F16, "e", 2)]):
            vectors[f"v{i}"] = vector = direction(generator)
            stream.send(sequence_number=i + 1, observation=m.Episode(
                id=f"v{i}", packed_embedding=m.PackedVector(
                    type=kind, values=struct.pack(f"<{DIMENSION}{code}", *vector))))
            self.assertEqual(stream.ack(), (i + 1, ACCEPTED, f"v{i}"))
        vectors["v2"] = direction(generator)
        scale = max(abs(x) for x in vectors["v2"]) / 127
        stream.send(sequence_number=3, observation=m.Episode(
            id="v2", packed_embedding=m.PackedVector(
                type=m.VECTOR_TYPE_INT8, scale=scale, values=struct.pack(
                    f"<{DIMENSION}b", *(round(x / scale) for x in vectors["v2"])))))
        self.assertEqual(stream.ack(), (3, ACCEPTED, "v2"))
        for i, packed in enumerate([
                m.PackedVector(type=9, values=b"abcd"),
                m.PackedVector(type=m.VECTOR_TYPE_F32, values=b"abc"),
                m.PackedVector(type=m.VECTOR_TYPE_INT8, values=b"abc", scale=-1)]):
            stream.send(sequence_number=4 + i,
                        observation=m.Episode(id="x", packed_embedding=packed))
            sequence, status = stream.refusal()
            self.assertEqual(sequence, 4 + i)
            self.assertRegex(status.message, "^episode.packed_embedding.(type|values|scale): ")
        for identity, vector in vectors.items():
            cue = m.Cue(embedding=m.EmbeddingCue(packed_vector=m.PackedVector(
                type=m.VECTOR_TYPE_F32, values=struct.pack(f"<{DIMENSION}f", *vector))))
            found = self.client.Recall(s.RecallRequest(memory_space_id=self.space, cue=cue))
            self.assertEqual(found.memories[0].id, identity)
            self.assertGreater(found.memories[0].activation, 0.99)
        stream.end()

    def test_streams_that_end_anyhow(self):
        vectors = self.vectors(20)
        streams = []
        for i in range(50):
            stream = self.stream().open(self.space)
            for n, (identity, vector) in enumerate(vectors.items()):
                stream.observe(n + 1, f"s{i}-{identity}", vector)
            streams.append(stream)
        for i, stream in enumerate(streams):
            if i % 3 == 0:
                stream.cancel()
            elif i % 3 == 1:
                self.assertEqual(len(stream.end()), 20)
            else:
                self.assertEqual([stream.ack()[0] for _ in range(20)], list(range(1, 21)))
                stream.cancel()
        # Nothing is held by what has gone.
        daemon.wait_until(lambda: self.client.metrics(
            "ingress1.connections_opened", "ingress1.connections_closed") and self.is_quiet(),
            "every stream is given back")

    def is_quiet(self):
        metrics = self.client.metrics("ingress1.connections_opened",
                                      "ingress1.connections_closed")
        return len(set(metrics.values())) == 1


class Overloaded(StreamCase):
    """A space with room for 50."""

    @classmethod
    def setUpClass(cls):
        cls.daemon = daemon.Daemon({"listen.grpc": "127.0.0.1:0"})
        cls.daemon.kill()
        with cls.daemon.config.open("a") as config:
            config.write("""
[[space]]
name = "small"
quota_observations = 50
""")
        cls.daemon.spawn()
        cls.daemon.wait_ready()
        cls.client = grpc_test.Client(cls.daemon)

    def test_refusals_for_room_by_the_rules_of_each(self):
        """Engram's client goes on after each refusal, ours goes back."""
        vectors = self.vectors(60)
        old = self.stream().open("small")
        self.observe_all(old, {f"o{i}": vectors[f"o{i}"] for i in range(50)})
        # One ack awaited at a time, and then pipelined.
        for sequence in range(51, 55):
            old.observe(sequence, f"o{sequence}", vectors[f"o{sequence}"])
            told, why = old.refusal()
            self.assertEqual((told, why.state, why.code, why.expected_sequence),
                             (sequence, s.StreamStatus.STATE_OVERLOADED, "quota_observations",
                              sequence + 1))
            self.assertGreater(why.retry_after_ms, 0)
        for sequence in range(55, 59):
            old.observe(sequence, f"o{sequence}", vectors[f"o{sequence}"])
        self.assertEqual([old.refusal()[0] for _ in range(4)], [55, 56, 57, 58])
        new = self.stream().open("small", protocol_version=1)
        for sequence in (1, 2, 3):
            new.observe(sequence, f"n{sequence}", vectors["o1"])
        told, why = new.refusal()
        self.assertEqual((told, why.code, why.expected_sequence), (1, "quota_observations", 1))
        for i in range(10):
            self.client.Forget(s.ForgetRequest(memory_space_id="small", memory_id=f"o{i}"))
        for sequence in (1, 2, 3):
            new.observe(sequence, f"n{sequence}", vectors["o1"])
        self.assertEqual([new.ack() for _ in range(3)],
                         [(i, ACCEPTED, f"n{i}") for i in (1, 2, 3)])
        old.observe(59, "o59", vectors["o59"])
        self.assertEqual(old.ack(), (59, ACCEPTED, "o59"))
        self.assertEqual((new.end(), old.end()), ([], []))
        again = self.stream().open("small", session=old.session)
        self.assertEqual(again.initial, 59)
        again.end()


class Recalling(StreamCase):
    def test_recalls_between_observations(self):
        vectors = self.vectors(300)
        stream = self.stream("MemoryStream").open(self.space)
        for i, (identity, vector) in enumerate(vectors.items()):
            stream.observe(i + 1, identity, vector)
            self.assertEqual(stream.ack(), (i + 1, ACCEPTED, identity))
            if i % 10 == 0:
                stream.send(recall=s.StreamingRecallRequest(
                    cue=embedding_cue(vector), max_results=1, request_id=i))
                answer = stream.receive().recall_result
                self.assertEqual((answer.request_id, answer.more_results), (i, False))
                self.assertEqual([memory.id for memory in answer.results], [identity])
        stream.send(recall=s.StreamingRecallRequest(
            cue=embedding_cue([1.0, 2.0]), request_id=7))
        answer = stream.receive().recall_result
        self.assertEqual((answer.request_id, answer.error.code), (7, "wrong_dimension"))
        stream.send(recall=s.StreamingRecallRequest(cue=m.Cue(), request_id=8))
        self.assertRegex(stream.receive().recall_result.error.message, "^cue.cue_type: not set")
        stream.end()

    def recall_stream(self, vector, **fields):
        return list(self.client.stub.RecallStream(s.StreamingRecallRequest(
            memory_space_id=self.space, cue=embedding_cue(vector), **fields), timeout=WAIT_S))

    def test_long_recall_comes_in_parts(self):
        vectors = self.vectors(2000)
        stream = self.stream().open(self.space)
        self.observe_all(stream, vectors)
        stream.end()
        query = vectors["o17"]
        responses = self.recall_stream(query, max_results=1000)
        self.assertGreater(len(responses), 10)
        self.assertEqual([r.more_results for r in responses],
                         [True] * (len(responses) - 1) + [False])
        found = [memory.id for r in responses for memory in r.results]
        self.assertEqual((len(found), len(set(found)), found[0]), (1000, 1000, "o17"))
        best = sorted(vectors, key=lambda i: -grpc_test.cosine(query, vectors[i]))[:1000]
        self.assertGreater(len(set(best) & set(found)), 980)
        last = responses[-1].metadata
        self.assertEqual((last.total_activated, last.above_threshold), (1000, 1000))

    def test_snapshots(self):
        vectors = self.vectors(20)
        stream = self.stream().open(self.space)
        self.observe_all(stream, vectors)
        response = self.recall_stream(vectors["o0"], snapshot_isolation=True)[-1]
        self.assertGreater(response.snapshot_sequence, 0)
        # What lived at the stamp of an earlier answer, whatever came since.
        at = Timestamp()
        at.FromNanoseconds(response.snapshot_sequence)
        stream.observe(21, "later", vectors["o0"])
        stream.ack()
        then = self.recall_stream(vectors["o0"], max_results=30, snapshot_time=at)
        self.assertNotIn("later", {memory.id for r in then for memory in r.results})
        now = self.recall_stream(vectors["o0"], max_results=30)
        self.assertIn("later", {memory.id for r in now for memory in r.results})
        self.assertNotIn("recent", {key for r in now for memory in r.results
                                    for key in memory.metadata})
        # What has ended is kept for a while only.
        stream.observe(22, "o0", vectors["o1"])
        stream.ack()
        refusals = []

        def is_too_old():
            try:
                self.recall_stream(vectors["o0"], snapshot_time=at)
            except grpc.RpcError as error:
                refusals.append((error.code(), error.details()))
            return refusals
        daemon.wait_until(is_too_old, "the snapshot is not kept any more")
        self.assertEqual(refusals[0][0], grpc.StatusCode.OUT_OF_RANGE)
        self.assertRegex(refusals[0][1], "^snapshot_too_old: ")
        with self.assertRaises(grpc.RpcError) as caught:
            self.recall_stream(vectors["o0"], snapshot_time=Timestamp(seconds=9_000_000_000))
        self.assertEqual(caught.exception.code(), INVALID)
        self.assertRegex(caught.exception.details(), "^snapshot_time: .*earlier time$")
        stream.end()

    def test_refused_recalls(self):
        self.client.remember(self.space, "a", [1.0, 2.0])
        for fields, text in (
                ({"vector": []}, "^cue.embedding.vector: 0 values"),
                ({"vector": [1.0]}, "^wrong_dimension: "),
                ({"vector": [1.0, 1.0], "max_results": 10001},
                 "^max_results: 10001; expected 0 to 10000$")):
            with self.assertRaises(grpc.RpcError) as caught:
                self.recall_stream(**fields)
            self.assertEqual(caught.exception.code(), INVALID)
            self.assertRegex(caught.exception.details(), text)


class Pausing(StreamCase):
    def flow(self, stream, action, **fields):
        stream.send(flow=s.FlowControl(action=action, **fields))

    def test_pause_refuses_and_holds(self):
        vectors = list(self.vectors(10).values())
        for version in (0, 1):
            with self.subTest(version=version):
                space = f"{self.space}-{version}"
                stream = self.stream("MemoryStream").open(
                    space, protocol_version=version, enable_backpressure=True)
                stream.observe(1, "a", vectors[0])
                self.assertEqual(stream.ack(), (1, ACCEPTED, "a"))
                self.flow(stream, s.FlowControl.ACTION_PAUSE)
                self.assertEqual(stream.status().state, s.StreamStatus.STATE_PAUSED)
                stream.send(recall=s.StreamingRecallRequest(
                    cue=embedding_cue(vectors[0]), request_id=9))
                stream.observe(2, "b", vectors[1])
                sequence, status = stream.refusal()
                self.assertEqual((sequence, status.state, status.code),
                                 (2, s.StreamStatus.STATE_PAUSED, "paused"))
                expected = 3 if version == 0 else 2
                self.assertEqual(status.expected_sequence, expected)
                self.flow(stream, s.FlowControl.ACTION_RESUME)
                self.assertEqual(stream.status().state, s.StreamStatus.STATE_ACTIVE)
                answer = stream.receive().recall_result
                self.assertEqual((answer.request_id, [memory.id for memory in answer.results]),
                                 (9, ["a"]))
                stream.observe(expected, "b", vectors[1])
                self.assertEqual(stream.ack(), (expected, ACCEPTED, "b"))
                self.flow(stream, 9)
                self.assertRegex(stream.status().message, "^flow.action: 9; expected")
                stream.end()


class Killed(StreamCase):
    def test_nothing_lost_or_doubled(self):
        vectors = self.vectors(3000)
        order = list(vectors.items())
        stream = self.stream().open(self.space)
        for i, (identity, vector) in enumerate(order):
            stream.observe(i + 1, identity, vector)
        acked = [stream.ack()[0] for _ in range(1000)]
        self.assertEqual(acked, list(range(1, 1001)))
        self.daemon.kill()
        stream.failure()
        self.client.close()
        self.daemon.spawn()
        self.daemon.wait_ready()
        type(self).client = grpc_test.Client(self.daemon)
        again = self.stream().open(self.space, session=stream.session)
        self.assertGreaterEqual(again.initial, 1000)
        for i in range(again.initial, 3000):
            again.observe(i + 1, *order[i])
        self.assertEqual([again.ack()[0] for _ in range(again.initial, 3000)],
                         list(range(again.initial + 1, 3001)))
        again.end()
        introspected = self.client.Introspect(s.IntrospectRequest(
            memory_space_id=self.space, include_statistics=True))
        self.assertEqual(introspected.statistics.total_memories, 3000)
        for first in range(0, 3000, 100):
            names = [identity for identity, _ in order[first:first + 100]]
            self.assertEqual([memory.id for memory in self.client.get(self.space, *names)], names)


if __name__ == "__main__":
    daemon.main()
