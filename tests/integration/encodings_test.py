#!/usr/bin/env python3
"""How vectors, ids and payloads travel, at their limits: what was sent is what is found."""

import math
import random
import struct
import time

import daemon
import frames
from frames import BF16, F16, F32, INT8, record

SCALE = 0.25
K_MAX, PAYLOAD_MAX, ID_MAX = 10_000, 65_536, 256
ANSWER_PAYLOAD_MAX = 16 << 20


def sent_as(values, dtype):
    """(what to hand the encoder, scale, the numbers that arrive) for f32 values."""
    if dtype == INT8:
        integers = [max(-128, min(127, round(value / SCALE))) for value in values]
        return integers, SCALE, [integer * SCALE for integer in integers]
    data = frames.encode_vector(values, dtype)
    if dtype == BF16:
        return values, 0.0, list(frames.from_bf16(data))
    return values, 0.0, list(struct.unpack(f"<{len(values)}{'e' if dtype == F16 else 'f'}", data))


def score(metric, left, right):
    if metric == frames.L2:
        return math.fsum((a - b) ** 2 for a, b in zip(left, right))
    product = math.fsum(a * b for a, b in zip(left, right))
    if metric == frames.INNER_PRODUCT:
        return product
    return product / math.sqrt(math.fsum(a * a for a in left) * math.fsum(b * b for b in right))


class EncodingsTest(daemon.DaemonCase):

    def assert_close(self, hit, wanted, values):
        """Within what sums of f32 products may lose."""
        scale = max(1.0, math.fsum(value * value for value in values))
        self.assertAlmostEqual(hit.score, wanted, delta=2e-6 * scale)

    def test_every_dtype_under_every_metric(self):
        order = random.Random(1)
        for metric in (frames.COSINE, frames.INNER_PRODUCT, frames.L2):
            for dimension in (1, 7, 64, 131):
                space = f"dtype-{metric}-{dimension}"
                arrived = {}
                with self.daemon.client(space, metric=metric) as client:
                    for dtype in (F32, F16, BF16, INT8):
                        # Not below 0.2, which int8 with this scale would round to a zero vector.
                        values = [order.choice((-1, 1)) * order.uniform(0.2, 8)
                                  for _ in range(dimension)]
                        given, scale, arrived[b"%d" % dtype] = sent_as(values, dtype)
                        self.assertEqual(client.observe([record(b"%d" % dtype, given, dtype=dtype,
                                                                scale=scale)]), [])
                    for dtype in (F32, F16, BF16, INT8):
                        with self.subTest(metric=metric, dimension=dimension, query=dtype):
                            values = [order.uniform(1, 8) for _ in range(dimension)]
                            given, scale, query = sent_as(values, dtype)
                            hits = client.recall(given, dtype=dtype, scale=scale)
                            self.assertEqual({hit.id for hit in hits}, set(arrived))
                            for hit in hits:
                                self.assert_close(hit, score(metric, query, arrived[hit.id]),
                                                  query + arrived[hit.id])
                            scores = [hit.score for hit in hits]
                            self.assertEqual(scores, sorted(scores,
                                                            reverse=metric != frames.L2))

    def test_an_l2_distance_of_itself_is_0_in_every_dtype(self):
        with self.daemon.client("itself", metric=frames.L2) as client:
            for dtype in (F32, F16, BF16, INT8):
                given, scale, arrived = sent_as([1.1, -2.3, 0.7, 5.9, -0.2], dtype)
                client.observe([record(b"%d" % dtype, given, dtype=dtype, scale=scale)])
                # What arrived is exact in f32, whatever way it came.
                nearest = client.recall(arrived, 1)[0]
                self.assertEqual((nearest.id, nearest.score), (b"%d" % dtype, 0.0))

    def test_subnormal_and_largest_halves(self):
        with self.daemon.client("halves", metric=frames.L2) as client:
            values = [2.0 ** -24, -65504.0, 2.0 ** -14, -0.0]
            client.observe([record(b"half", values, dtype=F16)])
            self.assertEqual(client.recall(values, 1)[0].score, 0.0)

    def test_dimension_1_and_4096(self):
        for metric in (frames.COSINE, frames.INNER_PRODUCT, frames.L2):
            for dimension in (1, 4096):
                with self.subTest(metric=metric, dimension=dimension), self.daemon.client(
                        f"size-{metric}-{dimension}", metric=metric,
                        dimension=dimension) as client:
                    self.assertEqual(client.hello_ack.dimension, dimension)
                    near, far = [1.0] * dimension, [-1.0] * dimension
                    self.assertEqual(client.observe([record(b"near", near), record(b"far", far)]),
                                     [])
                    hits = client.recall(near)
                    self.assertEqual([hit.id for hit in hits], [b"near", b"far"])
                    for hit, other in zip(hits, (near, far)):
                        self.assert_close(hit, score(metric, near, other), near)

    def test_the_longest_id_and_the_largest_payload(self):
        identity = bytes(range(256))
        payload = random.Random(2).randbytes(PAYLOAD_MAX)
        with self.daemon.client("longest", metric=frames.L2) as client:
            client.observe([record(identity, [1.0], payload=payload, confidence=0.25,
                                   when_ns=-(2**63)),
                            record(b"\0", [2.0], payload=b"\0", confidence=0.0,
                                   when_ns=2**63 - 1)])
            first, second = client.recall([0.0], payload=True)
            self.assertEqual(first[:6], (identity, 1.0, -(2**63), 0.25, payload, 0))
            self.assertEqual(second[:6], (b"\0", 4.0, 2**63 - 1, 0.0, b"\0", 0))
            self.assertEqual((first.payload_kind, first.vector), (0, ()))
            self.assertLess(first.stamp, second.stamp)
            # Without the flag there is no payload, and none counts as left out.
            self.assertEqual([(hit.payload, hit.flags) for hit in client.recall([0.0])],
                             [(b"", 0)] * 2)
            # All of them replaced, then deleted.
            client.observe([record(identity, [3.0], payload=b"short")])
            self.assertEqual(client.recall([3.0], 1, payload=True)[0].payload, b"short")
            client.observe([record(identity, op=frames.DELETE)])
            self.assertEqual([hit.id for hit in client.recall([3.0])], [b"\0"])

    def test_hits_have_vectors_and_stamps_and_a_snapshot_where_asked_for(self):
        with self.daemon.client("stamps", metric=frames.L2) as client:
            vectors = {b"%d" % i: (float(i), -0.5) for i in range(5)}
            before = time.time_ns()
            client.observe([record(identity, vector) for identity, vector in vectors.items()])
            after = time.time_ns()
            hits = client.recall([0.0, 0.0], 5, with_vector=True, payload=True)
            self.assertEqual({hit.id: hit.vector for hit in hits}, vectors)
            stamps = [hit.stamp for hit in hits]
            self.assertEqual(len(set(stamps)), 5)
            self.assertGreaterEqual(min(stamps), before - 256)
            self.assertLess(max(stamps), after + 1_000_000_000)
            # An update has a later stamp than all before it.
            client.observe([record(b"0", (0.0, 0.0))])
            again = client.recall([0.0, 0.0], 1, snapshot=True)[0]
            self.assertEqual((again.id, again.score, again.vector), (b"0", 0.0, ()))
            self.assertGreater(again.stamp, max(stamps))
            # One client at rest: what it had acked is in.
            self.assertGreaterEqual(client.last_snapshot, again.stamp)

    def test_the_most_results_come_whole_and_in_order(self):
        with self.daemon.client("many", metric=frames.L2) as client:
            for first in range(0, K_MAX + 200, 100):
                client.observe([record(b"%d-" % i + b"x" * (ID_MAX - len(b"%d-" % i)),
                                       [float(i)], payload=b"%d" % i * 200)
                                for i in range(first, first + 100)])
            for wanted in ({}, {"payload": True}, {"payload": True, "with_vector": True}):
                with self.subTest(wanted):
                    answer = client.recall_frames([-1.0], K_MAX, ef=K_MAX, **wanted)
                    self.assertGreater(len(answer), 1)
                    self.assertEqual({metric for metric, _ in answer}, {frames.L2})
                    hits = [hit for _, part in answer for hit in part]
                    self.assertEqual([int(hit.id.split(b"-")[0]) for hit in hits],
                                     list(range(K_MAX)))
                    for i, hit in enumerate(hits):
                        self.assertEqual(len(hit.id), ID_MAX)
                        self.assertEqual(hit.payload, b"%d" % i * 200 if wanted else b"")
                        self.assertEqual(hit.vector, (i,) if "with_vector" in wanted else ())

    def test_payloads_beyond_16_mib_are_left_out_and_it_says_so(self):
        with self.daemon.client("left-out", metric=frames.L2) as client:
            sizes = [PAYLOAD_MAX - i for i in range(262)]
            for i, size in enumerate(sizes):
                client.observe([record(b"%d" % i, [float(i)], payload=bytes([i % 256]) * size)])
            hits = client.recall([0.0], 262, payload=True)
            self.assertEqual([hit.id for hit in hits], [b"%d" % i for i in range(262)])
            fitting = 0
            while sum(sizes[:fitting + 1]) <= ANSWER_PAYLOAD_MAX:
                fitting += 1
            for i, hit in enumerate(hits):
                left_out = i >= fitting
                self.assertEqual(hit.payload, b"" if left_out else bytes([i % 256]) * sizes[i])
                self.assertEqual(hit.flags, frames.PAYLOAD_LEFT_OUT if left_out else 0)

    def test_fewer_than_k_and_equal_scores_in_a_fixed_order(self):
        with self.daemon.client("equal", metric=frames.L2) as client:
            order = list(range(50))
            random.Random(3).shuffle(order)
            client.observe([record(b"%d" % i, [1.0, 2.0]) for i in order])
            first = client.recall([0.0, 0.0], K_MAX)
            self.assertEqual(len(first), 50)
            for _ in range(5):
                self.assertEqual(client.recall([0.0, 0.0], K_MAX), first)
            self.assertEqual(client.recall([0.0, 0.0], 7), first[:7])


if __name__ == "__main__":
    daemon.main()
