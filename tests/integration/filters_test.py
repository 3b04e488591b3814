#!/usr/bin/env python3
"""Recalls that filter: by attributes, tags and time, over native frames and with engramctl."""

import struct
import tempfile

import daemon
import frames

SECOND = 1_000_000_000
KINDS = [b"docs", b"mail", b"chat"]
ROWS = 300


def attributes_of(row):
    """A source in turn, a tag for each third of the rows, another for each tenth row."""
    pairs = [(b"source", KINDS[row % 3]), (b"", b"third-%d" % (row * 3 // ROWS))]
    if row % 10 == 0:
        pairs += [(b"", b"tenth"), (b"who", b"Ada"), (b"who", b"Grace")]
    return frames.attributes(*pairs)


def wanted(holds):
    """Rows, nearest to row 0 first: the vector of row i is i away from that of row 0."""
    return [b"%d" % row for row in range(ROWS) if holds(row)]


class FilteredRecalls(daemon.DaemonCase):
    settings = {"index.filter_keys": ["source", "category"]}

    def store(self, space):
        client = self.daemon.client(space, metric=frames.L2, dimension=2,
                                    features=frames.ATTRIBUTES)
        self.assertEqual(client.hello_ack.features, frames.ATTRIBUTES)
        naks = client.observe([
            frames.record(b"%d" % row, [float(row), 0.0], payload=b"about %d" % row,
                          when_ns=row * SECOND, attributes=attributes_of(row))
            for row in range(ROWS)])
        self.assertEqual(naks, [])
        return client

    def found(self, client, *clauses, k=ROWS, **times):
        hits = client.recall([0.0, 0.0], k, payload=True,
                             filter=frames.recall_filter(*clauses, **times))
        for hit in hits:
            self.assertEqual(hit.payload, b"about " + hit.id)
        return [hit.id for hit in hits]

    def test_payloads_come_back_behind_attributes(self):
        with self.store("payloads") as client:
            self.assertEqual(self.found(client), wanted(lambda row: True))

    def test_each_clause_narrows(self):
        with self.store("clauses") as client:
            self.assertEqual(self.found(client, (b"source", [b"docs"])),
                             wanted(lambda row: row % 3 == 0))
            self.assertEqual(self.found(client, (b"source", [b"docs", b"chat"])),
                             wanted(lambda row: row % 3 != 1))
            self.assertEqual(self.found(client, (b"source", [b"docs"], True)),
                             wanted(lambda row: row % 3 != 0))
            self.assertEqual(self.found(client, (b"source", [b"docs"]), (b"", [b"third-1"])),
                             wanted(lambda row: row % 3 == 0 and 100 <= row < 200))
            self.assertEqual(self.found(client, (b"", [b"tenth"]), (b"who", [b"Grace"]),
                                        (b"", [b"third-0"], True)),
                             wanted(lambda row: row % 10 == 0 and row >= 100))
            self.assertEqual(self.found(client, (b"source", [b"nowhere"])), [])

    def test_times_are_from_and_before(self):
        with self.store("times") as client:
            self.assertEqual(self.found(client, begin_ns=10 * SECOND, end_ns=20 * SECOND),
                             wanted(lambda row: 10 <= row < 20))
            self.assertEqual(self.found(client, (b"", [b"tenth"]), begin_ns=95 * SECOND),
                             wanted(lambda row: row % 10 == 0 and row >= 95))

    def test_k_counts_what_holds(self):
        with self.store("counts") as client:
            self.assertEqual(self.found(client, (b"", [b"tenth"]), k=7),
                             wanted(lambda row: row % 10 == 0)[:7])

    def test_an_update_changes_what_it_is_found_by(self):
        with self.store("updates") as client:
            client.observe([frames.record(b"5", [5.0, 0.0], payload=b"about 5",
                                          attributes=frames.attributes((b"source", b"new")))])
            self.assertEqual(self.found(client, (b"source", [b"new"])), [b"5"])
            self.assertNotIn(b"5", self.found(client, (b"source", [b"chat"])))

    def test_filters_hold_after_a_restart(self):
        with self.store("restart"):
            pass
        self.daemon.kill()
        self.daemon.spawn()
        self.daemon.wait_ready()
        with self.daemon.client("restart", features=frames.ATTRIBUTES) as client:
            self.assertEqual(self.found(client, (b"", [b"tenth"])),
                             wanted(lambda row: row % 10 == 0))

    def test_an_unknown_key_is_refused(self):
        with self.store("unknown") as client:
            with self.assertRaises(frames.Refused) as refused:
                self.found(client, (b"color", [b"red"]))
            self.assertEqual(refused.exception.nak.name, "unknown_filter_key")
            self.assertIn("filter_keys", refused.exception.nak.text)
            self.assertEqual(len(self.found(client, (b"source", [b"docs"]))), ROWS // 3)

    def test_engramctl_loads_columns_and_filters_by_them(self):
        with tempfile.TemporaryDirectory() as folder:
            vectors, texts = f"{folder}/v.fvecs", f"{folder}/t.tsv"
            with open(vectors, "wb") as file:
                for row in range(30):
                    file.write(struct.pack("<i2f", 2, 1.0, row))
            with open(texts, "w", encoding="utf-8") as file:
                for row in range(30):
                    source = "odd" if row % 2 else "even"
                    file.write(f"{row}\t{source}\tc{row % 3}\tk\tt{row}\n")
            loaded = daemon.engramctl("load", "--data", vectors, "--texts", texts, "--space",
                                      "columns", "--metric", "l2",
                                      address=self.daemon.address_text)
            self.assertEqual((loaded.returncode, loaded.stderr), (0, ""))
            with self.daemon.client("columns", features=frames.ATTRIBUTES) as client:
                hits = client.recall([1.0, 0.0], 30, filter=frames.recall_filter(
                    (b"source", [b"even"]), (b"category", [b"c1"])))
                self.assertEqual([int(hit.id) for hit in hits], [4, 10, 16, 22, 28])


if __name__ == "__main__":
    daemon.main()
