#!/usr/bin/python3
"""Streams over WebSocket from clients that are not ours: Node's ws, and a page in Chromium.

Not through env: another Python in PATH has no websocket-client.
"""

import http.server
import json
import os
import pathlib
import queue
import shutil
import subprocess
import tempfile
import threading
import unittest

import daemon
from websocket_test import http_address

FOLDER = pathlib.Path(__file__).resolve().parent
WAIT_S = 120
COUNT = 1000
PAGE = """<!doctype html><meta charset="utf-8"><title>observations</title>
<script src="stream_client.js"></script>
<script>
  const query = new URLSearchParams(location.search);
  streamAndRecall(WebSocket, query.get("address"), query.get("space"), Number(query.get("count")))
    .catch((error) => ({error: String(error)}))
    .then((seen) => fetch("/seen", {method: "POST", body: JSON.stringify(seen)}));
</script>"""


class Pages(http.server.BaseHTTPRequestHandler):
    """The page, its script, and what it saw."""

    def do_GET(self):
        if self.path.startswith("/page"):
            self.answer(PAGE.encode(), "text/html")
        elif self.path == "/stream_client.js":
            self.answer((FOLDER / "stream_client.js").read_bytes(), "text/javascript")
        else:
            self.send_error(404)

    def do_POST(self):
        self.server.seen.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.answer(b"", "text/plain")

    def answer(self, body, kind):
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class OtherClients(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.daemon = daemon.Daemon({"listen.http": "127.0.0.1:0"})
        cls.address = f"ws://{http_address(cls.daemon)}/v1/stream"

    @classmethod
    def tearDownClass(cls):
        cls.daemon.stop()

    def assert_streamed(self, seen):
        self.assertEqual(seen, {
            "acked": COUNT, "inOrder": True, "final": COUNT, "code": 1000,
            "found": [[i, f"o{i}", f"number {i} ☂"] for i in (0, COUNT // 2, COUNT - 1)]})

    def test_node(self):
        environment = {**os.environ, "NODE_PATH": "/usr/share/nodejs"}
        if shutil.which("node") is None or subprocess.run(
                ["node", "-e", "require('ws')"], env=environment, capture_output=True,
                check=False).returncode != 0:
            self.skipTest("needs nodejs and node-ws")
        done = subprocess.run(
            ["node", str(FOLDER / "stream_client.js"), self.address, "node", str(COUNT)],
            env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assert_streamed(json.loads(done.stdout))

    def page(self, host, space):
        """What a page that comes from `host` saw, in a browser of its own."""
        chromium = shutil.which("chromium")
        if chromium is None:
            self.skipTest("needs chromium")
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
        server.seen = queue.Queue()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        profile = self.enterContext(tempfile.TemporaryDirectory(prefix="engramd-test-"))
        browser = subprocess.Popen(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-dev-shm-usage", "--disable-background-networking",
             "--no-proxy-server", f"--user-data-dir={profile}",
             f"--host-resolver-rules=MAP {host} 127.0.0.1",
             f"http://{host}:{server.server_port}/page?address={self.address}&space={space}"
             f"&count={COUNT}"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        log = daemon.Log(browser.stderr)
        try:
            return server.seen.get(timeout=WAIT_S)
        except queue.Empty:
            self.fail(f"the page has not answered:\n{log.text()}")
        finally:
            browser.kill()
            browser.wait()

    def test_a_page_in_chromium(self):
        self.assert_streamed(self.page("localhost", "chromium"))

    def test_a_page_of_somebody_else(self):
        seen = self.page("elsewhere.example", "hijacked")
        self.assertEqual(list(seen), ["error"], seen)


if __name__ == "__main__":
    daemon.main()
