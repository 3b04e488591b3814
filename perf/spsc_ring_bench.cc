// Entries a second through SpscRing between two pinned threads, one at a time and in batches of 32,
// beside a mutex around a std::deque and boost::lockfree::spsc_queue, all with the same capacity.
//
//   spsc_ring_bench [--json] [--rounds N] [--entries N]
//
// An operation is an entry pushed and popped. The rounds of all queues are interleaved, so that
// whatever else the machine does meets them all. Ratios are of medians. The floor is compared with
// the best round: a queue that waits for a thread that does not run measures the scheduler. Exit
// code 1 when SpscRing is below the floor or not faster than the mutex queue.

#include <algorithm>
#include <array>
#include <atomic>
#include <boost/lockfree/spsc_queue.hpp>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <functional>
#include <mutex>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "perf/bench_support.h"
#include "src/core/check.h"
#include "src/core/spsc_ring.h"
#include "src/core/topology.h"

namespace engram {
namespace {

constexpr size_t kCapacity = 4'096;
constexpr size_t kBatch = 32;
constexpr double kFloorPerSecond = 4e6;

// Waits a little for the other side: first on this CPU, then by letting others have it.
class Backoff {
 public:
  void Wait() {
    if (++spins_ < 256) {
      std::atomic_signal_fence(std::memory_order_seq_cst);
      return;
    }
    spins_ = 0;
    std::this_thread::yield();
  }

 private:
  int spins_ = 0;
};

struct Cpus {
  int producer = -1;  // -1: not pinned
  int consumer = -1;
};

void PinTo(int cpu) {
  if (cpu >= 0) CHECK(PinThisThread(cpu).has_value(), "the processor was listed as ours");
}

// Sends 1, 2, 3, ... through a queue. `push` takes a span and `pop` fills one; both return how
// many. Each thread takes its own with it, as a core does: handles side by side would share a cache
// line. Returns entries a second.
template <typename Push, typename Pop>
double Stream(const Cpus& cpus, uint64_t entries, size_t batch, Push push, Pop pop) {
  std::atomic<int> ready{0};
  const auto meet = [&ready] {
    ready.fetch_add(1);
    while (ready.load() < 2) std::this_thread::yield();
  };
  std::thread producer([&, push = std::move(push)]() mutable {
    PinTo(cpus.producer);
    meet();
    std::array<uint64_t, kBatch> values;
    Backoff backoff;
    for (uint64_t next = 1; next <= entries;) {
      const size_t count = std::min<uint64_t>(batch, entries - next + 1);
      for (size_t i = 0; i < count; ++i) values[i] = next + i;
      const size_t pushed = push(std::span(values).first(count));
      if (pushed == 0) backoff.Wait();
      next += pushed;
    }
  });
  double seconds = 0;
  std::thread consumer([&, pop = std::move(pop)]() mutable {
    PinTo(cpus.consumer);
    meet();
    const auto start = std::chrono::steady_clock::now();
    std::array<uint64_t, kBatch> values;
    Backoff backoff;
    uint64_t sum = 0;
    for (uint64_t left = entries; left > 0;) {
      const size_t popped = pop(std::span(values).first(std::min<uint64_t>(batch, left)));
      if (popped == 0) backoff.Wait();
      for (size_t i = 0; i < popped; ++i) sum += values[i];
      left -= popped;
    }
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    CHECK(sum == entries * (entries + 1) / 2, "every entry came through once");
  });
  producer.join();
  consumer.join();
  return static_cast<double>(entries) / seconds;
}

double RingSingle(const Cpus& cpus, uint64_t entries) {
  auto [producer, consumer] = SpscRing<uint64_t>::Create(kCapacity);
  return Stream(
      cpus, entries, 1,
      [ring = std::move(producer)](std::span<const uint64_t> values) mutable {
        return size_t{ring.TryPush(values[0])};
      },
      [ring = std::move(consumer)](std::span<uint64_t> out) mutable -> size_t {
        const auto value = ring.TryPop();
        if (value) out[0] = *value;
        return value ? 1 : 0;
      });
}

double RingBatched(const Cpus& cpus, uint64_t entries) {
  auto [producer, consumer] = SpscRing<uint64_t>::Create(kCapacity);
  return Stream(
      cpus, entries, kBatch,
      [ring = std::move(producer)](std::span<const uint64_t> values) mutable {
        return ring.PushBatch(values);
      },
      [ring = std::move(consumer)](std::span<uint64_t> out) mutable { return ring.PopBatch(out); });
}

double MutexQueue(const Cpus& cpus, uint64_t entries) {
  std::mutex mutex;
  std::deque<uint64_t> queue;
  return Stream(
      cpus, entries, 1,
      [&](std::span<const uint64_t> values) -> size_t {
        const std::lock_guard lock(mutex);
        if (queue.size() == kCapacity) return 0;
        queue.push_back(values[0]);
        return 1;
      },
      [&](std::span<uint64_t> out) -> size_t {
        const std::lock_guard lock(mutex);
        if (queue.empty()) return 0;
        out[0] = queue.front();
        queue.pop_front();
        return 1;
      });
}

using BoostQueue = boost::lockfree::spsc_queue<uint64_t, boost::lockfree::capacity<kCapacity>>;

double BoostSingle(const Cpus& cpus, uint64_t entries) {
  BoostQueue queue;
  return Stream(
      cpus, entries, 1,
      [&](std::span<const uint64_t> values) { return size_t{queue.push(values[0])}; },
      [&](std::span<uint64_t> out) { return size_t{queue.pop(out[0])}; });
}

double BoostBatched(const Cpus& cpus, uint64_t entries) {
  BoostQueue queue;
  return Stream(
      cpus, entries, kBatch,
      [&](std::span<const uint64_t> values) { return queue.push(values.data(), values.size()); },
      [&](std::span<uint64_t> out) { return queue.pop(out.data(), out.size()); });
}

struct Contender {
  const char* name;
  double (*run)(const Cpus&, uint64_t);
  std::vector<double> per_second{};
  double median = 0;
  double best = 0;
};

int Run(bool json, int rounds, uint64_t entries) {
  const Result<Topology> topology = DiscoverTopology();
  Cpus cpus;
  if (topology && topology->cpus.size() >= 2) {
    cpus = {topology->cpus[0].os_index, topology->cpus[1].os_index};
  } else {
    std::fprintf(stderr, "fewer than 2 processors: not pinned, the figures mean little\n");
  }
  std::array<Contender, 5> contenders{{{"mutex_deque", MutexQueue},
                                       {"boost_spsc_queue", BoostSingle},
                                       {"spsc_ring", RingSingle},
                                       {"boost_spsc_queue_batch_32", BoostBatched},
                                       {"spsc_ring_batch_32", RingBatched}}};
  for (int round = 0; round < rounds + 1; ++round) {  // The first one warms up.
    for (Contender& contender : contenders) {
      const double per_second = contender.run(cpus, entries);
      if (round > 0) contender.per_second.push_back(per_second);
    }
  }
  for (Contender& contender : contenders) {
    contender.median = Median(contender.per_second);
    contender.best = std::ranges::max(contender.per_second);
  }
  const double mutex = contenders[0].median;
  const double ring = contenders[2].median;
  const bool pass = contenders[2].best >= kFloorPerSecond && ring > mutex;
  if (json) {
    std::printf("{\"benchmark\":\"spsc_ring\",\"rounds\":%d,\"entries\":%llu", rounds,
                static_cast<unsigned long long>(entries));
    for (const Contender& c : contenders) {
      std::printf(",\"%s_per_s\":%.0f,\"%s_per_s_best\":%.0f", c.name, c.median, c.name, c.best);
    }
    std::printf(",\"ratio_to_mutex\":%.2f,\"floor_per_s\":%.0f,\"pass\":%s}\n", ring / mutex,
                kFloorPerSecond, pass ? "true" : "false");
  } else {
    std::printf("%-28s %14s %14s %14s\n", "queue", "operations/s", "best round", "x mutex_deque");
    for (const Contender& c : contenders) {
      std::printf("%-28s %12.1f M %12.1f M %14.2f\n", c.name, c.median / 1e6, c.best / 1e6,
                  c.median / mutex);
    }
    std::printf("floor %.1f M operations/s: %s\n", kFloorPerSecond / 1e6, pass ? "pass" : "FAIL");
  }
  return pass ? 0 : 1;
}

}  // namespace
}  // namespace engram

int main(int argc, char** argv) {
  bool json = false;
  uint64_t rounds = 9;
  uint64_t entries = 500'000;
  engram::ReadArguments(argc, argv, &json, {{"--rounds", &rounds}, {"--entries", &entries}});
  return engram::Run(json, static_cast<int>(rounds), entries);
}
