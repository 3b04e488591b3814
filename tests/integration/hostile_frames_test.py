#!/usr/bin/env python3
"""Frames that break a rule: each ends its connection by the rule's name, and harms nobody else."""

import struct

import daemon
import frames
from frames import frame

GOOD = frames.record(b"good", [1.0, 2.0, 3.0])


def bad_frames():
    """{case: (reason's name, refused type or None, bytes)}, sent after hello in an L2 space."""
    body = frames.observe_body([GOOD])
    observe = frames.OBSERVE

    def changed(at, value):
        return frame(observe, body[:at] + value + body[at + len(value):], sequence=2)

    return {
        "magic": ("bad_magic", None, frame(frames.PING, magic=0x31474E46)),
        "http": ("bad_magic", None, b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"),
        "version": ("bad_version", None, frame(frames.PING, version=2)),
        "unknown type": ("bad_type", 200, frame(200)),
        "reserved type flow": ("bad_type", 6, frame(6)),
        "a server's type": ("bad_type", frames.ACK, frame(frames.ACK, bytes(8))),
        "length 4 GiB": ("frame_too_long", observe, frame(observe, length=2**32 - 1)),
        "length 1 MiB + 1": ("frame_too_long", observe, frame(observe, length=2**20 + 1)),
        "crc": ("bad_crc", observe, frame(observe, body, sequence=2, crc=1)),
        "one bit of the body": ("bad_crc", observe,
                                frame(observe, body, sequence=2)[:-1] + b"\x01"),
        "crc of an empty frame": ("bad_crc", frames.PING, frame(frames.PING, crc=0)),
        "count of 2 for 1 record": ("bad_frame", observe, changed(0, b"\x02\x00")),
        "count of 0": ("bad_frame", observe, frame(observe, frames.observe_body([]), sequence=2)),
        "a kind of payload that is none": (
            "bad_frame", observe, frame(observe, frames.observe_body([GOOD], 3), sequence=2)),
        "no body": ("bad_frame", observe, frame(observe, sequence=2)),
        "bytes behind the last record": ("bad_frame", observe,
                                         frame(observe, body + bytes(8), sequence=2)),
        "record longer than its frame": ("bad_frame", observe, changed(4, b"\xff\xff\xff\x7f")),
        "record shorter than its head": ("bad_frame", observe, changed(4, b"\x08\x00\x00\x00")),
        "record_bytes no multiple of 8": ("bad_frame", observe,
                                          changed(4, struct.pack("<I", len(GOOD) - 4))),
        "payload longer than its record": ("bad_frame", observe, changed(16, b"\xff\x00\x00\x00")),
        "id longer than its record": ("bad_frame", observe, changed(12, b"\xff\x00")),
        "hello twice": ("hello_repeated", frames.HELLO,
                        frame(frames.HELLO, frames.hello_body(b"rules"))),
        "scroll without a body": ("bad_frame", frames.SCROLL, frame(frames.SCROLL)),
        "scroll a byte too long": ("bad_frame", frames.SCROLL, frame(frames.SCROLL, bytes(17))),
        "check cut off": ("bad_frame", frames.CHECK, frame(frames.CHECK, bytes(135))),
        "recall without a body": ("bad_frame", frames.RECALL, frame(frames.RECALL)),
        "recall shorter than its vector": (
            "bad_frame", frames.RECALL,
            frame(frames.RECALL, frames.recall_body([1.0, 2.0, 3.0])[:-4])),
        "ping with a body": ("bad_frame", frames.PING, frame(frames.PING, bytes(8))),
        "close with a body": ("bad_frame", frames.CLOSE, frame(frames.CLOSE, bytes(8))),
        "introspect without a body": ("bad_frame", frames.INTROSPECT, frame(frames.INTROSPECT)),
    }


def bad_hellos():
    """{case: (reason's name, hello frame)}; the space "rules" is L2 with dimension 3."""
    hello = frames.hello_body
    long_name = struct.pack("<IHBBB3x", 0, 0, 0, 0, 65) + b"a" * 65
    return {
        "capitals": ("bad_space_id", hello(b"Rules")),
        "a blank": ("bad_space_id", hello(b"ru les")),
        "65 bytes": ("bad_space_id", long_name),
        "zero byte": ("bad_space_id", hello(b"a\0b")),
        "another metric": ("metric_mismatch", hello(b"rules", metric=frames.COSINE)),
        "another dimension": ("dimension_mismatch", hello(b"rules", dimension=4)),
        "name cut off": ("bad_frame", hello(b"rules")[:-1]),
        "empty body": ("bad_frame", b""),
        "unknown metric": ("bad_frame", hello(b"rules", metric=9)),
        "unknown priority": ("bad_frame", hello(b"rules", priority=9)),
    }


@daemon.on_each_backend
class HostileFramesTest(daemon.DaemonCase):

    def assert_ends_with(self, client, name, refused_type):
        nak = client.wait_for(frames.NAK)
        self.assert_refused(nak, name, flags=frames.CLOSED,
                            refused_type=nak.refused_type if refused_type is None
                            else refused_type)
        client.wait_end()
        return nak

    def setUp(self):
        with self.daemon.client("rules", metric=frames.L2) as client:
            client.observe([GOOD])

    def test_each_broken_rule_ends_the_connection_by_name(self):
        for case, (name, refused_type, data) in bad_frames().items():
            with self.subTest(case), self.daemon.client("rules") as client:
                before = client.recall([0.0, 0.0, 0.0], 1000)
                # What came before stands, though it comes in one segment with what is wrong.
                identity = case.encode()
                good = frame(frames.OBSERVE, frames.observe_body(
                    [frames.record(identity, [1.0, 1.0, 1.0])]), session=client.session,
                    sequence=1)
                client.send(good + data)
                nak = self.assert_ends_with(client, name, refused_type)
                if name == "bad_version":
                    self.assertRegex(nak.text, r"\b1\b")
                self.assert_serves()
                with self.daemon.client("rules", session=client.session) as again:
                    self.assertEqual(again.next_sequence, 2)
                    found = {hit.id for hit in again.recall([0.0, 0.0, 0.0], 1000)}
                self.assertEqual(found, {hit.id for hit in before} | {identity})

    def test_hello_is_checked(self):
        for case, (name, body) in bad_hellos().items():
            with self.subTest(case), self.daemon.client() as client:
                client.send(frame(frames.HELLO, body))
                self.assert_ends_with(client, name, frames.HELLO)

    def test_hello_comes_first(self):
        for frame_type, body in ((frames.OBSERVE, frames.observe_body([GOOD])),
                                 (frames.RECALL, frames.recall_body([1.0, 2.0, 3.0])),
                                 (frames.INTROSPECT, b"\x01")):
            with self.subTest(frame_type), self.daemon.client() as client:
                client.send(frame(frame_type, body, sequence=1))
                self.assert_ends_with(client, "hello_required", frame_type)

    def test_refusals_are_counted_by_name(self):
        with self.daemon.client("rules") as client:
            before = client.counters()["bad_crc"]
            with self.daemon.client("rules") as broken:
                broken.send(frame(frames.PING, crc=0))
                self.assert_ends_with(broken, "bad_crc", frames.PING)
            self.assertEqual(client.counters()["bad_crc"], before + 1)


if __name__ == "__main__":
    daemon.main()
