#!/usr/bin/python3
"""Calls over HTTP: memories, spaces, health, and what is refused."""

import http.client
import json
import random
import socket
import threading
import time
import unittest
import urllib.parse

import daemon
import frames
from websocket_test import DIMENSION, Stream, direction, http_address

WAIT_S = 60


class Answer:
    def __init__(self, answer):
        self.status = answer.status
        self.headers = answer.headers
        text = answer.read()
        self.body = json.loads(text) if text else None
        self.code = self.body["error"]["code"] if self.body and "error" in self.body else None
        self.message = self.body["error"]["message"] if self.code else None


class Client:
    """One connection, kept alive from call to call."""

    def __init__(self, address):
        host, _, port = address.rpartition(":")
        self.connection = http.client.HTTPConnection(host, int(port), timeout=WAIT_S)

    def ask(self, method, target, body=None, headers=None):
        if body is not None and not isinstance(body, (bytes, str)):
            body = json.dumps(body)
        self.connection.request(method, target, body, headers or {})
        return Answer(self.connection.getresponse())

    def get(self, target, **headers):
        return self.ask("GET", target, headers=headers)

    def post(self, target, body, **headers):
        return self.ask("POST", target, body, headers)

    def delete(self, target, **headers):
        return self.ask("DELETE", target, headers=headers)

    def remember(self, space, identity, vector, **fields):
        return self.post(f"/api/v1/memories/remember?space={space}",
                         {"id": identity, "embedding": vector, **fields})

    def recall(self, space, vector, **fields):
        return self.post(f"/api/v1/memories/recall?space={space}", {"vector": vector, **fields})

    def ids(self, space, *ids):
        query = urllib.parse.urlencode([("id", each) for each in ids])
        return self.get(f"/api/v1/memories/recall?space={space}&{query}")


class HttpCase(unittest.TestCase):
    """Cases on one daemon, each in a space of its own."""

    settings = {}

    @classmethod
    def setUpClass(cls):
        cls.daemon = daemon.Daemon({"listen.http": "127.0.0.1:0", **cls.settings})
        cls.address = http_address(cls.daemon)
        cls.client = Client(cls.address)

    @classmethod
    def tearDownClass(cls):
        cls.client.connection.close()
        cls.daemon.stop()

    def setUp(self):
        self.space = self.id().rpartition(".")[2].removeprefix("test_").lower()

    def tearDown(self):
        self.assertIsNone(self.daemon.process.poll(), self.daemon.log.text())
        self.assertEqual(self.client.get("/health/ready").status, 200)

    def assert_refused(self, answer, status, code, text):
        self.assertEqual((answer.status, answer.code), (status, code), answer.body)
        self.assertRegex(answer.message, text)

    def raw(self, data, shut=True):
        """What the server answers to these bytes, until it closes."""
        host, _, port = self.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=WAIT_S) as connection:
            try:
                connection.sendall(data)
                if shut:
                    connection.shutdown(socket.SHUT_WR)
            except ConnectionError:
                pass
            answer = b""
            try:
                while part := connection.recv(65536):
                    answer += part
            except ConnectionError:
                pass
            return answer


class Memories(HttpCase):
    def test_hundreds_remembered_and_recalled(self):
        generator = random.Random(1)
        vectors = {f"m{i}": direction(generator) for i in range(300)}
        for identity, vector in vectors.items():
            done = self.client.remember(self.space, identity, vector, what=f"this is {identity}",
                                        encoding_confidence=0.9)
            self.assertEqual((done.status, done.body["memory_id"], done.body["existed"]),
                             (200, identity, False), done.body)
        self.assertRegex(done.body["committed_at"], r"^20\d\d-\d\d-\d\dT.*Z$")
        for identity in generator.sample(list(vectors), 30):
            found = self.client.recall(self.space, vectors[identity], max_results=3).body
            self.assertEqual([found["results"][0][key] for key in ("id", "content")],
                             [identity, f"this is {identity}"])
            self.assertEqual(len(found["results"]), 3)
            self.assertEqual(found["metadata"]["total_activated"], 3)
            self.assertAlmostEqual(found["results"][0]["confidence"], 0.9, delta=0.001)
            numbers = ",".join(map(repr, vectors[identity]))
            same = self.client.get(
                f"/api/v1/memories/recall?space={self.space}&vector={numbers}&max_results=3").body
            self.assertEqual([each["id"] for each in same["results"]],
                             [each["id"] for each in found["results"]])
        self.assertTrue(self.client.remember(self.space, "m0", vectors["m1"]).body["existed"])
        drawn = self.client.post(f"/api/v1/memories/remember?space={self.space}",
                                 {"embedding": vectors["m2"]}).body["memory_id"]
        self.assertRegex(drawn, "^[0-9a-f]{32}$")
        found = self.client.ids(self.space, "m5", "none", drawn, "m4").body["results"]
        self.assertEqual([each["id"] for each in found], ["m5", drawn, "m4"])

    def test_what_is_removed_or_hidden(self):
        odd = "ä/b c?&%"
        path = "/api/v1/memories/" + urllib.parse.quote(odd, safe="")
        space = f"?space={self.space}"
        self.client.remember(self.space, odd, [1, 0])
        hidden = self.client.delete(f"{path}{space}&mode=suppress")
        self.assertEqual((hidden.status, hidden.body["reversible"]), (200, True))
        self.assertEqual(self.client.ids(self.space, odd).body["results"], [])
        self.assertEqual(self.client.delete(f"{path}{space}&mode=restore").status, 200)
        self.assertEqual(self.client.ids(self.space, odd).body["results"][0]["id"], odd)
        self.assertEqual(self.client.delete(path + space).body,
                         {"id": odd, "memories_affected": 1, "reversible": False})
        self.assert_refused(self.client.delete(path + space), 404, "not_found", "^id: ")
        self.assertEqual(self.client.recall(self.space, [1, 0]).body["results"], [])
        # A memory may be called like a call.
        self.client.remember(self.space, "recall", [1, 0])
        self.assertEqual(self.client.delete(f"/api/v1/memories/recall{space}").status, 200)
        self.assert_refused(self.client.delete(f"{path}{space}&mode=away"), 400,
                            "invalid_argument", '^mode: "away"; expected delete, suppress')

    def test_recall_by_filter_and_embedding(self):
        for i, who in enumerate(("Ada", "Grace", "Ada")):
            self.client.remember(self.space, f"m{i}", [1, i], who=[who],
                                 when=f"2020-01-0{i + 1}T00:00:00Z")
        found = self.client.recall(self.space, [1, 1], filter={"metadata": {"who": "Ada"}},
                                   include_embedding=True).body["results"]
        self.assertEqual({each["id"]: each["embedding"] for each in found},
                         {"m0": [1, 0], "m2": [1, 2]})
        found = self.client.post(f"/api/v1/memories/recall?space={self.space}",
                                 {"filter": {"time_start": "2020-01-02T00:00:00Z"}}).body
        self.assertEqual([each["id"] for each in found["results"]], ["m2", "m1"])
        snapshot = self.client.recall(self.space, [1, 1], snapshot_isolation=True).body
        self.assertGreater(snapshot["snapshot_sequence"], 0)

    def test_spaces_must_agree(self):
        remember = "/api/v1/memories/remember"
        body = {"id": "a", "embedding": [1.0]}
        for target, header, field in ((f"{remember}?space=b", "a", None), (remember, "a", "b"),
                                      (f"{remember}?space=b", "", "a")):
            answer = self.client.post(target, {**body, **({"memory_space_id": field} if field
                                                          else {})}, **{"x-memory-space": header})
            self.assert_refused(answer, 400, "invalid_argument", '; .* says "')
        for target, header, field in ((f"{remember}?space={self.space}", "", ""),
                                      (remember, self.space, ""), (remember, "", self.space),
                                      (f"{remember}?space={self.space}", self.space, self.space)):
            answer = self.client.post(target, {**body, "memory_space_id": field},
                                      **{"x-memory-space": header})
            self.assertEqual(answer.status, 200, answer.body)
        self.assertEqual(len(self.client.ids(self.space, "a").body["results"]), 1)
        for bad in ("No", "x" * 65, "a b"):
            answer = self.client.post(remember, body, **{"x-memory-space": bad})
            self.assert_refused(answer, 400, "invalid_argument", "^x-memory-space: .*expected 1 to")
        twice = self.raw(b"GET /api/v1/memories/recall?id=a HTTP/1.1\r\nHost: x\r\nx-memory-space: "
                         b"a\r\nX-Memory-Space: b\r\nConnection: close\r\n\r\n")
        self.assertRegex(twice, b"^HTTP/1.1 400 .*given twice(?s:.)*$|(?s:.*)given twice")

    def test_wrong_arguments(self):
        post = self.client.post
        remember = f"/api/v1/memories/remember?space={self.space}"
        recall = f"/api/v1/memories/recall?space={self.space}"
        for body, code, text in (
                ("", "bad_json", "^body: not JSON, empty"), ("[1]", "bad_json", "expected an object"),
                ("{}", "invalid_argument", "^embedding: 0 values; expected 1 to 4096$"),
                ('{"embedding":[1,NaN]}', "invalid_argument", r"^embedding\[1\]: NaN; expected"),
                ('{"embedding":[1e39]}', "invalid_argument", r"^embedding\[0\]: 1e39; expected"),
                ('{"embedding":[1],"when":7}', "invalid_argument", "^when: 7; expected a time"),
                ('{"embedding":[1],"encoding_confidence":2}', "invalid_argument",
                 "^encoding_confidence: 2; expected 0 to 1$"),
                (b'{"what":"\xff"}', "bad_json", "not UTF-8"),
                (json.dumps({"embedding": [1], "id": "x" * 257}), "invalid_argument",
                 "^id: 257 bytes; expected 1 to 256$"),
                (json.dumps({"embedding": [1], "what": "x" * 70000}), "invalid_argument",
                 "bytes besides id and embedding")):
            with self.subTest(body[:40]):
                self.assert_refused(post(remember, body), 400, code, text)
        self.client.remember(self.space, "a", [1, 2])
        self.assert_refused(self.client.remember(self.space, "a", [1]), 400, "wrong_dimension",
                            "^embedding: 1 values; the space .* has dimension 2$")
        self.assert_refused(self.client.remember(self.space, "a", [0, 0]), 400, "zero_vector",
                            "^embedding: all 2 values are 0")
        for body, text in (({}, "^vector: missing"), ({"vector": []}, "^vector: 0 values"),
                           ({"vector": [1], "max_results": 1001}, "^max_results: 1001; expected"),
                           ({"vector": [1], "ef_search": 10001}, "^ef_search: "),
                           ({"vector": [1], "similarity_threshold": "x"}, "^similarity_threshold"),
                           ({"vector": [1], "snapshot_time": "2999-01-01T00:00:00Z"},
                            "^snapshot_time: ")):
            with self.subTest(body):
                self.assert_refused(post(recall, body), 400, "invalid_argument", text)
        for query, text in (("", "^vector: missing"), ("&vector=1,x", r'^vector\[1\]: "x"'),
                            ("&vector=1,,2", r"^vector\[1\]: "), ("&vector=nan", r"^vector\[0\]: "),
                            ("&vector=1&max_results=-1", '^max_results: "-1"'),
                            ("&id=" + "x" * 257, "^id: 257 bytes"), ("&id=", "^id: empty"),
                            ("&id=a" * 101, "^id: 101 of them; expected up to 100")):
            with self.subTest(query[:40]):
                self.assert_refused(self.client.get(recall + query), 400, "invalid_argument", text)
        self.assert_refused(self.client.get(recall + "&vector=1"), 400, "wrong_dimension",
                            "^vector: 1 values; the space")


class Spaces(HttpCase):
    def spaces(self):
        return {each["id"]: each for each in self.client.get("/api/v1/spaces").body["spaces"]}

    def test_made_listed_and_dropped(self):
        made = self.client.post("/api/v1/spaces", {"id": self.space, "metric": "l2",
                                                   "dimension": 2})
        self.assertEqual((made.status, made.body),
                         (201, {"id": self.space, "metric": "l2", "dimension": 2}))
        again = self.client.post("/api/v1/spaces", {"id": self.space})
        self.assert_refused(again, 409, "already_exists", "of metric l2 and dimension 2$")
        self.assert_refused(self.client.remember(self.space, "a", [1.0]), 400, "wrong_dimension",
                            "has dimension 2")
        for i in range(5):
            self.client.remember(self.space, f"m{i}", [i, i])
        listed = self.spaces()[self.space]
        self.assertEqual((listed["metric"], listed["dimension"], listed["observations"]),
                         ("l2", 2, 5))
        dropped = self.client.delete(f"/api/v1/spaces/{self.space}")
        self.assertEqual((dropped.status, dropped.body["observations_dropped"]), (200, 5))
        self.assert_refused(self.client.delete(f"/api/v1/spaces/{self.space}"), 404,
                            "unknown_space", "^unknown_space: ")
        # The name may be used again, otherwise.
        self.client.remember(self.space, "a", [1.0])
        self.assertEqual(self.spaces()[self.space]["metric"], "cosine")

    def test_wrong_ones(self):
        for body, text in (({}, '^id: ""'), ({"id": "No!"}, '^id: "No!"; expected 1 to 64'),
                           ({"id": "a", "metric": "far"}, '^metric: "far"; expected "cosine"'),
                           ({"id": "a", "dimension": 5000}, "^dimension: 5000; expected 0 to"),
                           ({"id": 7}, "^id: 7; expected a text")):
            self.assert_refused(self.client.post("/api/v1/spaces", body), 400,
                                "invalid_argument", text)
        self.assert_refused(self.client.delete("/api/v1/spaces/No"), 400, "invalid_argument", "^id")


class SpacesAndRestarts(unittest.TestCase):
    def test_a_made_space_outlives_a_kill(self):
        running = daemon.Daemon({"listen.http": "127.0.0.1:0"})
        client = Client(http_address(running))
        for i in range(3):
            self.assertEqual(client.post("/api/v1/spaces", {
                "id": f"s{i}", "metric": ("cosine", "ip", "l2")[i], "dimension": 7 + i}).status, 201)
        running.kill()
        running.spawn()
        running.wait_ready()
        client = Client(http_address(running))
        listed = {each["id"]: (each["metric"], each["dimension"], each["observations"])
                  for each in client.get("/api/v1/spaces").body["spaces"]}
        self.assertEqual(listed, {"s0": ("cosine", 7, 0), "s1": ("ip", 8, 0), "s2": ("l2", 9, 0)})
        running.stop()


class Served(HttpCase):
    def test_health_and_what_is_not_there(self):
        self.assertEqual(self.client.get("/health/live").body, {"status": "live"})
        self.assertEqual(self.client.get("/health/ready").body, {"status": "ready"})
        for target in ("/", "/health", "/api/v1", "/api/v1/memories/", "/api/v1/memory/remember",
                       "/api/v1/spacesx", "/metrics", "/api/v1/stream/activities", "/v1"):
            self.assert_refused(self.client.get(target), 404, "not_found", "^path: ")
        for method, target, allow in (("PUT", "/health/live", "GET"),
                                      ("PUT", "/api/v1/spaces", "GET, POST"),
                                      ("GET", "/api/v1/memories/remember", "POST"),
                                      ("PATCH", "/api/v1/memories/recall", "GET, POST"),
                                      ("POST", "/api/v1/memories/other", "DELETE"),
                                      ("GET", "/api/v1/spaces/other", "DELETE")):
            answer = self.client.ask(method, target)
            self.assert_refused(answer, 405, "method_not_allowed", allow)
            self.assertEqual(answer.headers["Allow"], allow)
        self.assert_refused(self.client.get("/v1/stream"), 426, "upgrade_required", "WebSocket")
        self.assert_refused(self.client.get("/health/live%"), 404, "not_found", "^path")
        self.assert_refused(self.client.get("/health/live?%zz=1"), 400, "bad_target", "^target: ")

    def test_origins(self):
        for origin in ("https://example.com", "null", "http://127.0.0.1.example.com"):
            client = Client(self.address)
            self.assert_refused(client.get("/health/live", Origin=origin), 403, "bad_origin",
                                "^Origin: ")
        page = "http://localhost:3000"
        answer = self.client.get("/health/live", Origin=page)
        self.assertEqual((answer.status, answer.headers["Access-Control-Allow-Origin"]),
                         (200, page))
        preflight = self.client.ask("OPTIONS", "/api/v1/memories/remember", headers={
            "Origin": page, "Access-Control-Request-Method": "POST"})
        self.assertEqual((preflight.status, preflight.headers["Access-Control-Allow-Origin"]),
                         (204, page))
        self.assertIsNone(self.client.get("/health/live").headers["Access-Control-Allow-Origin"])

    def test_many_connections_at_once(self):
        def work(i):
            client = Client(self.address)
            generator = random.Random(i)
            for n in range(20):
                vector = direction(generator)
                done = client.remember(self.space, f"{i}-{n}", vector)
                found = client.recall(self.space, vector, max_results=1)
                if (done.status, found.body["results"][0]["id"]) != (200, f"{i}-{n}"):
                    wrong.append((done.body, found.body))
        wrong = []
        threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])

    def test_hostile_requests(self):
        for data, status in (
                (b"nonsense\r\n\r\n", b"400"), (b"GET / HTTP/9.9\r\n\r\n", b"400"),
                (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"400"),
                (b"GET / HTTP/1.1\r\nHost: " + b"x" * 20000 + b"\r\n\r\n", b"431"),
                (b"GET / HTTP/1.1\r\nA: b\r\n" * 3 + b"\r\n", b"400"),
                (b"POST /api/v1/memories/remember HTTP/1.1\r\nContent-Length: 5000000\r\n\r\n{",
                 b"413"),
                (b"POST /api/v1/memories/remember HTTP/1.1\r\nContent-Length: -1\r\n\r\n{", b"400"),
                (b"POST /api/v1/memories/remember HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
                 + b"100000\r\n" + b" " * 0x100000 + b"\r\n"
                 + (b"100000\r\n" + b" " * 0x100000 + b"\r\n") * 4, b"413"),
                (b"POST /api/v1/memories/remember HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
                 b"zz\r\n", b"400"),
                (b"GET /v1/stream HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
                 b"Sec-WebSocket-Version: 1\r\n\r\n", b"4")):
            with self.subTest(data[:60]):
                self.assertRegex(self.raw(data), b"^HTTP/1.1 " + status)
        # Cut at any place.
        whole = (b"POST /api/v1/memories/remember HTTP/1.1\r\nHost: x\r\nContent-Length: 30\r\n\r\n"
                 b'{"id":"a","embedding":[1,2,3]}')
        for i in range(0, len(whole), 9):
            self.raw(whole[:i])
        # Several requests at once are answered in turn.
        three = self.raw(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
        self.assertEqual(three.count(b"HTTP/1.1 200"), 3)
        chunked = self.raw(
            b"POST /api/v1/memories/remember HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            b"Connection: close\r\n\r\n10\r\n" + b'{"id":"c","embed' + b"\r\nc\r\n"
            + b'ding":[1,2]}' + b"\r\n0\r\n\r\n", shut=False)
        self.assertRegex(chunked, b"^HTTP/1.1 200")
        expecting = self.raw(
            b"POST /api/v1/memories/remember HTTP/1.1\r\nHost: x\r\nContent-Length: 27\r\n"
            b"Expect: 100-continue\r\nConnection: close\r\n\r\n" + b'{"id":"c","embedding":[1,2]}',
            shut=False)
        self.assertRegex(expecting, b"^HTTP/1.1 100 Continue(?s:.*)HTTP/1.1 ")

    def test_bytes_at_random(self):
        generator = random.Random(5)
        whole = (b"POST /api/v1/memories/recall?space=r HTTP/1.1\r\nHost: x\r\nOrigin: http://x\r\n"
                 b'Content-Length: 34\r\n\r\n{"vector":[1,2,3],"max_results":3}')
        for _ in range(300):
            data = bytearray(whole)
            for _ in range(generator.randrange(1, 6)):
                data[generator.randrange(len(data))] = generator.randrange(256)
            self.raw(bytes(data[:generator.randrange(1, len(data) + 1)]))


class Limited(HttpCase):
    settings = {"limits.max_connections": 20}

    def test_connections_beyond_the_limit(self):
        host, _, port = self.address.rpartition(":")
        held = [socket.create_connection((host, int(port)), timeout=WAIT_S) for _ in range(40)]
        refused = 0
        for each in held:
            each.settimeout(0.2)
            try:
                refused += each.recv(100).startswith(b"HTTP/1.1 503") or True
            except (TimeoutError, socket.timeout):
                pass
            except ConnectionError:
                refused += 1
        self.assertGreaterEqual(refused, 20)
        for each in held:
            each.close()
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                if Client(self.address).get("/health/live").status == 200:
                    break
            except (ConnectionError, http.client.HTTPException):
                self.assertLess(time.monotonic(), deadline)


class Recovering(unittest.TestCase):
    def test_not_ready_until_the_log_is_read(self):
        running = daemon.Daemon({"listen.http": "127.0.0.1:0", "data.checkpoint_mib": 0})
        address = http_address(running)
        stream = Stream(address).open("long")
        generator = random.Random(1)
        texts = [json.dumps(direction(generator, 512)) for _ in range(50)]
        total = 6000
        def send():
            for i in range(total):
                stream.send_text('{"type":"observation","sequence_number":%d,"episode":{"id":"%d",'
                                 '"embedding":%s}}' % (i + 1, i, texts[i % 50]))
        sender = threading.Thread(target=send)
        sender.start()
        for _ in range(total):
            stream.ack()
        sender.join()
        # Without the checkpoint of a stop.
        running.kill()
        config = running.config.read_text().replace('http = "127.0.0.1:0"', f'http = "{address}"')
        running.config.write_text(config)
        running.spawn()
        seen = set()
        while True:
            try:
                client = Client(address)
                ready = client.get("/health/ready")
                live = client.get("/health/live")
                self.assertEqual(live.status, 200)
                seen.add(ready.status)
                if ready.status == 200:
                    break
                self.assertEqual((ready.status, ready.code), (503, "recovering"))
                self.assertRegex(ready.message, "observations stored again: .* of .* MiB read")
                self.assertGreaterEqual(int(ready.headers["Retry-After"]), 1)
                refused = client.recall("long", [1])
                if refused.status != 503:
                    continue
                self.assertEqual(refused.code, "recovering")
            except (ConnectionError, http.client.HTTPException):
                self.assertIsNone(running.process.poll())
        running.wait_ready()
        self.assertIn(503, seen, "the log was read before anybody could ask")
        self.assertEqual(Client(address).recall("long", json.loads(texts[0])).status, 200)
        running.stop()


class Configured(unittest.TestCase):
    def test_a_port_that_is_taken(self):
        with daemon.running({"listen.http": "127.0.0.1:0"}) as running:
            address = http_address(running)
            code, log = daemon.start_that_fails(daemon.toml({
                "listen.tcp": "127.0.0.1:0", "listen.grpc": "", "listen.http": address,
                "memory.limit_mib": 256}))
            self.assertEqual(code, 1)
            self.assertIn(f"listen.http: cannot listen on {address}: Address already in use", log)

    def test_further_origins(self):
        with daemon.running({"listen.http": "127.0.0.1:0",
                             "listen.http_origins": ["https://app.example.com"]}) as running:
            client = Client(http_address(running))
            self.assertEqual(client.get("/health/live",
                                        Origin="https://app.example.com").status, 200)
            self.assertEqual(client.get("/health/live", Origin="https://example.com").status, 403)


if __name__ == "__main__":
    daemon.main()
