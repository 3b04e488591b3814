#!/usr/bin/env python3
"""Spaces side by side: ten connections at once, and ids that are unique in their space only."""

import concurrent.futures
import random

import daemon
import frames

RECORDS, IDS = 600, 40


def feed(client, seed):
    """Sends RECORDS operations, waiting for credit only. Returns {id: last sequence} left."""
    order = random.Random(seed)
    left, batch = {}, []
    for sequence in range(1, RECORDS + 1):
        identity = b"id-%d" % order.randrange(IDS)
        if order.random() < 0.2:
            batch.append(frames.record(identity, op=frames.DELETE))
            left.pop(identity, None)
        else:
            batch.append(frames.record(identity, [float(seed), float(sequence), 1.0],
                                       payload=b"%d/%d" % (seed, sequence), when_ns=sequence))
            left[identity] = sequence
        if len(batch) == order.randint(1, 7) or len(batch) == 7 or sequence == RECORDS:
            client.send_observe(batch)
            batch = []
    return left


@daemon.on_each_backend
class SpacesTest(daemon.DaemonCase):

    def feed_and_check(self, seed):
        with self.daemon.client(f"space-{seed}", metric=frames.L2) as client:
            left = feed(client, seed)
            client.wait_acked(RECORDS)
            self.assertEqual(client.naks, [])
            # wait_for has seen each ack rise or stay; none may run ahead of what was sent.
            self.assertEqual(client.acks[-1], RECORDS)
            hits = client.recall([float(seed), 0.0, 1.0], 1000, payload=True)
            self.assertEqual({hit.id: hit.when_ns for hit in hits}, left)
            for hit in hits:
                self.assertEqual(hit.payload, b"%d/%d" % (seed, hit.when_ns))
                self.assertEqual(hit.score, hit.when_ns ** 2)
            self.assertEqual([hit.score for hit in hits], sorted(hit.score for hit in hits))
            self.assertEqual(client.close(), RECORDS)
        return len(left)

    def test_ten_connections_to_ten_spaces_keep_their_order(self):
        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            counts = list(pool.map(self.feed_and_check, range(1, 11)))
        with self.daemon.client(features=frames.NO_SESSION) as client:
            client.hello("space-1", features=frames.NO_SESSION)
            found = {space.name: space for space in client.introspect(frames.SPACES)}
        for seed, count in zip(range(1, 11), counts):
            space = found[f"space-{seed}"]
            self.assertEqual((space.observations, space.dimension, space.metric),
                             (count, 3, frames.L2))
            self.assertEqual(space.linked + space.unlinked, count)

    def test_the_same_id_in_two_spaces_is_two_observations(self):
        with self.daemon.client("left", metric=frames.L2) as left, \
                self.daemon.client("right", metric=frames.INNER_PRODUCT) as right:
            def contents(client, query):
                return {hit.id: (hit.score, hit.payload)
                        for hit in client.recall(query, 10, payload=True)}
            left.observe([frames.record(b"x", [1.0, 1.0], payload=b"l1")])
            right.observe([frames.record(b"x", [2.0, 0.0, 1.0], payload=b"r1")])
            self.assertEqual(contents(left, [0.0, 0.0]), {b"x": (2.0, b"l1")})
            self.assertEqual(contents(right, [1.0, 0.0, 0.0]), {b"x": (2.0, b"r1")})
            # An update of the one is not seen by the other.
            left.observe([frames.record(b"x", [3.0, 0.0], payload=b"l2")])
            self.assertEqual(contents(left, [0.0, 0.0]), {b"x": (9.0, b"l2")})
            self.assertEqual(contents(right, [1.0, 0.0, 0.0]), {b"x": (2.0, b"r1")})
            # Nor a delete.
            left.observe([frames.record(b"x", op=frames.DELETE)])
            self.assertEqual(contents(left, [0.0, 0.0]), {})
            self.assertEqual(contents(right, [1.0, 0.0, 0.0]), {b"x": (2.0, b"r1")})
            # And it can come back, in its own space only.
            right.observe([frames.record(b"x", op=frames.DELETE)])
            left.observe([frames.record(b"x", [0.0, 1.0], payload=b"l3")])
            self.assertEqual(contents(left, [0.0, 0.0]), {b"x": (1.0, b"l3")})
            self.assertEqual(contents(right, [1.0, 0.0, 0.0]), {})

    def test_what_is_acked_is_found_by_another_connection(self):
        with self.daemon.client("shared", metric=frames.L2) as writer, \
                self.daemon.client("shared", features=frames.NO_SESSION) as reader:
            for value in range(200):
                writer.observe([frames.record(b"%d" % value, [float(value), 0.0])])
                nearest = reader.recall([float(value), 0.0], 1)
                self.assertEqual((nearest[0].id, nearest[0].score), (b"%d" % value, 0.0))

    def test_no_space_named_is_the_space_default(self):
        with self.daemon.client("") as client, self.daemon.client("default") as other:
            client.observe([frames.record(b"here", [1.0, 0.0])])
            hits = other.recall([2.0, 0.0], 1)
            self.assertEqual(hits[0].id, b"here")
            self.assertAlmostEqual(hits[0].score, 1.0, 6)  # cosine is a new space's metric


if __name__ == "__main__":
    daemon.main()
