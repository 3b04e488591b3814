"""Native frames, version 1, written from dataplane/FORMAT.md alone, and a small blocking client.

This is a second implementation of the wire format on purpose: it shares no line, no table and no
constant with the C++ code, so a test that passes with it says that the page and the code agree.
The reader is stricter than a client has to be: a zero field that is not zero, a flag without a
meaning or a byte too many is a FormatError.

Shapes: a vector is a sequence of numbers; ids and payloads are bytes; times are nanoseconds.
"""

import array
import collections
import socket
import struct
import time

MAGIC = 0x31474E45
VERSION = 1
HEADER = struct.Struct("<IBBHIIQQ")
MAX_FRAME_BYTES = 1_048_576

(HELLO, HELLO_ACK, OBSERVE, ACK, NAK) = (1, 2, 3, 4, 5)
(RECALL, RESULT, PING, CLOSE, INTROSPECT, INTROSPECTION) = (7, 8, 9, 10, 11, 12)
(COMMAND, COMMAND_DONE) = (13, 14)
(SCROLL, SCROLLED, CHECK, CHECKED) = (15, 16, 17, 18)
NO_SESSION, ATTRIBUTES, WIDE_RECALLS = 1, 2, 4  # features of hello
COSINE, INNER_PRODUCT, L2 = 1, 2, 3
UPSERT, DELETE = 1, 2
COMPACT, DROP, REBUILD = 1, 2, 3
F32, F16, BF16, INT8 = 1, 2, 3, 4
OPAQUE, EPISODE, MEMORY = 0, 1, 2  # kinds of payload
SPACES, STATUS = 1, 2
CONSUMED, CLOSED = 1, 2  # flags of nak
PAYLOAD_LEFT_OUT = 1     # flag of a hit
WITH_PAYLOAD, WITH_VECTOR, SNAPSHOT, FILTERED, BOUNDED, ACROSS = 1, 2, 4, 8, 16, 32  # of recall
FROM_START, TO_END = -2 ** 63, 2 ** 63 - 1  # no bounds of a filter's times

# Refusals that the tests ask for, by the codes of the table that FORMAT.md names.
REASONS = {
    "bad_magic": 1, "bad_version": 2, "bad_type": 3, "frame_too_long": 4, "bad_crc": 5,
    "bad_frame": 6, "hello_required": 7, "hello_repeated": 8, "slow_reader": 12,
    "connection_limit": 13, "shutting_down": 14, "recovering": 16, "wrong_dimension": 20,
    "not_finite": 21,
    "zero_vector": 22, "bad_dtype": 23, "bad_id": 24, "payload_too_large": 25, "bad_scale": 26,
    "bad_confidence": 27, "bad_operation": 28, "bad_attributes": 29, "bad_filter": 77,
    "unknown_filter_key": 78, "sequence_gap": 60, "session_expired": 61,
    "fenced": 62, "bad_space_id": 65, "metric_mismatch": 66, "dimension_mismatch": 67,
    "unknown_space": 68, "bad_recall": 69, "no_session": 70, "session_space_mismatch": 71,
    "busy": 72, "merges_full": 73, "quota_observations": 47, "quota_memory": 48,
    "disk_full": 44, "log_busy": 46,
}
REASON_NAMES = {code: name for name, code in REASONS.items()}


class FormatError(Exception):
    """The server sent something that FORMAT.md does not allow."""


class Refused(Exception):
    """A nak where the caller waited for something else."""

    def __init__(self, nak):
        super().__init__(f"{nak.name}: {nak.text} (type {nak.refused_type}, flags {nak.flags})")
        self.nak = nak


class ConnectionEnded(Exception):
    """The server closed or reset the connection where a frame was awaited."""


class ServerClosed(ConnectionEnded):
    """The server said close where another frame was awaited."""

    def __init__(self, sequence):
        super().__init__(f"the server sent close at {sequence}")
        self.sequence = sequence


def _crc_tables():
    small = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        small.append(crc)
    # Two bytes a step: table[x] is the register x after two bytes of zeros.
    wide = []
    for pair in range(65536):
        crc = small[pair & 255] ^ (pair >> 8)
        wide.append(small[crc & 255] ^ (crc >> 8))
    return small, array.array("L", wide)


_CRC_BYTE, _CRC_PAIR = _crc_tables()


def crc32c(data):
    """CRC-32C (Castagnoli), RFC 3720 B.4."""
    data = bytes(data)
    crc, even, table = 0xFFFFFFFF, len(data) & ~1, _CRC_PAIR
    for pair in memoryview(data)[:even].cast("H"):
        crc = table[(crc ^ pair) & 0xFFFF] ^ (crc >> 16)
    if even < len(data):
        crc = _CRC_BYTE[(crc ^ data[even]) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


# --- Encoding -----------------------------------------------------------------------------------

def frame(frame_type, body=b"", *, flags=0, session=0, sequence=0, magic=MAGIC, version=VERSION,
          length=None, crc=None):
    """One frame. magic, version, length and crc are given only to make a wrong one."""
    length = len(body) if length is None else length
    head = struct.pack("<IBBHI", magic, version, frame_type, flags, length)
    tail = struct.pack("<QQ", session, sequence)
    crc = crc32c(head + tail + body) if crc is None else crc
    return head + struct.pack("<I", crc) + tail + body


def hello_body(space=b"", *, dimension=0, metric=0, features=0, priority=0):
    return struct.pack("<IHBBB3x", features, dimension, metric, priority, len(space)) + space


def to_f16(values):
    return struct.pack(f"<{len(values)}e", *values)


def to_bf16(values):
    """Upper halves of the f32, rounded to nearest, ties to even."""
    words = struct.unpack(f"<{len(values)}I", struct.pack(f"<{len(values)}f", *values))
    return struct.pack(f"<{len(values)}H",
                       *((word + 0x7FFF + ((word >> 16) & 1)) >> 16 for word in words))


def from_bf16(data):
    words = struct.unpack(f"<{len(data) // 2}H", data)
    return struct.unpack(f"<{len(words)}f", struct.pack(f"<{len(words)}I",
                                                        *(word << 16 for word in words)))


def encode_vector(values, dtype):
    """The vector's bytes. int8 takes the integers; its scale travels beside it."""
    if dtype == F32:
        return struct.pack(f"<{len(values)}f", *values)
    if dtype == F16:
        return to_f16(values)
    if dtype == BF16:
        return to_bf16(values)
    return struct.pack(f"<{len(values)}b", *values)


def padded(data):
    return data + bytes(-len(data) % 8)


def attributes(*pairs):
    """The bytes of (key, value) pairs; a tag has the key b""."""
    return b"".join(bytes((len(key), len(value))) + key + value for key, value in pairs)


def recall_filter(*clauses, begin_ns=FROM_START, end_ns=TO_END):
    """The bytes of a filter of (key, values) and, for none of them, (key, values, True)."""
    body = struct.pack("<qq", begin_ns, end_ns)
    for key, values, *excludes in clauses:
        body += bytes((any(excludes), len(key), len(values), 0)) + key
        body += b"".join(bytes((len(value),)) + value for value in values)
    return body


def record(identity, vector=None, *, op=UPSERT, dtype=F32, scale=0.0, payload=b"", confidence=1.0,
           when_ns=0, dimension=None, raw_vector=None, attributes=b""):
    """One observation. raw_vector and dimension are given only to send something odd."""
    if op == DELETE:
        dtype = dimension = 0
        data = b""
    else:
        data = encode_vector(vector, dtype) if raw_vector is None else raw_vector
        dimension = len(vector) if dimension is None else dimension
    rest = padded(data + identity + attributes + payload)
    return struct.pack("<IBBHHHIffq", 32 + len(rest), op, dtype, dimension, len(identity),
                       len(attributes), len(payload), scale, confidence, when_ns) + rest


def observe_body(records, payload_kind=OPAQUE):
    return struct.pack("<HBx", len(records), payload_kind) + b"".join(records)


def recall_body(vector, k=10, *, ef=0, dtype=F32, scale=0.0, filter=None, bound=None):
    """With a filter the frame needs the flag FILTERED, with a bound BOUNDED."""
    body = struct.pack("<IIHBxf", k, ef, len(vector), dtype if vector else 0, scale)
    body += encode_vector(vector, dtype)
    if bound is not None:
        body += struct.pack("<f", bound)
    return body if filter is None else body + struct.pack("<H", len(filter)) + filter


# --- Decoding -----------------------------------------------------------------------------------

MEMORY_KINDS = 9  # of space records

Frame = collections.namedtuple("Frame", "type flags session sequence body")
HelloAck = collections.namedtuple(
    "HelloAck", "session sequence features dimension metric priority credit max_frame_bytes "
                "max_recalls")
Nak = collections.namedtuple(
    "Nak", "name reason refused_type flags retry_after_ms expected text sequence session")
Hit = collections.namedtuple(
    "Hit", "id score when_ns confidence payload flags stamp payload_kind vector space")
Space = collections.namedtuple(
    "Space", "name shard dimension metric observations linked unlinked retired resident_bytes "
             "memory")


def require(condition, text):
    if not condition:
        raise FormatError(text)


def decode_header(data):
    """(Frame without its body, length, crc) of 32 bytes."""
    magic, version, frame_type, flags, length, crc, session, sequence = HEADER.unpack(data)
    require(magic == MAGIC, f"magic {magic:#x}")
    require(version == VERSION, f"version {version}")
    require(frame_type in (HELLO_ACK, ACK, NAK, RESULT, PING, CLOSE, INTROSPECTION),
            f"type {frame_type} is not one that a server sends")
    known = 1 if frame_type in (RESULT, PING, INTROSPECTION) else 0
    require(flags & ~known == 0, f"flags {flags:#x} of type {frame_type}")
    require(length <= MAX_FRAME_BYTES, f"length {length}")
    return Frame(frame_type, flags, session, sequence, b""), length, crc


def decode_hello_ack(got):
    require(len(got.body) == 24, "hello_ack has 24 bytes")
    return HelloAck(got.session, got.sequence, *struct.unpack("<IHBBQII", got.body))


def decode_ack(got):
    """(sequence, credit)"""
    require(len(got.body) == 8, "ack has 8 bytes")
    return got.sequence, struct.unpack("<Q", got.body)[0]


def decode_nak(got):
    require(len(got.body) >= 24, "nak has at least 24 bytes")
    reason, refused_type, flags, retry_ms, expected, text_bytes, zeros = struct.unpack(
        "<HBBIQH6s", got.body[:24])
    require(zeros == bytes(6), "nak's zero fields are zero")
    require(flags in (0, CONSUMED, CLOSED), f"nak's flags {flags}")
    require(len(got.body) == 24 + text_bytes, "nak's text fills its body")
    text = got.body[24:].decode("utf-8")
    require(text, "a nak has a text")
    return Nak(REASON_NAMES.get(reason, str(reason)), reason, refused_type, flags, retry_ms,
               expected, text, got.sequence, got.session)


def decode_result(got):
    """(metric, snapshot, hits) of one frame of an answer."""
    count, metric, zero, zeros, snapshot = struct.unpack_from("<HBBIQ", got.body)
    require(zero == 0 and zeros == 0, "result's zero fields are zero")
    hits, at = [], 16
    for _ in range(count):
        require(at + 40 <= len(got.body), "a hit is within its frame")
        (hit_bytes, score, when_ns, stamp, confidence, payload_bytes, id_bytes, flags, kind,
         dimension, space_bytes, zero) = struct.unpack_from("<IfqQfIHBBHBB", got.body, at)
        used = 40 + 4 * dimension + id_bytes + space_bytes + payload_bytes
        require(zero == 0 and flags in (0, PAYLOAD_LEFT_OUT), "hit's flags and zero field")
        require(kind in (0, 1, 2), f"payload_kind {kind}")
        require(hit_bytes == used + (-used % 8), f"hit_bytes {hit_bytes}, used {used}")
        require(at + hit_bytes <= len(got.body), "a hit is within its frame")
        vector = struct.unpack_from(f"<{dimension}f", got.body, at + 40)
        rest = got.body[at + 40 + 4 * dimension:at + hit_bytes]
        payload_at = id_bytes + space_bytes
        require(not any(rest[payload_at + payload_bytes:]), "padding is zeros")
        hits.append(Hit(rest[:id_bytes], score, when_ns, confidence,
                        rest[payload_at:payload_at + payload_bytes], flags, stamp, kind, vector,
                        rest[id_bytes:payload_at]))
        at += hit_bytes
    require(at == len(got.body), "hits fill the frame")
    return metric, snapshot, hits


def decode_spaces(got):
    count, what, zero, zeros = struct.unpack_from("<HBBI", got.body)
    require(what == SPACES and zero == 0 and zeros == 0, "introspection's head")
    spaces, at = [], 8
    for _ in range(count):
        (record_bytes, shard, dimension, metric, name_bytes, zero, zeros, *counts) = (
            struct.unpack_from("<IHHBBHI5Q", got.body, at))
        require(zero == 0 and zeros == 0, "space record's zero fields")
        used = 56 + name_bytes
        kinds_at = used + (-used % 8)
        require(record_bytes == kinds_at + 8 * MEMORY_KINDS, "space record's length")
        name = got.body[at + 56:at + used].decode("ascii")
        memory = struct.unpack_from(f"<{MEMORY_KINDS}Q", got.body, at + kinds_at)
        require(sum(memory) == counts[-1], "memory by kind is all memory")
        spaces.append(Space(name, shard, dimension, metric, *counts, memory))
        at += record_bytes
    require(at == len(got.body), "space records fill the frame")
    return spaces


# --- Client -------------------------------------------------------------------------------------

class Client:
    """One blocking connection. Not thread-safe. Each wait ends after timeout_s with an error.

    received counts bytes. acked is the last cumulative ack, acks the list of all, naks the naks
    that a wait for something else passed by (those that close the connection are raised).
    """

    def __init__(self, address, timeout_s=30, receive_buffer=None):
        self.socket = socket.socket(
            socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(timeout_s)
        self.socket.connect(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._timeout_s = timeout_s
        self._buffer = bytearray()
        self.session = 0
        self.next_sequence = 1
        self.acked = 0
        self.credit = 0
        self.acks = []
        self.naks = []
        self.hello_ack = None
        self.last_request = 0
        self.last_snapshot = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def abort(self):
        """Ends the connection by RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def send(self, data):
        self.socket.sendall(data)

    def _fill(self, size):
        while len(self._buffer) < size:
            try:
                data = self.socket.recv(262_144)
            except ConnectionResetError as error:
                raise ConnectionEnded("reset") from error
            if not data:
                raise ConnectionEnded("closed" + (" in mid-frame" if self._buffer else ""))
            self._buffer += data

    def receive(self):
        """The next frame, checked."""
        self._fill(32)
        head = bytes(self._buffer[:32])
        got, length, crc = decode_header(head)
        self._fill(32 + length)
        body = bytes(self._buffer[32:32 + length])
        del self._buffer[:32 + length]
        require(crc32c(head[:12] + head[16:] + body) == crc, "the server's CRC")
        require(got.session in (0, self.session) or got.type in (HELLO_ACK, NAK),
                "the session in the header")
        return got._replace(body=body)

    def wait_for(self, *types):
        """The next frame of these types. Acks and waiting naks before it are noted."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            got = self.receive()
            nak = decode_nak(got) if got.type == NAK else None
            if got.type == ACK:
                sequence, credit = decode_ack(got)
                require(sequence >= self.acked, f"ack {sequence} after {self.acked}")
                require(credit >= self.credit, f"credit {credit} after {self.credit}")
                self.acked, self.credit = sequence, credit
                self.acks.append(sequence)
            if got.type in types:
                return nak if nak else got
            if nak is not None:
                if nak.flags & CLOSED or nak.refused_type != OBSERVE:
                    raise Refused(nak)
                self.naks.append(nak)
            elif got.type == CLOSE:
                raise ServerClosed(got.sequence)
            elif got.type != ACK:
                raise FormatError(f"type {got.type} was not asked for")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no frame of types {types}")

    def wait_end(self):
        """Reads until the connection ends; nothing may come any more."""
        try:
            got = self.receive()
        except ConnectionEnded:
            return
        raise FormatError(f"a frame of type {got.type} after the last one")

    def hello(self, space="", *, session=0, **fields):
        self.send(frame(HELLO, hello_body(space.encode(), **fields), session=session))
        ack = self.hello_ack = decode_hello_ack(self.wait_for(HELLO_ACK))
        self.session = ack.session
        self.next_sequence = ack.sequence + 1
        self.acked, self.credit = ack.sequence, ack.credit
        return ack

    def send_observe(self, records, sequence=None, **fields):
        """Sends one frame once there is credit for it; returns the sequence of its last record."""
        sequence = self.next_sequence if sequence is None else sequence
        while self.credit < sequence + len(records) - 1:
            self.wait_for(ACK)
        self.send(frame(OBSERVE, observe_body(records, **fields), session=self.session,
                        sequence=sequence))
        self.next_sequence = sequence + len(records)
        return self.next_sequence - 1

    def wait_acked(self, sequence):
        while self.acked < sequence:
            self.wait_for(ACK)

    def observe(self, records, **fields):
        """Sends one frame and waits until all of it is settled. Returns its naks."""
        seen = len(self.naks)
        self.wait_acked(self.send_observe(records, **fields))
        return self.naks[seen:]

    def recall(self, vector, k=10, **fields):
        """All hits of one recall, over as many frames as there are."""
        return [hit for _, hits in self.recall_frames(vector, k, **fields) for hit in hits]

    def recall_frames(self, vector, k=10, *, payload=False, with_vector=False, snapshot=False,
                      across=False, **fields):
        """The answer's frames: (metric, hits) each. last_snapshot is what they named."""
        self.last_request += 1
        flags = payload * WITH_PAYLOAD + with_vector * WITH_VECTOR + snapshot * SNAPSHOT
        flags |= FILTERED * (fields.get("filter") is not None) + ACROSS * across
        flags |= BOUNDED * (fields.get("bound") is not None)
        self.send(frame(RECALL, recall_body(vector, k, **fields), flags=flags,
                        session=self.session, sequence=self.last_request))
        frames = []
        snapshots = set()
        while True:
            got = self.wait_for(RESULT)
            require(got.sequence == self.last_request, "the answer's request id")
            metric, at_stamp, hits = decode_result(got)
            frames.append((metric, hits))
            snapshots.add(at_stamp)
            if not got.flags & 1:
                break
        require(len(snapshots) == 1, "the frames of one answer name one snapshot")
        self.last_snapshot = snapshots.pop()
        require((self.last_snapshot != 0) == snapshot, "a snapshot where it was asked for")
        return frames

    def introspect(self, what):
        """Space records, or the status text."""
        self.last_request += 1
        self.send(frame(INTROSPECT, bytes([what]), session=self.session,
                        sequence=self.last_request))
        parts = []
        while True:
            got = self.wait_for(INTROSPECTION)
            require(got.sequence == self.last_request, "the answer's request id")
            parts.append(got)
            if not got.flags & 1:
                break
        if what == SPACES:
            return [space for part in parts for space in decode_spaces(part)]
        return b"".join(part.body[8:] for part in parts).decode()

    def send_command(self, what, space):
        name = space.encode()
        self.last_request += 1
        self.send(frame(COMMAND, bytes([what, len(name)]) + bytes(6) + name, session=self.session,
                        sequence=self.last_request))

    def counters(self):
        """{counter: sum over cores}, without what is text"""
        sums = collections.Counter()
        for line in self.introspect(STATUS).splitlines():
            _, name, value = line.split(" ", 2)
            if value.isdigit():
                sums[name] += int(value)
        return sums

    def ping(self, sequence=7):
        self.send(frame(PING, session=self.session, sequence=sequence))
        got = self.wait_for(PING)
        require(got.flags == 1 and got.sequence == sequence and not got.body, "ping's answer")

    def close(self):
        """Says close, returns the sequence of the server's close."""
        self.send(frame(CLOSE, session=self.session))
        got = self.wait_for(CLOSE)
        self.wait_end()
        self.socket.close()
        return got.sequence
