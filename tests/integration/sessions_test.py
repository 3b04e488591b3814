#!/usr/bin/env python3
"""Sessions: numbers go on after a lost connection, nothing is stored twice, one connection each."""

import concurrent.futures
import time

import daemon
import frames
from frames import record


@daemon.on_each_backend
class SessionsTest(daemon.DaemonCase):

    def ids(self, client):
        return {hit.id for hit in client.recall([0.0], 1000)}

    def test_resume_goes_on_at_last_plus_1(self):
        with self.daemon.client("resume", metric=frames.L2) as client:
            self.assertEqual((client.hello_ack.sequence, client.next_sequence), (0, 1))
            client.observe([record(b"1", [1.0]), record(b"2", [2.0]), record(b"", [3.0])])
            client.abort()
        with self.daemon.client("resume", session=client.session) as again:
            self.assertEqual(again.session, client.session)
            # A number that a refusal used up counts as accepted.
            self.assertEqual(again.hello_ack.sequence, 3)
            self.assertEqual(again.observe([record(b"4", [4.0])]), [])
            self.assertEqual(again.acked, 4)
            self.assertEqual(self.ids(again), {b"1", b"2", b"4"})
            self.assertEqual(again.close(), 4)
        # Also after an orderly end.
        with self.daemon.client("resume", session=client.session) as third:
            self.assertEqual(third.hello_ack.sequence, 4)

    def test_close_right_behind_observations_comes_back_after_their_ack(self):
        for count in (1, 30, 500):
            with self.subTest(count), self.daemon.client("closing", metric=frames.L2) as client:
                for _ in range(count):
                    client.send_observe([record(b"%d" % client.next_sequence,
                                                [float(client.next_sequence)])])
                self.assertEqual(client.close(), count)
                self.assertEqual(client.acked, count)
            with self.daemon.client("closing", session=client.session) as again:
                self.assertEqual(again.hello_ack.sequence, count)
                self.assertEqual(self.ids(again), {b"%d" % i for i in range(1, count + 1)})

    def test_a_repeat_is_acked_and_stored_once(self):
        with self.daemon.client("repeat", metric=frames.L2) as client:
            client.observe([record(b"a", [1.0]), record(b"b", [2.0])])
            client.observe([record(b"a", op=frames.DELETE)])
            acks = len(client.acks)
            # The first two again: b would move and a would come back.
            client.send_observe([record(b"a", [1.0]), record(b"b", [9.0])], sequence=1)
            client.wait_for(frames.ACK)
            self.assertEqual(client.acks[acks:], [3])
            self.assertEqual([(hit.id, hit.score) for hit in client.recall([0.0])], [(b"b", 4.0)])
            # A frame that begins with a repeat and goes on with something new.
            client.send_observe([record(b"x", [7.0]), record(b"new", [3.0])], sequence=3)
            client.wait_acked(4)
            self.assertEqual(client.naks, [])
            self.assertEqual(self.ids(client), {b"b", b"new"})

    def test_what_was_lost_with_the_connection_is_sent_again(self):
        """A client that is cut off at random resumes, repeats what was not acked, loses nothing."""
        frames_sent, session, taken = 0, 0, 0
        total = 400
        while taken < total:
            with self.daemon.client("again", metric=frames.L2, session=session) as client:
                session = client.session
                self.assertGreaterEqual(client.hello_ack.sequence, taken)
                taken = client.hello_ack.sequence
                while client.next_sequence <= total and client.next_sequence - taken <= 60:
                    first = client.next_sequence
                    client.send_observe([record(b"%d" % i, [float(i)])
                                         for i in range(first, min(first + 7, total + 1))])
                    frames_sent += 1
                if frames_sent % 3:
                    client.abort()
                else:
                    client.wait_acked(client.next_sequence - 1)
                    taken = client.acked
        with self.daemon.client("again") as client:
            self.assertEqual(self.ids(client), {b"%d" % i for i in range(1, total + 1)})
            space = [space for space in client.introspect(frames.SPACES)
                     if space.name == "again"][0]
            self.assertEqual((space.observations, space.retired), (total, 0))

    def test_a_pause_holds_results_and_refuses_observations(self):
        with self.daemon.client("pause", metric=frames.L2, features=frames.FLOWS) as client:
            self.assertEqual(client.hello_ack.features, frames.FLOWS)
            client.observe([record(b"1", [1.0])])
            paused = client.flow(frames.PAUSE)
            self.assertEqual((paused.state, paused.sequence), (frames.PAUSED, 1))
            client.send(frames.frame(frames.RECALL, frames.recall_body([0.0]), sequence=77))
            client.send_observe([record(b"2", [2.0])])
            refused = client.wait_for(frames.NAK)
            self.assertEqual((refused.name, refused.sequence, refused.flags), ("paused", 2, 0))
            client.ping()  # which would meet the result, if there were one
            client.send(frames.frame(frames.FLOW, frames.flow_body(frames.RESUME)))
            self.assertEqual(frames.decode_flow(client.wait_for(frames.FLOW)).state, frames.ACTIVE)
            self.assertEqual(client.wait_for(frames.RESULT).sequence, 77)
            client.next_sequence = 2
            self.assertEqual(client.observe([record(b"2", [2.0])]), [])
            with self.assertRaises(frames.Refused) as wrong:
                client.flow(9)
            self.assertEqual(wrong.exception.nak.name, "bad_flow")
            # Nothing is held from a close.
            client.flow(frames.PAUSE)
            client.send(frames.frame(frames.RECALL, frames.recall_body([0.0]), sequence=78))
            client.send(frames.frame(frames.CLOSE, session=client.session))
            self.assertEqual(client.wait_for(frames.RESULT).sequence, 78)
            self.assertEqual(client.wait_for(frames.CLOSE).sequence, 2)

    def test_results_come_at_the_rate_that_was_asked_for(self):
        with self.daemon.client("rate", metric=frames.L2, features=frames.FLOWS) as client:
            client.observe([record(b"%d" % i, [float(i)]) for i in range(150)])
            self.assertEqual(client.flow(frames.SLOW_DOWN, preferred_rate=25.0).preferred_rate, 25)
            began = time.monotonic()
            self.assertEqual(len(client.recall_frames([0.0], 150)), 15)
            # Two at once, then one each 40 ms, though nothing wakes the daemon for them.
            self.assertGreater(time.monotonic() - began, 0.5)
            self.assertEqual(client.flow(frames.SPEED_UP, preferred_rate=1e6).state, frames.ACTIVE)
            self.assertEqual(len(client.recall_frames([0.0], 150)), 15)

    def test_who_never_goes_back_goes_on_behind_a_refusal(self):
        with self.daemon.client("onwards", metric=frames.L2,
                                features=frames.FLOWS | frames.NEVER_GOES_BACK) as client:
            client.observe([record(b"1", [1.0])])
            client.flow(frames.PAUSE)
            naks = client.observe([record(b"2", [2.0]), record(b"3", [3.0])])
            self.assertEqual([(nak.name, nak.sequence, nak.flags) for nak in naks],
                             [("paused", 2, frames.CONSUMED), ("paused", 3, frames.CONSUMED)])
            client.flow(frames.RESUME)
            self.assertEqual(client.observe([record(b"4", [4.0])]), [])
            self.assertEqual(self.ids(client), {b"1", b"4"})
            client.flow(frames.PAUSE)
            self.assertEqual(len(client.observe([record(b"5", [5.0])])), 1)
            self.assertEqual(client.close(), 5)
        # What was refused last is free again.
        with self.daemon.client("onwards", session=client.session) as again:
            self.assertEqual(again.hello_ack.sequence, 4)
            self.assertEqual(again.observe([record(b"5", [5.0])]), [])

    def test_a_second_connection_fences_the_first(self):
        with self.daemon.client("fence", metric=frames.L2) as first:
            first.observe([record(b"1", [1.0])])
            with self.daemon.client("fence", session=first.session) as second:
                self.assertEqual(second.hello_ack.sequence, 1)
                nak = first.wait_for(frames.NAK)
                self.assert_refused(nak, "fenced", flags=frames.CLOSED,
                                    refused_type=nak.refused_type)
                first.wait_end()
                self.assertEqual(second.observe([record(b"2", [2.0])]), [])
                self.assertEqual(self.ids(second), {b"1", b"2"})

    def test_fencing_while_the_first_is_sending(self):
        """No number is lost or taken twice, whoever wins when."""
        def send_until_fenced(client):
            try:
                for i in range(100_000):
                    client.send_observe([record(b"%d-%d" % (client.session % 7, i), [float(i)])])
            except (frames.Refused, frames.ConnectionEnded, BrokenPipeError,
                    ConnectionResetError):
                return
            raise AssertionError("it was never fenced")

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            first = self.daemon.client("race", metric=frames.L2)
            session = first.session
            for _ in range(8):
                sending = pool.submit(send_until_fenced, first)
                second = self.daemon.client("race", session=session)
                sending.result(60)
                first.socket.close()
                self.assertEqual(second.observe([record(b"mark", [-1.0])]), [])
                self.assertEqual(second.acked, second.hello_ack.sequence + 1)
                first = second
            first.close()

    def test_an_unknown_session_is_not_taken_for_a_new_one(self):
        for session in (1, 2**63, 2**64 - 1):
            with self.daemon.client() as client:
                with self.assertRaises(frames.Refused) as caught:
                    client.hello("unknown", session=session)
                self.assert_refused(caught.exception.nak, "session_expired", flags=frames.CLOSED,
                                    refused_type=frames.HELLO)
                client.wait_end()

    def test_a_session_stays_in_its_space(self):
        with self.daemon.client("home", metric=frames.L2) as client, \
                self.daemon.client("away", metric=frames.L2) as away, \
                self.daemon.client() as stranger:
            away.observe([record(b"there", [1.0])])
            client.observe([record(b"here", [1.0])])
            with self.assertRaises(frames.Refused) as caught:
                stranger.hello("away", session=client.session)
            nak = caught.exception.nak
            # Where the other space is on another shard, that one has never heard of the session.
            self.assertIn(nak.name, ("session_space_mismatch", "session_expired"))
            self.assert_refused(nak, nak.name, flags=frames.CLOSED, refused_type=frames.HELLO)
            stranger.wait_end()
            # Nobody was fenced by that.
            self.assertEqual(client.observe([record(b"too", [2.0])]), [])
            self.assertEqual(self.ids(client), {b"here", b"too"})

    def test_sessions_do_not_share_numbers(self):
        with self.daemon.client("numbers", metric=frames.L2) as one, \
                self.daemon.client("numbers") as two:
            self.assertNotEqual(one.session, two.session)
            one.observe([record(b"one-%d" % i, [1.0]) for i in range(5)])
            self.assertEqual(two.observe([record(b"two", [2.0])]), [])
            self.assertEqual((one.acked, two.acked), (5, 1))
            self.assertEqual(len(self.ids(two)), 6)

    def test_priority_is_told_back(self):
        with self.daemon.client("priority", priority=1, metric=frames.L2) as client:
            self.assertEqual(client.hello_ack.priority, 1)
            self.assertEqual(client.observe([record(b"urgent", [1.0])]), [])
            self.assertEqual(self.ids(client), {b"urgent"})


if __name__ == "__main__":
    daemon.main()
