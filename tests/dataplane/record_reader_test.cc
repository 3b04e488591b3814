#include "dataplane/record_reader.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "dataplane/hit_window.h"
#include "src/core/clock.h"
#include "src/core/hash.h"
#include "tests/dataplane/fake_log_disk.h"
#include "tests/dataplane/wire.h"

namespace engram {
namespace {

using State = RecordReader::State;
using Ticket = RecordReader::Ticket;

constexpr int64_t kRetryNs = kNanosPerMilli;
constexpr int64_t kRetryForNs = 10 * kNanosPerMilli;

class RecordReaderTest : public testing::Test {
 protected:
  RecordReaderTest() { Make(16, {{1'024, 4}, {kMaxRecordSlotBytes, 4}}); }

  void Make(uint32_t max_open_files, const std::vector<SlotClass>& slots) {
    reader_.reset();
    auto reader = RecordReader::Create({.max_open_files = max_open_files,
                                        .retry_ns = kRetryNs,
                                        .retry_for_ns = kRetryForNs,
                                        .slots = slots,
                                        .huge_pages = HugePagePolicy::kOff},
                                       &clock_, logs_.Access());
    EXPECT_TRUE(reader.has_value());
    reader_ = *std::move(reader);
  }
  static std::string PayloadOf(const LogRecord& record) {
    return {reinterpret_cast<const char*>(record.payload.data()), record.payload.size()};
  }
  uint64_t counter(RecordReaderCounter which) const { return reader_->counter(which).Read(); }
  // Whatever is read ends, and time goes on, until the patience is over.
  State Await(Ticket ticket) {
    for (int i = 0; i < 100 && reader_->state(ticket) == State::kReading; ++i) {
      logs_.EndAll();
      clock_.AdvanceNs(kRetryNs / 2);
      reader_->Poll();
    }
    return reader_->state(ticket);
  }
  State ReadOnce(const std::vector<std::byte>& hit) {
    const Ticket ticket = reader_->Begin(hit.data());
    const State state = Await(ticket);
    reader_->Release(ticket);
    return state;
  }
  // Of what was taken just now.
  CommitStamp Now() { return static_cast<CommitStamp>(clock_.WallNs()); }
  std::vector<std::byte>& File(uint32_t segment) {
    return logs_.files["log-000/" + SegmentName(segment)];
  }

  SimulatedClock clock_;
  FakeLogs logs_;
  std::unique_ptr<RecordReader> reader_;
};

TEST_F(RecordReaderTest, ReadsGoSideBySideAndEndInAnyOrder) {
  std::vector<std::vector<std::byte>> hits;
  for (uint16_t i = 0; i < 4; ++i) {
    hits.push_back(
        logs_.Put(i % 2, 1 + i / 2, 4'096, "id" + std::to_string(i), "p" + std::to_string(i), 5));
  }
  std::vector<Ticket> tickets;
  for (const auto& hit : hits) tickets.push_back(reader_->Begin(hit.data()));
  EXPECT_EQ(logs_.reads.size(), 4u) << "one waits for another";
  for (const size_t end : {3, 0, 2, 1}) {
    for (size_t which = 0; which < logs_.reads.size(); ++which) {
      if (logs_.reads[which].tag == tickets[end]) logs_.End(which);
    }
    EXPECT_GT(reader_->Poll(), 0);
    EXPECT_EQ(reader_->state(tickets[end]), State::kReady);
    EXPECT_EQ(PayloadOf(reader_->record(tickets[end])), "p" + std::to_string(end));
  }
  EXPECT_EQ(reader_->Poll(), 0) << "nothing is under way";
  for (const Ticket ticket : tickets) reader_->Release(ticket);
  EXPECT_EQ(reader_->under_way(), 0u);
  EXPECT_EQ(counter(RecordReaderCounter::kRecordsRead), 4u);
}

TEST_F(RecordReaderTest, TheDiskIsAwaited) {
  const auto hit = logs_.Put(0, 1, 4'096, "a", "payload", 5);
  const Ticket ticket = reader_->Begin(hit.data());
  for (int i = 0; i < 1'000; ++i) {
    clock_.AdvanceNs(kNanosPerSecond);
    EXPECT_GT(reader_->Poll(), 0) << "the core must not sleep now";
    ASSERT_EQ(reader_->state(ticket), State::kReading);
  }
  logs_.EndAll();
  reader_->Poll();
  EXPECT_EQ(reader_->state(ticket), State::kReady);
  reader_->Release(ticket);
}

TEST_F(RecordReaderTest, ErrorsAndShortReadsAreReadAgain) {
  const auto hit = logs_.Put(0, 1, 4'096, "a", "payload", Now());
  const Ticket ticket = reader_->Begin(hit.data());
  logs_.End(0, EIO);
  reader_->Poll();
  EXPECT_EQ(reader_->state(ticket), State::kReading);
  EXPECT_TRUE(logs_.reads.empty()) << "not at once";
  clock_.AdvanceNs(kRetryNs - 1);
  reader_->Poll();
  EXPECT_TRUE(logs_.reads.empty());
  clock_.AdvanceNs(1);
  reader_->Poll();
  ASSERT_EQ(logs_.reads.size(), 1u);
  logs_.End(0, 0, 40);
  reader_->Poll();
  EXPECT_EQ(reader_->state(ticket), State::kReading);
  clock_.AdvanceNs(kRetryNs);
  reader_->Poll();
  logs_.EndAll();
  reader_->Poll();
  EXPECT_EQ(reader_->state(ticket), State::kReady);
  EXPECT_EQ(PayloadOf(reader_->record(ticket)), "payload");
  EXPECT_EQ(counter(RecordReaderCounter::kReadsRepeated), 2u);
  EXPECT_EQ(counter(RecordReaderCounter::kRecordsUnreadable), 0u);
  reader_->Release(ticket);
}

// As with a space that does not wait for its log.
TEST_F(RecordReaderTest, WhatIsNotWrittenYetIsAwaited) {
  const CommitStamp stamp = Now();
  const auto hit = logs_.Put(0, 1, 4'096, "a", "payload", stamp, {1, 2}, /*in_file=*/false);
  clock_.AdvanceNs(kRetryForNs - kNanosPerMilli);
  const Ticket ticket = reader_->Begin(hit.data());
  EXPECT_TRUE(logs_.reads.empty()) << "there is no file";
  clock_.AdvanceNs(kRetryNs);
  reader_->Poll();
  File(1).resize(8'192);
  clock_.AdvanceNs(kRetryNs);
  reader_->Poll();
  ASSERT_EQ(logs_.reads.size(), 1u);
  logs_.EndAll();
  reader_->Poll();
  EXPECT_EQ(reader_->state(ticket), State::kReading) << "zeros";
  logs_.Put(0, 1, 4'096, "a", "payload", stamp);
  EXPECT_EQ(Await(ticket), State::kReady);
  reader_->Release(ticket);
}

TEST_F(RecordReaderTest, DamageIsSaidAndCountedOnceThePatienceIsOver) {
  const auto hit = logs_.Put(0, 1, 4'096, "a", std::string(300, 'p'), Now());
  File(1)[4'096 + 150] ^= std::byte{1};
  File(1)[4'096 + 250] ^= std::byte{1};
  const int64_t began_ns = clock_.MonotonicNs();
  const Ticket ticket = reader_->Begin(hit.data());
  EXPECT_EQ(Await(ticket), State::kUnreadable);
  EXPECT_GE(clock_.MonotonicNs() - began_ns, kRetryForNs);
  EXPECT_LT(clock_.MonotonicNs() - began_ns, 2 * kRetryForNs);
  EXPECT_EQ(counter(RecordReaderCounter::kRecordsUnreadable), 1u);
  EXPECT_EQ(counter(RecordReaderCounter::kRecordsRead), 0u);
  EXPECT_EQ(reader_->unreadable(), MakeLogAddress(0, MakeLogPosition(1, 4'096)));
  reader_->Release(ticket);
}

// It cannot be about to be written, and others need the memory.
TEST_F(RecordReaderTest, WhatWasDamagedLongAgoIsReadTwiceAndNotAwaited) {
  const auto hit = logs_.Put(0, 1, 4'096, "a", std::string(300, 'p'), Now());
  File(1)[4'096 + 150] ^= std::byte{3};
  clock_.AdvanceNs(kRetryForNs + kNanosPerMilli);
  const int64_t began_ns = clock_.MonotonicNs();
  EXPECT_EQ(ReadOnce(hit), State::kUnreadable);
  EXPECT_LE(clock_.MonotonicNs() - began_ns, 2 * kRetryNs);
  EXPECT_EQ(counter(RecordReaderCounter::kReadsRepeated), 1u);
  // An error of the disk may pass.
  File(1)[4'096 + 150] ^= std::byte{3};
  const Ticket ticket = reader_->Begin(hit.data());
  logs_.End(0, EIO);
  EXPECT_EQ(Await(ticket), State::kReady);
  reader_->Release(ticket);
}

TEST_F(RecordReaderTest, AllThatCannotBeReadIsNamed) {
  logs_.ends_at_once = true;
  std::vector<std::vector<std::byte>> hits;
  for (uint32_t i = 0; i < 4; ++i) {
    hits.push_back(logs_.Put(0, 1, 4'096 * (i + 1), "a", "payload", 5));
    if (i != 2) File(1)[4'096 * (i + 1) + 66] ^= std::byte{3};
  }
  EXPECT_FALSE(reader_->TakeUnreadable().has_value());
  for (const auto& hit : hits) ReadOnce(hit);
  for (const uint32_t i : {0, 1, 3}) {
    EXPECT_EQ(reader_->TakeUnreadable(), MakeLogAddress(0, MakeLogPosition(1, 4'096 * (i + 1))));
  }
  EXPECT_FALSE(reader_->TakeUnreadable().has_value());
  // Nobody takes them.
  for (int i = 0; i < 1'024 + 6; ++i) ReadOnce(hits[0]);
  EXPECT_EQ(counter(RecordReaderCounter::kUnreadableUnnamed), 6u);
  int named = 0;
  while (reader_->TakeUnreadable()) ++named;
  EXPECT_EQ(named, 1'024);
}

// Any bit of it.
TEST_F(RecordReaderTest, OneFlippedBitIsMended) {
  const auto hit = logs_.Put(0, 1, 4'096, "a", "payload", 5);
  HitReference reference;
  std::memcpy(&reference, hit.data() + sizeof(HitHeader), sizeof(reference));
  for (size_t bit = 0; bit < size_t{reference.record_bytes} * 8; bit += 7) {
    const std::byte mask = std::byte{1} << (bit % 8);
    File(1)[4'096 + bit / 8] ^= mask;
    const Ticket ticket = reader_->Begin(hit.data());
    ASSERT_EQ(Await(ticket), State::kReady) << bit;
    EXPECT_EQ(PayloadOf(reader_->record(ticket)), "payload");
    reader_->Release(ticket);
    File(1)[4'096 + bit / 8] ^= mask;
  }
  EXPECT_GT(counter(RecordReaderCounter::kRecordsMended), 50u);
  EXPECT_EQ(counter(RecordReaderCounter::kRecordsUnreadable), 0u);
}

// A sound record is there that is not the hit's: never its payload.
TEST_F(RecordReaderTest, AnotherRecordIsNotTakenForIt) {
  const std::string payload = "payload";
  const auto hit = logs_.Put(0, 1, 4'096, "a", payload, 5);
  EXPECT_EQ(ReadOnce(hit), State::kReady);
  LogRecord record;
  const std::vector<float> vector{1, 2};
  const auto reset = [&] {
    record = LogRecord();
    record.space = "space";
    record.stamp = 5;
    record.id = "a";
    record.attributes = std::as_bytes(std::span(logs_.attributes));
    record.payload = std::as_bytes(std::span(payload));
    record.dtype = VectorDtype::kF32;
    record.dimension = 2;
    record.vector = std::as_bytes(std::span(vector));
  };
  reset();
  logs_.PutRecord(0, 1, 4'096, record);
  EXPECT_EQ(ReadOnce(hit), State::kReady);
  record.id = "b";
  logs_.PutRecord(0, 1, 4'096, record);
  EXPECT_EQ(ReadOnce(hit), State::kUnreadable) << "of another id";
  reset();
  record.stamp = 4;
  logs_.PutRecord(0, 1, 4'096, record);
  EXPECT_EQ(ReadOnce(hit), State::kUnreadable) << "an earlier version";
  reset();
  record.kind = LogRecordKind::kSuppress;
  logs_.PutRecord(0, 1, 4'096, record);
  EXPECT_EQ(ReadOnce(hit), State::kUnreadable) << "not an upsert";
  // As long, with a byte less of payload.
  reset();
  record.payload = record.payload.first(6);
  logs_.PutRecord(0, 1, 4'096, record);
  EXPECT_EQ(ReadOnce(hit), State::kUnreadable) << "of another length";
  // Sound, but of another place.
  reset();
  logs_.PutRecord(0, 1, 8'192, record);
  auto& file = File(1);
  std::copy_n(file.begin() + 8'192, LogRecordBytes(record), file.begin() + 4'096);
  EXPECT_EQ(ReadOnce(hit), State::kUnreadable) << "the record of another place";
  logs_.PutRecord(0, 1, 4'096, record);
  EXPECT_EQ(ReadOnce(hit), State::kReady);
}

// What was restored has a later stamp than its record.
TEST_F(RecordReaderTest, WhatWasRestoredHasAnOlderRecord) {
  auto hit = logs_.Put(0, 1, 4'096, "a", "payload", 5);
  const auto set = [&](CommitStamp stamp, uint32_t older) {
    std::memcpy(hit.data() + offsetof(HitHeader, stamp), &stamp, sizeof(stamp));
    std::memcpy(hit.data() + sizeof(HitHeader) + offsetof(HitReference, has_older_stamp), &older,
                sizeof(older));
  };
  set(9, 1);
  EXPECT_EQ(ReadOnce(hit), State::kReady);
  set(9, 0);
  EXPECT_EQ(ReadOnce(hit), State::kUnreadable);
  set(5, 1);
  EXPECT_EQ(ReadOnce(hit), State::kUnreadable);
}

TEST_F(RecordReaderTest, FilesStayOpenWithinABound) {
  Make(10, {{1'024, 4}, {kMaxRecordSlotBytes, 4}});
  logs_.ends_at_once = true;
  std::vector<std::vector<std::byte>> hits;
  for (uint32_t s = 1; s <= 30; ++s) hits.push_back(logs_.Put(0, s, 4'096, "a", "p", 5));
  for (int round = 0; round < 3; ++round) {
    for (const auto& hit : hits) EXPECT_EQ(ReadOnce(hit), State::kReady);
    // The last one used is open, and used again.
    const int opened = logs_.opened;
    for (int i = 0; i < 5; ++i) EXPECT_EQ(ReadOnce(hits.back()), State::kReady);
    EXPECT_EQ(logs_.opened, opened);
  }
  EXPECT_LE(logs_.most_open, 10);
  EXPECT_EQ(reader_->open_files(), 10u);
}

// A file that is removed keeps its room as long as somebody has it open.
TEST_F(RecordReaderTest, IdleFilesAreClosedWhenAnEpochWasClosed) {
  const auto first = logs_.Put(0, 1, 4'096, "a", "p", 5);
  const auto second = logs_.Put(0, 2, 4'096, "b", "p", 6);
  EXPECT_EQ(ReadOnce(first), State::kReady);
  const Ticket ticket = reader_->Begin(second.data());
  EXPECT_EQ(logs_.open, 2);
  logs_.pins.Close();
  reader_->Poll();
  EXPECT_EQ(logs_.open, 1) << "the other is being read";
  logs_.EndAll();
  reader_->Poll();
  EXPECT_EQ(reader_->state(ticket), State::kReady);
  EXPECT_EQ(logs_.open, 0);
  reader_->Release(ticket);
  EXPECT_EQ(ReadOnce(first), State::kReady) << "it is opened again";
}

TEST_F(RecordReaderTest, WhatIsReleasedWhileItIsReadKeepsItsMemoryUntilThen) {
  std::vector<std::vector<std::byte>> hits;
  for (uint32_t i = 0; i < 9; ++i) {
    hits.push_back(logs_.Put(0, 1, 4'096 * (i + 1), "id", std::string(10, 'a'), 5));
  }
  std::vector<Ticket> tickets;
  for (size_t i = 0; i < 8; ++i) {
    tickets.push_back(reader_->Begin(hits[i].data()));
    EXPECT_NE(tickets.back(), RecordReader::kNone) << "smaller ones may use the larger slots";
  }
  EXPECT_EQ(reader_->Begin(hits[8].data()), RecordReader::kNone);
  std::set<const std::byte*> memory;
  for (const auto& read : logs_.reads) memory.insert(read.to.data());
  EXPECT_EQ(memory.size(), 8u);
  for (const Ticket ticket : tickets) reader_->Release(ticket);
  EXPECT_EQ(reader_->Begin(hits[8].data()), RecordReader::kNone) << "the disk still writes to it";
  EXPECT_EQ(reader_->under_way(), 8u);
  logs_.End(0);
  reader_->Poll();
  const Ticket ticket = reader_->Begin(hits[8].data());
  ASSERT_NE(ticket, RecordReader::kNone);
  EXPECT_EQ(Await(ticket), State::kReady);
  reader_->Release(ticket);
  EXPECT_EQ(reader_->under_way(), 0u);
}

// What is given back between two rounds belongs to the one that found nothing first.
TEST_F(RecordReaderTest, WhoWaitsForMemoryIsNotOvertaken) {
  logs_.ends_at_once = true;
  std::vector<std::vector<std::byte>> hits;
  for (uint32_t i = 0; i < 6; ++i) {
    hits.push_back(logs_.Put(0, 1, 4'096 * (i + 1), "id", std::string(2'000, 'a'), 5));
  }
  std::vector<std::vector<std::byte>> small;
  for (uint32_t i = 0; i < 5; ++i) {
    small.push_back(logs_.Put(0, 2, 4'096 * (i + 1), "id", std::string(10, 'a'), 5));
  }
  std::vector<Ticket> tickets;
  for (size_t i = 0; i < 4; ++i) tickets.push_back(reader_->Begin(hits[i].data()));
  reader_->Poll();
  EXPECT_EQ(reader_->Begin(hits[4].data()), RecordReader::kNone);
  reader_->Release(tickets[3]);
  EXPECT_EQ(reader_->Begin(hits[5].data()), RecordReader::kNone) << "it came later";
  for (size_t i = 0; i < 4; ++i) {
    tickets.push_back(reader_->Begin(small[i].data()));
    EXPECT_NE(tickets.back(), RecordReader::kNone) << "it needs nothing of what is short";
  }
  EXPECT_EQ(reader_->Begin(small[4].data()), RecordReader::kNone) << "the last one is waited for";
  reader_->Poll();
  tickets[3] = reader_->Begin(hits[4].data());
  ASSERT_NE(tickets[3], RecordReader::kNone);
  EXPECT_EQ(reader_->Begin(hits[5].data()), RecordReader::kNone);
  for (const Ticket ticket : tickets) {
    EXPECT_EQ(Await(ticket), State::kReady);
    reader_->Release(ticket);
  }
  reader_->Poll();
  EXPECT_EQ(ReadOnce(hits[5]), State::kReady);
}

TEST_F(RecordReaderTest, WhatIsReleasedWhileItWaitsIsForgotten) {
  const auto hit = logs_.Put(0, 1, 4'096, "a", "payload", 5, {1, 2}, /*in_file=*/false);
  reader_->Release(reader_->Begin(hit.data()));
  clock_.AdvanceNs(kRetryNs);
  reader_->Poll();
  EXPECT_EQ(reader_->under_way(), 0u);
  EXPECT_EQ(counter(RecordReaderCounter::kRecordsUnreadable), 0u);
}

TEST_F(RecordReaderTest, EndsWithReadsUnderWay) {
  const auto hit = logs_.Put(0, 1, 4'096, "a", "payload", 5);
  (void)reader_->Begin(hit.data());
  reader_.reset();
  EXPECT_TRUE(logs_.reads.empty());
}

// ---- The window over an answer ----

class HitWindowTest : public RecordReaderTest {
 protected:
  // The first hit, as it goes to the client.
  WireHit Write(HitWindow* window) {
    const size_t bytes = window->BytesAt(0, reader_.get());
    EXPECT_GT(bytes, 0u);
    std::vector<std::byte> out(bytes, std::byte{0xEE});
    window->WriteFirst(out.data(), reader_.get());
    const auto hits = ParseHits(out);
    EXPECT_EQ(hits.size(), 1u);
    EXPECT_EQ(HitBytesOf(hits[0]), out) << "padding is not zero, or a length is wrong";
    return hits[0];
  }
  static void Ask(std::vector<std::byte>* hit, bool payload, uint16_t dimension) {
    HitHeader header;
    std::memcpy(&header, hit->data(), sizeof(header));
    if (!payload) header.payload_bytes = 0;
    header.vector_dimension = dimension;
    std::memcpy(hit->data(), &header, sizeof(header));
  }
};

TEST_F(HitWindowTest, HitsComeInOrderWithWhatWasAskedFor) {
  auto both = logs_.Put(0, 1, 4'096, "both", "p1", 5, {1, 2, 3});
  auto vector = logs_.Put(0, 1, 8'192, "vector", "p2", 6, {4, 5, 6});
  auto payload = logs_.Put(0, 1, 12'288, "payload", "p3", 7);
  Ask(&both, true, 3);
  Ask(&vector, false, 3);
  const WireHit whole{.id = "whole", .stamp = 8, .payload = "p4", .vector = {7}};
  WireBytes whole_bytes = HitBytesOf(whole);
  HitWindow window(kMaxAnswerPayloadBytes);
  for (const auto* hit : {&both, &vector, &payload, &whole_bytes}) {
    ASSERT_TRUE(window.Add(hit->data(), reader_.get()));
  }
  EXPECT_EQ(logs_.reads.size(), 3u);
  EXPECT_EQ(window.BytesAt(0, reader_.get()), 0u);
  EXPECT_GT(window.BytesAt(3, reader_.get()), 0u);
  logs_.EndAll();
  reader_->Poll();
  WireHit hit = Write(&window);
  EXPECT_EQ(hit.id + hit.payload, "bothp1");
  EXPECT_EQ(hit.vector, (std::vector<float>{1, 2, 3}));
  EXPECT_EQ(hit.flags, 0);
  EXPECT_EQ(hit.stamp, 5u);
  hit = Write(&window);
  EXPECT_EQ(hit.id + hit.payload, "vector");
  EXPECT_EQ(hit.vector, (std::vector<float>{4, 5, 6}));
  hit = Write(&window);
  EXPECT_EQ(hit.id + hit.payload, "payloadp3");
  EXPECT_TRUE(hit.vector.empty());
  EXPECT_EQ(Write(&window), whole);
  EXPECT_EQ(window.size(), 0u);
  EXPECT_EQ(reader_->under_way(), 0u);
}

TEST_F(HitWindowTest, WhatCannotBeReadGoesOutWithoutPayloadAndVector) {
  auto hit = logs_.Put(0, 1, 4'096, "a", "payload", 5, {1, 2});
  Ask(&hit, true, 2);
  File(1)[4'096 + 70] ^= std::byte{3};
  HitWindow window(kMaxAnswerPayloadBytes);
  ASSERT_TRUE(window.Add(hit.data(), reader_.get()));
  for (int i = 0; i < 100 && window.BytesAt(0, reader_.get()) == 0; ++i) {
    logs_.EndAll();
    clock_.AdvanceNs(kRetryNs);
    reader_->Poll();
  }
  const WireHit written = Write(&window);
  EXPECT_EQ(written.id, "a");
  EXPECT_EQ(written.payload, "");
  EXPECT_TRUE(written.vector.empty());
  EXPECT_EQ(written.flags, kHitPayloadOmitted);
  EXPECT_EQ(counter(RecordReaderCounter::kRecordsUnreadable), 1u);
}

// The bound is of what comes first, and what lies beyond is not read.
TEST_F(HitWindowTest, PayloadBeyondTheBoundIsLeftOut) {
  auto first = logs_.Put(0, 1, 4'096, "a", std::string(60, 'a'), 5);
  auto second = logs_.Put(0, 1, 8'192, "b", std::string(60, 'b'), 6);
  auto third = logs_.Put(0, 1, 12'288, "c", std::string(60, 'c'), 7);
  auto fourth = logs_.Put(0, 1, 16'384, "d", std::string(40, 'd'), 8);
  Ask(&third, true, 2);
  HitWindow window(100);
  for (const auto* hit : {&first, &second, &third, &fourth}) {
    ASSERT_TRUE(window.Add(hit->data(), reader_.get()));
  }
  EXPECT_EQ(logs_.reads.size(), 3u);
  logs_.EndAll();
  reader_->Poll();
  EXPECT_EQ(Write(&window).payload.size(), 60u);
  WireHit hit = Write(&window);
  EXPECT_EQ(hit.payload, "");
  EXPECT_EQ(hit.flags, kHitPayloadOmitted);
  // What is dropped and added again counts once.
  window.Clear(reader_.get());
  ASSERT_TRUE(window.Add(third.data(), reader_.get()));
  ASSERT_TRUE(window.Add(fourth.data(), reader_.get()));
  logs_.EndAll();
  reader_->Poll();
  hit = Write(&window);
  EXPECT_EQ(hit.payload, "");
  EXPECT_EQ(hit.vector, (std::vector<float>{1, 2})) << "the vector has no bound";
  EXPECT_EQ(hit.flags, kHitPayloadOmitted);
  hit = Write(&window);
  EXPECT_EQ(hit.payload.size(), 40u);
  EXPECT_EQ(reader_->under_way(), 0u);
}

TEST_F(HitWindowTest, WithoutRoomNothingIsAdded) {
  std::vector<std::vector<std::byte>> hits;
  for (uint32_t i = 0; i < 9; ++i) hits.push_back(logs_.Put(0, 1, 4'096 * (i + 1), "a", "p", 5));
  HitWindow window(kMaxAnswerPayloadBytes);
  for (size_t i = 0; i < 8; ++i) EXPECT_TRUE(window.Add(hits[i].data(), reader_.get()));
  EXPECT_FALSE(window.Add(hits[8].data(), reader_.get()));
  EXPECT_EQ(window.size(), 8u);
  window.Clear(reader_.get());
  logs_.EndAll();
  reader_->Poll();
  EXPECT_EQ(reader_->under_way(), 0u);
}

}  // namespace
}  // namespace engram
