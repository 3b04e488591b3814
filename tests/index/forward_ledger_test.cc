#include "index/forward_ledger.h"

#include <gtest/gtest.h>

#include <deque>
#include <map>
#include <vector>

#include "src/core/hash.h"

namespace engram {
namespace {

class ForwardLedgerTest : public testing::Test {
 protected:
  uint64_t Add(Session* session, CommitStamp stamp) {
    const uint64_t ticket = ledger_.Add(session);
    Forward& forward = ledger_.At(ticket);
    forward.step = Forward::Step::kStore;
    forward.stamp = stamp;
    forward.completion.sequence = ticket;
    return ticket;
  }
  // The tickets that are answered when `ticket` is done.
  std::vector<uint64_t> Finish(uint64_t ticket) {
    std::vector<uint64_t> answered;
    ledger_.Finish(
        ticket, [&](const Forward& forward) { answered.push_back(forward.completion.sequence); });
    return answered;
  }

  ForwardLedger ledger_{8, 3};
  Session a_;
  Session b_;
};

using Tickets = std::vector<uint64_t>;

TEST_F(ForwardLedgerTest, ASessionIsAnsweredInItsOrder) {
  const uint64_t first = Add(&a_, 10);
  const uint64_t other = Add(&b_, 20);
  const uint64_t second = Add(&a_, 30);
  const uint64_t third = Add(&a_, 40);
  EXPECT_EQ(a_.first_forward, first);
  EXPECT_EQ(a_.last_forward, third);
  EXPECT_EQ(Finish(third), Tickets{});
  EXPECT_EQ(Finish(other), Tickets{other});
  EXPECT_EQ(b_.first_forward, 0u);
  EXPECT_EQ(b_.last_forward, 0u);
  EXPECT_EQ(ledger_.OldestStamp(), 10u);
  EXPECT_EQ(Finish(first), Tickets{first});
  EXPECT_EQ(ledger_.OldestStamp(), 30u);
  EXPECT_EQ(Finish(second), (Tickets{second, third}));
  EXPECT_TRUE(ledger_.empty());
  EXPECT_EQ(a_.first_forward, 0u);
}

TEST_F(ForwardLedgerTest, WithoutASessionAsTheyAreDone) {
  const uint64_t first = Add(nullptr, 10);
  const uint64_t second = Add(nullptr, 20);
  EXPECT_EQ(Finish(second), Tickets{second});
  EXPECT_EQ(ledger_.OldestStamp(), 10u);
  EXPECT_EQ(ledger_.size(), 2u) << "places are given back from the oldest on";
  EXPECT_EQ(Finish(first), Tickets{first});
  EXPECT_TRUE(ledger_.empty());
}

TEST_F(ForwardLedgerTest, LinesAreFirstInFirstOut) {
  const uint64_t first = Add(&a_, 10);
  const uint64_t second = Add(&a_, 20);
  const uint64_t third = Add(&a_, 30);
  EXPECT_EQ(ledger_.FirstInLine(ShardId(1)), 0u);
  ledger_.Line(ShardId(1), second);
  ledger_.Line(ShardId(2), third);
  ledger_.Line(ShardId(1), first);
  EXPECT_TRUE(ledger_.At(first).waits_to_send);
  EXPECT_EQ(ledger_.FirstInLine(ShardId(1)), second);
  EXPECT_EQ(ledger_.FirstInLine(ShardId(2)), third);
  ledger_.LeaveLine(ShardId(1));
  EXPECT_FALSE(ledger_.At(second).waits_to_send);
  EXPECT_EQ(ledger_.FirstInLine(ShardId(1)), first);
  ledger_.Line(ShardId(1), second);
  ledger_.LeaveLine(ShardId(1));
  EXPECT_EQ(ledger_.FirstInLine(ShardId(1)), second);
  ledger_.LeaveLine(ShardId(1));
  EXPECT_EQ(ledger_.FirstInLine(ShardId(1)), 0u);
}

// Against a deque a session and a map, round and round the table.
TEST_F(ForwardLedgerTest, RandomPrograms) {
  SplitMix64 random(1);
  std::map<uint64_t, bool> done;  // by ticket, of those not answered
  std::map<Session*, std::deque<uint64_t>> sessions;
  Session* const owners[] = {&a_, &b_, nullptr};
  for (int step = 0; step < 20'000; ++step) {
    if (ledger_.room() > 0 && random.Below(2) == 0) {
      Session* owner = owners[random.Below(3)];
      const uint64_t ticket = Add(owner, 100 + static_cast<CommitStamp>(step));
      done[ticket] = false;
      if (owner != nullptr) sessions[owner].push_back(ticket);
      continue;
    }
    Tickets open;
    for (const auto& [ticket, is_done] : done) {
      if (!is_done) open.push_back(ticket);
    }
    if (open.empty()) continue;
    const uint64_t ticket = open[random.Below(open.size())];
    Session* owner = ledger_.At(ticket).session;
    done[ticket] = true;
    Tickets expected;
    if (owner == nullptr) {
      expected = {ticket};
    } else {
      std::deque<uint64_t>& chain = sessions[owner];
      while (!chain.empty() && done[chain.front()]) {
        expected.push_back(chain.front());
        chain.pop_front();
      }
    }
    for (const uint64_t answered : expected) done.erase(answered);
    ASSERT_EQ(Finish(ticket), expected);
    ASSERT_EQ(ledger_.empty(), done.empty());
    if (!done.empty()) {
      EXPECT_FALSE(done.begin()->second) << "the oldest one is not done";
      EXPECT_EQ(ledger_.OldestStamp(), ledger_.At(done.begin()->first).stamp);
    }
  }
}

}  // namespace
}  // namespace engram
