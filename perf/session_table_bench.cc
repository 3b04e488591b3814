// What a shard's SessionTable does a second, with 10,000 active sessions and 1,000,000 dormant
// ones, and the memory that a session of each tier takes.
//
//   session_table_bench [--json] [--rounds N]
//
// A validation finds the session of an observation by place and id, and checks the connection and
// the sequence. Sessions come in random order. Beside the two ways to find one stands a
// std::unordered_map that holds the same sessions. The rounds of all are interleaved; medians. Exit
// code 1 when not even the best round reaches a million validations/s.

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <unordered_map>
#include <vector>

#include "index/session_table.h"
#include "perf/bench_support.h"
#include "src/core/check.h"
#include "src/core/clock.h"
#include "src/core/hash.h"
#include "src/core/session_id.h"

namespace engram {
namespace {

constexpr uint32_t kActive = 10'000;
constexpr uint32_t kDormant = 1'000'000;
constexpr size_t kOperations = 1'000'000;
constexpr size_t kMoves = 100'000;
constexpr double kFloorPerSecond = 1e6;
constexpr int64_t kUnixNs = 1'700'000'000 * kNanosPerSecond;

// Keeps the compiler from leaving out what nobody reads.
void Use(const void* value) { asm volatile("" : : "g"(value) : "memory"); }

template <typename Work>
double PerSecond(size_t operations, Work work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return static_cast<double>(operations) / elapsed.count();
}

// What names the session of an observation.
struct Address {
  uint32_t place;
  SessionId id;
};

class Bench {
 public:
  Bench()
      : table_({.max_sessions = kActive + 1,
                .max_dormant = kDormant,
                .idle_timeout_ns = 0,
                .keep_ns = int64_t{7} * 24 * 3'600 * kNanosPerSecond,
                .unix_ns = kUnixNs,
                .seed = 1,
                .home = ShardId(0)}) {
    for (uint32_t i = 0; i < kDormant; ++i) {
      dormant_.push_back(MakeSessionId(random_.Next(), ShardId(1), i % kMaxSessionPlaces));
      table_.Restore(dormant_.back(), 0, 1, kUnixNs - random_.Below(86'400) * kNanosPerSecond);
      map_[dormant_.back()].last_sequence = 1;
    }
    std::vector<Address> active;
    for (uint32_t i = 0; i < kActive; ++i) {
      Session* session = table_.Open(0, ProducerId(0), 1, 0, kUnixNs);
      session->last_sequence = 1;
      active.push_back({table_.PlaceOf(*session), session->id});
      map_[session->id] = *session;
    }
    for (size_t i = 0; i < kOperations; ++i) {
      order_.push_back(active[random_.Below(kActive)]);
      dormant_order_.push_back(dormant_[random_.Below(kDormant)]);
    }
    CHECK(table_.size() == kActive && table_.dormant() == kDormant, "both tiers are full");
  }

  double Validations() {
    return PerSecond(kOperations, [&] {
      size_t taken = 0;
      for (const Address& address : order_) {
        Session* session = table_.At(address.place, address.id);
        taken += Validate(session);
      }
      CHECK(taken == kOperations, "all are the next one");
    });
  }
  double MapValidations() {
    return PerSecond(kOperations, [&] {
      size_t taken = 0;
      for (const Address& address : order_) taken += Validate(&map_.find(address.id)->second);
      CHECK(taken == kOperations, "all are the next one");
    });
  }
  double FindsActive() {
    return PerSecond(kOperations, [&] {
      for (const Address& address : order_) Use(table_.Find(address.id));
    });
  }
  double MapFindsActive() {
    return PerSecond(kOperations, [&] {
      for (const Address& address : order_) Use(&map_.find(address.id)->second);
    });
  }
  double FindsDormant() {
    return PerSecond(kOperations, [&] {
      size_t found = 0;
      for (const SessionId id : dormant_order_) found += table_.SpaceOf(id, kUnixNs).has_value();
      CHECK(found == kOperations, "all are known");
    });
  }
  double MapFindsDormant() {
    return PerSecond(kOperations, [&] {
      for (const SessionId id : dormant_order_) Use(&map_.find(id)->second);
    });
  }
  // There and back.
  double Resumes() {
    return PerSecond(kMoves, [&] {
      for (size_t i = 0; i < kMoves; ++i) {
        CHECK(table_.Resume(dormant_order_[i], 0, kUnixNs).has_value(), "a place is free");
        table_.Sweep(0, kUnixNs, 1);
      }
    });
  }
  double Restores() {
    return PerSecond(kMoves, [&] {
      for (size_t i = 0; i < kMoves; ++i) table_.Restore(dormant_order_[i], 0, 1, kUnixNs);
    });
  }
  double Visits() {
    return PerSecond(kActive + kDormant, [&] {
      uint64_t sum = 0;
      uint64_t cursor = 0;
      do {
        table_.Visit(&cursor, 256, [&](SessionId, uint32_t, Sequence last_sequence, int64_t) {
          sum += last_sequence;
        });
      } while (cursor != 0);
      CHECK(sum >= kActive + kDormant, "every session was visited");
    });
  }

  double bytes_per_active() const { return table_.bytes_per_active(); }
  double bytes_per_dormant() const { return table_.bytes_per_dormant(); }

 private:
  // The next observation of the session's own connection.
  static bool Validate(Session* session) {
    if (session == nullptr) return false;
    if (session->origin != 1 || session->producer != ProducerId(0)) return false;
    const Sequence sequence = session->last_sequence + 1;
    Use(&sequence);
    if (sequence > session->last_sequence + 1 || sequence <= session->last_sequence) return false;
    session->last_sequence = sequence;
    return true;
  }

  SplitMix64 random_{7};
  SessionTable table_;
  std::unordered_map<SessionId, Session> map_;
  std::vector<SessionId> dormant_;
  std::vector<Address> order_;
  std::vector<SessionId> dormant_order_;
};

struct Measure {
  const char* name;
  double (Bench::*run)();
  double (Bench::*peer)();  // of std::unordered_map
  std::vector<double> per_second{};
  std::vector<double> peer_per_second{};
};

int Run(bool json, int rounds) {
  Bench bench;
  std::array<Measure, 6> measures{{
      {"validation", &Bench::Validations, &Bench::MapValidations},
      {"find_active_by_id", &Bench::FindsActive, &Bench::MapFindsActive},
      {"find_dormant_by_id", &Bench::FindsDormant, &Bench::MapFindsDormant},
      {"resume_and_retire", &Bench::Resumes, nullptr},
      {"restore", &Bench::Restores, nullptr},
      {"visit", &Bench::Visits, nullptr},
  }};
  for (int round = 0; round < rounds + 1; ++round) {  // The first one warms up.
    for (Measure& measure : measures) {
      const double per_second = (bench.*measure.run)();
      const double peer = measure.peer != nullptr ? (bench.*measure.peer)() : 0;
      if (round == 0) continue;
      measure.per_second.push_back(per_second);
      measure.peer_per_second.push_back(peer);
    }
  }
  if (json) {
    std::printf("{\"benchmark\":\"session_table\",\"rounds\":%d,\"active\":%u,\"dormant\":%u",
                rounds, kActive, kDormant);
  } else {
    std::printf("%u active and %u dormant sessions\n\n%-20s %14s %14s\n", kActive, kDormant, "",
                "M/s", "unordered_map");
  }
  for (const Measure& measure : measures) {
    const double ours = Median(measure.per_second) / 1e6;
    const double peer = Median(measure.peer_per_second) / 1e6;
    if (json) {
      std::printf(",\"%s_m_per_s\":%.3f", measure.name, ours);
      if (peer > 0) std::printf(",\"%s_map_m_per_s\":%.3f", measure.name, peer);
    } else if (peer > 0) {
      std::printf("%-20s %14.2f %14.2f\n", measure.name, ours, peer);
    } else {
      std::printf("%-20s %14.2f %14s\n", measure.name, ours, "");
    }
  }
  if (json) {
    std::printf(",\"bytes_per_active\":%.1f,\"bytes_per_dormant\":%.1f}\n",
                bench.bytes_per_active(), bench.bytes_per_dormant());
  } else {
    std::printf("\nbytes: %.1f an active session, %.1f a dormant one\n", bench.bytes_per_active(),
                bench.bytes_per_dormant());
  }
  if (std::ranges::max(measures[0].per_second) >= kFloorPerSecond) return 0;
  std::fprintf(stderr, "fewer than %.0f validations/s\n", kFloorPerSecond);
  return 1;
}

}  // namespace
}  // namespace engram

int main(int argc, char** argv) {
  bool json = false;
  uint64_t rounds = 7;
  engram::ReadArguments(argc, argv, &json, {{"--rounds", &rounds}});
  return engram::Run(json, static_cast<int>(rounds));
}
