#!/usr/bin/python3
"""Recalls over gRPC that filter, with what episodes and memories are stored with.

As grpc_test.py, whose client this uses.
"""

from google.protobuf.timestamp_pb2 import Timestamp

import daemon
from grpc_test import GrpcCase, m, s


class Filters(GrpcCase):
    def setUp(self):
        super().setUp()
        for day, (place, who) in enumerate([("Paris", ["Ada"]), ("Paris", ["Ada", "Grace"]),
                                            ("Rome", ["Grace"]), ("", [])]):
            self.client.remember(self.space, f"e{day}", [1, day / 10], where_location=place,
                                 who=who, when=Timestamp(seconds=day * 86_400), what=f"day {day}")
        for number, (tags, source) in enumerate([(["red"], "docs"), (["red", "old"], "mail"),
                                                 (["blue"], "docs")]):
            self.client.Remember(s.RememberRequest(memory_space_id=self.space, memory=m.Memory(
                id=f"m{number}", embedding=[1, 1 + number / 10], tags=tags,
                metadata={"source": source, "other": "x"}, content=f"memory {number}",
                created_at=Timestamp(seconds=7), memory_type=m.MEMORY_TYPE_SEMANTIC)))

    def found(self, **fields):
        answer = self.client.recall(self.space, [1, 0], max_results=100, **fields)
        return sorted(memory.id for memory in answer.memories)

    def test_contents_come_back_as_they_were(self):
        contents = {memory.id: memory.content
                    for memory in self.client.recall(self.space, [1, 0], max_results=9).memories}
        self.assertEqual(contents, {**{f"e{day}": f"day {day}" for day in range(4)},
                                    **{f"m{number}": f"memory {number}" for number in range(3)}})

    def test_a_context_narrows_an_embedding(self):
        self.assertEqual(self.found(context=m.ContextCue(location="Paris")), ["e0", "e1"])
        self.assertEqual(self.found(context=m.ContextCue(participants=["Ada", "Grace"])), ["e1"])
        self.assertEqual(self.found(context=m.ContextCue(
            time_start=Timestamp(seconds=86_400), time_end=Timestamp(seconds=3 * 86_400))),
            ["e1", "e2"])

    def test_a_filter_narrows_an_embedding(self):
        self.assertEqual(self.found(filter=m.Filter(required_tags=["red"])), ["m0", "m1"])
        self.assertEqual(self.found(filter=m.Filter(required_tags=["red"],
                                                    excluded_tags=["old"])), ["m0"])
        self.assertEqual(self.found(filter=m.Filter(metadata=[
            m.MetadataCondition(key="source", values=["docs"])])), ["m0", "m2"])
        self.assertEqual(self.found(filter=m.Filter(
            memory_types=[m.MEMORY_TYPE_SEMANTIC],
            metadata=[m.MetadataCondition(key="source", values=["docs"], exclude=True)])), ["m1"])
        self.assertEqual(self.found(filter=m.Filter(memory_types=[m.MEMORY_TYPE_EPISODIC])),
                         ["e0", "e1", "e2", "e3"])

    def test_a_context_alone_finds_the_latest(self):
        def found(by, **fields):
            answer = self.client.Recall(s.RecallRequest(
                memory_space_id=self.space, cue=m.Cue(context=by), **fields))
            for memory in answer.memories:
                self.assertEqual(memory.activation, 1)
            return [memory.id for memory in answer.memories]

        self.assertEqual(found(m.ContextCue(participants=["Ada"])), ["e1", "e0"])
        self.assertEqual(found(m.ContextCue()), ["e3", "e2", "e1", "m0", "m1", "m2", "e0"])
        self.assertEqual(found(m.ContextCue(), max_results=2), ["e3", "e2"])
        self.assertEqual(found(m.ContextCue(participants=["Grace"]),
                               context=m.ContextCue(location="Rome")), ["e2"])

    def test_all_spaces_are_recalled_and_named(self):
        self.client.remember(self.space + "-too", "other", [1, 0])
        answer = self.client.recall(self.space, [1, 0], max_results=100, all_spaces=True)
        named = {(memory.memory_space_id, memory.id) for memory in answer.memories}
        self.assertIn((self.space + "-too", "other"), named)
        self.assertIn((self.space, "e0"), named)
        answer = self.client.recall(self.space, [1, 0], max_results=1)
        self.assertEqual(answer.memories[0].memory_space_id, "")

    def test_both_narrow_together(self):
        self.assertEqual(self.found(
            filter=m.Filter(metadata=[m.MetadataCondition(key="who", values=["Grace"])]),
            context=m.ContextCue(location="Paris")), ["e1"])


if __name__ == "__main__":
    daemon.main()
