#!/usr/bin/env python3
"""The tests' own frames: a wrong encoder here would blame the daemon, or pass beside it."""

import math
import struct
import unittest

import daemon
import frames


class Crc32cTest(unittest.TestCase):

    def test_vectors_of_rfc_3720(self):
        read_pdu = bytes.fromhex(
            "01c00000000000000000000000000000"
            "14000000000004000000001400000018"
            "28000000000000000200000000000000")
        for data, crc in ((bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43),
                          (bytes(range(32)), 0x46DD794E), (bytes(range(31, -1, -1)), 0x113FDB5C),
                          (read_pdu, 0xD9963A56), (b"123456789", 0xE3069283), (b"", 0)):
            with self.subTest(data=data):
                self.assertEqual(frames.crc32c(data), crc)


class EncodingTest(unittest.TestCase):

    def test_a_frame_byte_by_byte(self):
        made = frames.frame(frames.PING, session=0x0102, sequence=3)
        self.assertEqual(made[:12], b"ENG1\x01\x09\x00\x00\x00\x00\x00\x00")
        self.assertEqual(made[16:], b"\x02\x01" + bytes(6) + b"\x03" + bytes(7))
        self.assertEqual(made[12:16], struct.pack("<I", frames.crc32c(made[:12] + made[16:])))

    def test_a_record_is_padded_to_8(self):
        made = frames.record(b"abc", [1.0], payload=b"hello", confidence=0.5, when_ns=-2)
        self.assertEqual(len(made), 48)
        self.assertEqual(struct.unpack("<IBBHHHIffq", made[:32]),
                         (48, 1, 1, 1, 3, 0, 5, 0.0, 0.5, -2))
        self.assertEqual(made[32:], struct.pack("<f", 1.0) + b"abchello" + bytes(4))

    def test_the_payload_kind_is_the_frames(self):
        self.assertEqual(frames.observe_body([b"record"], frames.MEMORY), b"\x01\x00\x02\x00record")

    def test_flow(self):
        self.assertEqual(frames.flow_body(frames.BUFFER_STATUS, buffer_remaining=-2,
                                          preferred_rate=0.5),
                         b"\x05\x00\x00\x00\xfe\xff\xff\xff\x00\x00\x00\x3f" + bytes(4))
        body = b"\x02\x00\x00\x00" + struct.pack("<IIIff", 7, 3, 4, 0.75, 2.5)
        got = frames.Frame(frames.FLOW, 0, 1, 9, body)
        self.assertEqual(frames.decode_flow(got),
                         frames.Flow(frames.PAUSED, 7, 3, 4, 0.75, 2.5, 9))
        for at, byte in ((0, b"\x00"), (0, b"\x07"), (1, b"\x01"), (19, b"\xbf")):
            with self.subTest(at=at), self.assertRaises(frames.FormatError):
                frames.decode_flow(got._replace(body=body[:at] + byte + body[at + 1:]))

    def test_bf16_rounds_to_nearest_even(self):
        for value, wanted in ((1.0, 0x3F80), (-2.5, 0xC020), (0.0, 0), (math.inf, 0x7F80),
                              (1 + 2**-8, 0x3F80), (1 + 3 * 2**-8, 0x3F82),
                              (1 + 2**-8 + 2**-16, 0x3F81)):
            with self.subTest(value=value):
                self.assertEqual(frames.to_bf16([value]), struct.pack("<H", wanted))
        self.assertEqual(frames.from_bf16(frames.to_bf16([1.5, -3.0])), (1.5, -3.0))

    def test_a_reader_refuses_what_the_format_does_not_allow(self):
        good = frames.frame(frames.ACK, bytes(8), sequence=1)
        self.assertEqual(frames.decode_header(good[:32])[1], 8)
        for at, byte in ((0, b"F"), (4, b"\x02"), (5, b"\x03"), (6, b"\x01"), (11, b"\x7f")):
            with self.subTest(at=at), self.assertRaises(frames.FormatError):
                frames.decode_header(good[:at] + byte + good[at + 1:32])


if __name__ == "__main__":
    daemon.main()
