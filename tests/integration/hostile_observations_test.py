#!/usr/bin/env python3
"""Observations that can never be taken: each uses up its number, by name, alone in its frame."""

import math

import daemon
import frames
from frames import record

NAN, INF = math.nan, math.inf
# Half and bfloat16 of a NaN and of an infinity, then a 1.
F16_NAN, F16_INF, F16_ONE = b"\x00\x7e", b"\x00\x7c", b"\x00\x3c"
BF16_NAN, BF16_INF, BF16_ONE = b"\xc0\x7f", b"\x80\xff", b"\x80\x3f"


def faults():
    """{case: (reason's name, record)}; the space has dimension 2."""
    good = [1.0, 1.0]

    def raw(dtype, vector):
        return record(b"bad", dtype=dtype, dimension=2, raw_vector=vector)

    return {
        "dimension 3": ("wrong_dimension", record(b"bad", [1.0, 2.0, 3.0])),
        "dimension 1": ("wrong_dimension", record(b"bad", [1.0])),
        "dimension 0": ("wrong_dimension", record(b"bad", [])),
        "dimension 4097": ("wrong_dimension", record(b"bad", [1.0] * 4097)),
        "NaN": ("not_finite", record(b"bad", [1.0, NAN])),
        "infinity": ("not_finite", record(b"bad", [INF, 1.0])),
        "-infinity": ("not_finite", record(b"bad", [-INF, 1.0])),
        "NaN in f16": ("not_finite", raw(frames.F16, F16_ONE + F16_NAN)),
        "infinity in f16": ("not_finite", raw(frames.F16, F16_INF + F16_ONE)),
        "NaN in bf16": ("not_finite", raw(frames.BF16, BF16_NAN + BF16_ONE)),
        "-infinity in bf16": ("not_finite", raw(frames.BF16, BF16_ONE + BF16_INF)),
        "dtype 0": ("bad_dtype", record(b"bad", good, dtype=0, raw_vector=bytes(8))),
        "dtype 5": ("bad_dtype", record(b"bad", good, dtype=5, raw_vector=bytes(8))),
        "id empty": ("bad_id", record(b"", good)),
        "id of 257 bytes": ("bad_id", record(b"i" * 257, good)),
        "delete without id": ("bad_id", record(b"", op=frames.DELETE)),
        "payload of 65537 bytes": ("payload_too_large", record(b"bad", good, payload=b"p" * 65537)),
        "scale 0": ("bad_scale", record(b"bad", [1, 2], dtype=frames.INT8, scale=0.0)),
        "scale -1": ("bad_scale", record(b"bad", [1, 2], dtype=frames.INT8, scale=-1.0)),
        "scale NaN": ("bad_scale", record(b"bad", [1, 2], dtype=frames.INT8, scale=NAN)),
        "scale infinity": ("bad_scale", record(b"bad", [1, 2], dtype=frames.INT8, scale=INF)),
        "confidence 1.01": ("bad_confidence", record(b"bad", good, confidence=1.01)),
        "confidence -0.1": ("bad_confidence", record(b"bad", good, confidence=-0.1)),
        "confidence NaN": ("bad_confidence", record(b"bad", good, confidence=NAN)),
        "operation 0": ("bad_operation", record(b"bad", good, op=0)),
        "operation 3": ("bad_field", record(b"bad", good, op=3)),
        "operation 255": ("bad_operation", record(b"bad", good, op=255)),
    }


@daemon.on_each_backend
class HostileObservationsTest(daemon.DaemonCase):

    def test_each_fault_uses_up_its_number_and_nothing_else(self):
        for case, (name, bad) in faults().items():
            with self.subTest(case), \
                    self.daemon.client("faults", metric=frames.L2, dimension=2) as client:
                # Around it in one frame: what is good is taken.
                naks = client.observe([record(b"before", [1.0, float(client.session % 97)]), bad,
                                       record(b"after", [2.0, 0.0])])
                self.assertEqual(len(naks), 1, naks)
                self.assert_refused(naks[0], name, flags=frames.CONSUMED,
                                    refused_type=frames.OBSERVE)
                self.assertEqual((naks[0].sequence, naks[0].session), (2, client.session))
                self.assertEqual(client.acked, 3)
                hits = client.recall([0.0, 0.0], 1000)
                self.assertEqual({hit.id for hit in hits}, {b"before", b"after"})
                self.assertIn(1.0 + (client.session % 97) ** 2, [hit.score for hit in hits])
                # A repeat of the refused number is acked again and stores nothing.
                client.send_observe([record(b"repeat", [3.0, 3.0])], sequence=2)
                client.ping()
                self.assertEqual(client.acked, 3)
                self.assertEqual({hit.id for hit in client.recall([0.0, 0.0], 1000)},
                                 {b"before", b"after"})

    def test_a_zero_vector_is_refused_under_cosine_only(self):
        zeros = {"f32": record(b"zero", [0.0, -0.0]),
                 "f16": record(b"zero", [0.0, 0.0], dtype=frames.F16),
                 "bf16": record(b"zero", [0.0, 0.0], dtype=frames.BF16),
                 "int8": record(b"zero", [0, 0], dtype=frames.INT8, scale=1.0)}
        for metric, name in ((frames.COSINE, "zero_vector"), (frames.INNER_PRODUCT, None),
                             (frames.L2, None)):
            for dtype, zero in zeros.items():
                with self.subTest(metric=metric, dtype=dtype), \
                        self.daemon.client(f"zero-{metric}-{dtype}", metric=metric) as client:
                    naks = client.observe([record(b"one", [1.0, 0.0]), zero])
                    found = {hit.id for hit in client.recall([1.0, 0.0])}
                    if name is None:
                        self.assertEqual((naks, found), ([], {b"one", b"zero"}))
                        continue
                    self.assertEqual(found, {b"one"})
                    self.assert_refused(naks[0], name, flags=frames.CONSUMED,
                                        refused_type=frames.OBSERVE)

    def test_the_first_observation_of_a_space_fixes_its_dimension(self):
        with self.daemon.client("fixed", metric=frames.L2) as client:
            # One that is refused does not.
            naks = client.observe([record(b"a", [1.0, 2.0, NAN])])
            self.assertEqual([nak.name for nak in naks], ["not_finite"])
            self.assertEqual(client.observe([record(b"a", [1.0, 2.0])]), [])
            naks = client.observe([record(b"b", [1.0, 2.0, 3.0])])
            self.assertEqual([nak.name for nak in naks], ["wrong_dimension"])
        with self.daemon.client("fixed") as client:
            self.assertEqual(client.hello_ack.dimension, 2)
            self.assertEqual(client.hello_ack.metric, frames.L2)

    def test_a_gap_names_the_number_that_is_expected(self):
        with self.daemon.client("gap", metric=frames.L2) as client:
            client.observe([record(b"1", [1.0])])
            for sequence in (5, 6, 9):
                client.send_observe([record(b"%d" % sequence, [1.0])], sequence=sequence)
            client.ping()
            # Once; further ones are passed over in silence.
            self.assertEqual(len(client.naks), 1, client.naks)
            self.assert_refused(client.naks[0], "sequence_gap", flags=0,
                                refused_type=frames.OBSERVE)
            self.assertEqual((client.naks[0].sequence, client.naks[0].expected), (5, 2))
            self.assertEqual(client.acked, 1)
            # Until that number arrives.
            client.next_sequence = 2
            self.assertEqual(client.observe([record(b"2", [2.0]), record(b"3", [3.0])]), [])
            client.send_observe([record(b"8", [1.0])], sequence=8)
            client.ping()
            self.assertEqual([nak.expected for nak in client.naks], [2, 4])
            self.assertEqual({hit.id for hit in client.recall([0.0])}, {b"1", b"2", b"3"})

    def test_recalls_are_refused_with_their_request_id(self):
        with self.daemon.client("asked", metric=frames.COSINE) as client:
            self.assert_recall_refused(client, "unknown_space", [1.0, 0.0])
            client.observe([record(b"x", [1.0, 0.0])])
            for name, vector, fields in (
                    ("bad_recall", [1.0, 0.0], {"k": 0}), ("bad_recall", [1.0, 0.0], {"k": 10001}),
                    ("bad_recall", [1.0, 0.0], {"ef": 10001}),
                    ("bad_recall", [1.0] * 1025, {"k": 10000, "with_vector": True}),
                    ("wrong_dimension", [1.0], {}), ("wrong_dimension", [1.0] * 3, {}),
                    ("not_finite", [NAN, 0.0], {}), ("not_finite", [INF, 0.0], {}),
                    ("zero_vector", [0.0, 0.0], {}),
                    ("bad_scale", [1, 0], {"dtype": frames.INT8, "scale": 0.0})):
                with self.subTest(name, vector=vector, fields=fields):
                    self.assert_recall_refused(client, name, vector, **fields)
            self.assertEqual(len(client.recall([1.0, 0.0])), 1)

    def assert_recall_refused(self, client, name, vector, **fields):
        with self.assertRaises(frames.Refused) as caught:
            client.recall(vector, **fields)
        nak = caught.exception.nak
        self.assert_refused(nak, name, flags=0, refused_type=frames.RECALL)
        self.assertEqual(nak.sequence, client.last_request)

    def test_a_connection_without_a_session_cannot_observe(self):
        with self.daemon.client("reading", features=frames.NO_SESSION) as client:
            self.assertEqual((client.session, client.hello_ack.features), (0, frames.NO_SESSION))
            client.send(frames.frame(frames.OBSERVE, frames.observe_body([record(b"x", [1.0])]),
                                     sequence=1))
            nak = client.wait_for(frames.NAK)
            self.assert_refused(nak, "no_session", flags=0, refused_type=frames.OBSERVE)
            client.ping()

    def test_a_frame_of_almost_1_mib_is_taken(self):
        with self.daemon.client("largest", metric=frames.L2) as client:
            size = len(record(b"00", [0.0] * 4096))
            count = (frames.MAX_FRAME_BYTES - 4) // size
            self.assertEqual(client.observe(
                [record(b"%02d" % i, [float(i)] * 4096) for i in range(count)]), [])
            self.assertEqual(client.recall([float(count)] * 4096, 1)[0].id, b"%02d" % (count - 1))


if __name__ == "__main__":
    daemon.main()
