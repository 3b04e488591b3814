#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "dataplane/hit_window.h"
#include "dataplane/record_reader.h"
#include "dataplane/ring_mesh.h"
#include "index/shard.h"
#include "src/core/clock.h"
#include "tests/index/space_testing.h"
#include "tests/support/allocation_counter.h"

namespace engram {

// A client's session as its connection knows it.
struct RigSession {
  size_t producer = 0;
  size_t shard = 0;
  Origin origin = 0;
  std::string space{};
  SessionId id{};
  uint32_t slot = 0;
  Sequence last_settled = 0;
  Sequence next = 1;
  uint64_t credit_sequence = 0;
  Lane lane = Lane::kNormal;
  bool may_skip = false;  // it never goes back
};

struct HelloParams {
  bool wants_session = true;
  Metric metric = Metric::kUnspecified;
  uint16_t dimension = 0;
  SessionId session{};
  size_t shard = 0;
};

struct Observation {
  ObservationOp op = ObservationOp::kUpsert;
  std::string id{};
  std::vector<float> vector{};
  std::string payload{};
  RefusalReason skip_reason = RefusalReason::kNone;
  std::string attributes{};
};

// Shards and the partitions of each space.
struct RigShards {
  uint16_t shards = 1;
  uint16_t partitions = 1;
  uint16_t max_partitions = 1;
  uint32_t peer_capacity = 16;
};

// What outlives the shards of a rig, where there is such.
struct RigWorld {
  SimulatedClock* clock = nullptr;         // nullptr: the rig's own
  std::vector<ShardStorage> storage = {};  // by shard; empty: in memory only
  std::vector<std::pair<std::string, SpaceSettings>> spaces = {};  // that are configured
  RecordAccess records = {};  // over the logs, with storage: what hits refer to is read there
};

struct RigRecord {
  SpaceRecord record;
  std::string name;
};

// What has come back for one request id.
struct RigAnswer {
  std::vector<Hit> hits;
  std::vector<RigRecord> records;
  std::vector<bool> lasts;  // of each batch
  bool done = false;
  RefusalReason reason = RefusalReason::kNone;
  bool ended = false;                        // the shard has said all; records may still be read
  size_t resolved = 0;                       // hits, from the front, that are whole
  HitWindow window{kMaxAnswerPayloadBytes};  // on those that follow
  ReadPins::Epoch pins = 0;
};

// Shards, usually one, and the test as all of their ingress cores.
class ShardRig {
  SimulatedClock own_clock_;

 public:
  static ShardOptions SmallOptions() {
    ShardOptions options;
    options.memory_limit_bytes = size_t{256} << 20;
    options.huge_pages = HugePagePolicy::kOff;
    options.build = {.M = 4, .M0 = 8, .ef_construction = 12};
    options.snapshot_keep_ns = 0;
    options.seed = 1;
    return options;
  }

  explicit ShardRig(const ShardOptions& options = SmallOptions(), uint16_t producers = 1,
                    uint32_t lane_capacity = 256, uint32_t max_spaces = 10'000,
                    const RigShards& layout = {}, const RigWorld& world = {})
      : clock(world.clock != nullptr ? *world.clock : own_clock_),
        catalogue_(max_spaces, layout.shards, layout.max_partitions,
                   {.metric = Metric::kUnspecified,
                    .precision = Precision::kUnspecified,
                    .dimension = 0,
                    .partitions = layout.partitions}) {
    for (const auto& [name, settings] : world.spaces) catalogue_.Configure(name, settings);
    auto made = RingMesh::Create({.producers = producers,
                                  .shards = layout.shards,
                                  .lane_capacity = lane_capacity,
                                  .peer_capacity = layout.peer_capacity,
                                  .huge_pages = HugePagePolicy::kOff,
                                  .producer_numa_node = {},
                                  .shard_numa_node = {},
                                  .catalogue = &catalogue_});
    CHECK(made.has_value(), "the test's mesh");
    mesh_.emplace(*std::move(made));
    for (uint16_t p = 0; p < producers; ++p) {
      ports_.push_back(mesh_->TakeProducer(ProducerId(p)));
      outstanding_.emplace_back();
    }
    for (uint16_t s = 0; s < layout.shards; ++s) {
      ShardPort port = mesh_->TakeShard(ShardId(s));
      stamps = port.stamps;
      auto created = Shard::Create(options, &clock, std::move(port),
                                   s < world.storage.size() ? world.storage[s] : ShardStorage{});
      CHECK(created.has_value(), "the test's shard");
      shards.push_back(*std::move(created));
    }
    shard = shards[0].get();
    if (world.records.make_disk == nullptr) return;
    // Patient enough for faults of the disk, and no longer than a test waits.
    RecordReaderOptions reading{.max_open_files = 48,
                                .retry_ns = kNanosPerMilli,
                                .retry_for_ns = 100 * kNanosPerMilli,
                                .slots = {{4'096, 16}, {kMaxRecordSlotBytes, 16}},
                                .huge_pages = HugePagePolicy::kOff};
    auto reader = RecordReader::Create(reading, &clock, world.records);
    CHECK(reader.has_value(), "the test's reader");
    records = *std::move(reader);
  }

  // ---- Requests ----

  SlotId PushHello(size_t producer, Origin origin, const std::string& space,
                   const HelloParams& params) {
    const SlotId slot = Take(producer, kRequestBodyOffset);
    auto* hello = new (ports_[producer].slab->At(slot)) HelloRequest;
    hello->wants_session = params.wants_session;
    hello->metric = params.metric;
    hello->dimension = params.dimension;
    hello->session = params.session;
    hello->origin = origin;
    hello->space = SpaceName(space);
    Push(producer, Lane::kRecall, slot, params.shard);
    return slot;
  }
  // Waits for the answer.
  std::pair<RefusalReason, HelloRequest> Hello(size_t producer, Origin origin,
                                               const std::string& space,
                                               const HelloParams& params = {}) {
    const Completion completion = Await(producer, PushHello(producer, origin, space, params));
    return {completion.reason, last_hello_};
  }
  // A session that must be granted.
  RigSession Open(size_t producer, Origin origin, const std::string& space,
                  const HelloParams& params = {}) {
    const auto [reason, answer] = Hello(producer, origin, space, params);
    EXPECT_EQ(reason, RefusalReason::kNone) << DescribeRefusal(reason).name;
    return {.producer = producer,
            .shard = params.shard,
            .origin = origin,
            .space = space,
            .id = answer.session,
            .slot = answer.session_slot,
            .last_settled = answer.last_sequence,
            .next = answer.last_sequence + 1,
            .credit_sequence = answer.last_sequence + answer.credit};
  }
  SlotId PushDetach(const RigSession& session) {
    const SlotId slot = Take(session.producer, kRequestBodyOffset);
    auto* request = new (ports_[session.producer].slab->At(slot)) DetachRequest;
    request->session_slot = session.slot;
    request->session = session.id;
    request->origin = session.origin;
    Push(session.producer, Lane::kRecall, slot, session.shard);
    return slot;
  }
  void Detach(const RigSession& session) { (void)Await(session.producer, PushDetach(session)); }

  bool LaneFull(const RigSession& session) {
    return LaneOf(session.producer, session.lane, session.shard).Full();
  }
  // Without a session (RigSession with id 0) the space of `session` is named.
  SlotId PushObserve(const RigSession& session, Sequence sequence, const Observation& observation) {
    const size_t vector_bytes = observation.vector.size() * sizeof(float);
    const SlotId slot =
        Take(session.producer, kRequestBodyOffset + vector_bytes + observation.id.size() +
                                   observation.attributes.size() + observation.payload.size());
    std::byte* bytes = ports_[session.producer].slab->At(slot);
    auto* request = new (bytes) ObserveRequest;
    request->op = observation.op;
    request->skip_reason = observation.skip_reason;
    if (observation.op == ObservationOp::kUpsert) request->dtype = VectorDtype::kF32;
    request->dimension = static_cast<uint16_t>(observation.vector.size());
    request->id_bytes = static_cast<uint16_t>(observation.id.size());
    request->attribute_bytes = static_cast<uint16_t>(observation.attributes.size());
    request->payload_bytes = static_cast<uint32_t>(observation.payload.size());
    request->session_slot = session.slot;
    request->session = session.id;
    request->sequence = sequence;
    request->may_skip = session.may_skip;
    request->space = SpaceName(session.space);
    request->origin = session.origin;
    request->received_ns = clock.MonotonicNs();
    std::byte* to = bytes + kRequestBodyOffset;
    to = std::copy_n(reinterpret_cast<const std::byte*>(observation.vector.data()), vector_bytes,
                     to);
    to = std::ranges::copy(BytesOf(observation.id), to).out;
    to = std::ranges::copy(BytesOf(observation.attributes), to).out;
    std::ranges::copy(BytesOf(observation.payload), to);
    Push(session.producer, session.lane, slot, session.shard);
    return slot;
  }
  // Without a session, to the shard that `session` names; the answer is in the request.
  std::pair<Completion, ObserveRequest> ObserveAlone(const RigSession& session,
                                                     const Observation& observation) {
    const Completion completion =
        Await(session.producer, PushObserve(session, ++last_request_id_, observation));
    return {completion, last_observe_};
  }
  // Sends the session's next observation and waits for its completion.
  Completion Observe(RigSession* session, const Observation& observation) {
    return ObserveAs(session, session->next, observation);
  }
  Completion ObserveAs(RigSession* session, Sequence sequence, const Observation& observation) {
    const Completion completion =
        Await(session->producer, PushObserve(*session, sequence, observation));
    if (completion.reason == RefusalReason::kNone ||
        DescribeRefusal(completion.reason).effect == RefusalEffect::kConsumes) {
      session->next = std::max(session->next, sequence + 1);
    }
    session->credit_sequence = std::max(session->credit_sequence, completion.credit_sequence);
    return completion;
  }

  uint64_t PushRecall(size_t producer, const std::string& space, const std::vector<float>& query,
                      const RecallParams& params = {}, size_t at_shard = 0) {
    const size_t query_bytes = query.size() * sizeof(float);
    const SlotId slot = Take(producer, kRequestBodyOffset + query_bytes + params.filter.size());
    std::byte* bytes = ports_[producer].slab->At(slot);
    auto* request = new (bytes) RecallRequest;
    request->filter_bytes = static_cast<uint16_t>(params.filter.size());
    request->dtype = VectorDtype::kF32;
    request->with_payload = params.with_payload;
    request->with_vector = params.with_vector;
    request->space = SpaceName(space);
    request->dimension = static_cast<uint16_t>(query.size());
    request->k = params.k;
    request->ef = params.ef;
    request->snapshot = params.snapshot;
    request->first = params.first;
    request->has_bound = params.bound.has_value();
    request->bound = params.bound.value_or(0);
    request->across = params.across != Metric::kUnspecified;
    request->metric = params.across;
    request->origin = 1;
    request->request_id = ++last_request_id_;
    std::memcpy(bytes + kRequestBodyOffset, query.data(), query_bytes);
    std::ranges::copy(BytesOf(params.filter), bytes + kRequestBodyOffset + query_bytes);
    if (records != nullptr) answers[last_request_id_].pins = records->EnterPins();
    Push(producer, Lane::kRecall, slot, at_shard);
    return last_request_id_;
  }
  RigAnswer Recall(const std::string& space, const std::vector<float>& query,
                   const RecallParams& params = {}, size_t at_shard = 0) {
    const uint64_t id = PushRecall(0, space, query, params, at_shard);
    EXPECT_TRUE(PollUntil([&] { return answers[id].done; }));
    return answers[id];
  }
  uint64_t PushIntrospect(size_t producer) {
    const SlotId slot = Take(producer, kRequestBodyOffset);
    auto* request = new (ports_[producer].slab->At(slot)) IntrospectRequest;
    request->origin = 1;
    request->request_id = ++last_request_id_;
    Push(producer, Lane::kRecall, slot);
    return last_request_id_;
  }

  // Begins a drop as whoever is asked for it does, and asks every shard.
  void PushCommand(SpaceCommand what, const std::string& space) {
    SpaceEntry* known = catalogue_.Find(space);
    if (what == SpaceCommand::kDrop) {
      CHECK(known != nullptr && known->BeginDrop(), "the test drops what is there");
    }
    if (what == SpaceCommand::kRebuild) {
      CHECK(known != nullptr && known->BeginRebuild(static_cast<uint16_t>(shards.size())),
            "the test rebuilds what is there, once at a time");
    }
    commanded = CommandRequest();
    command_reason = RefusalReason::kNone;
    for (size_t s = 0; s < shards.size(); ++s) {
      const SlotId slot = Take(0, kRequestBodyOffset);
      auto* request = new (ports_[0].slab->At(slot)) CommandRequest;
      request->what = what;
      request->origin = 1;
      request->request_id = ++last_request_id_;
      request->space = SpaceName(space);
      ++commands_under_way;
      Push(0, Lane::kRecall, slot, s);
    }
  }
  // Waits for the answers; their sums.
  CommandRequest Command(SpaceCommand what, const std::string& space) {
    PushCommand(what, space);
    EXPECT_TRUE(PollUntil([&] { return commands_under_way == 0; }));
    return commanded;
  }

  // ---- The shards' turns, and what comes back ----

  int Poll() {
    if (polled_elsewhere) {
      std::this_thread::yield();
      Drain();
      return 0;
    }
    clock.AdvanceNs(10'000);
    int work = 0;
    for (size_t s = 0; s < shards.size(); ++s) work += PollShard(s);
    return work + ReadRecords();
  }
  // What the hits of answers refer to.
  int ReadRecords() {
    if (records == nullptr) return 0;
    int work = records->Poll();
    std::erase_if(reading_, [&](uint64_t id) {
      if (!ContinueReading(&answers[id])) return false;
      ++work;
      return true;
    });
    return work;
  }
  int PollShard(size_t which) {
    const uint64_t before = AllocationCount();
    const int work = shards[which]->Poll();
    poll_allocations += AllocationCount() - before;
    if (!hold_completions) Drain();
    return work;
  }
  template <typename Done>
  bool PollUntil(Done&& done, int polls = 100'000) {
    for (int i = 0; i < polls || polled_elsewhere; ++i) {
      if (done()) return true;
      Poll();
    }
    return done();
  }
  // Until nothing waits, linking included.
  void Settle() {
    const auto idle = [](const auto& each) { return each->Idle(); };
    EXPECT_TRUE(
        PollUntil([&] { return std::ranges::all_of(shards, idle) && Poll() == 0; }, 1'000'000));
  }
  void Drain() {
    for (size_t producer = 0; producer < ports_.size(); ++producer) {
      for (size_t from = 0; from < shards.size(); ++from) {
        while (const auto completion = ports_[producer].shards[from].completions.TryPop()) {
          Take(producer, from, *completion);
        }
      }
    }
  }
  void ReturnHeldResults() {
    for (const HeldResult& held : held_results) {
      ReturnResult(held.producer, held.shard, held.slot);
    }
    held_results.clear();
  }
  const HelloRequest& last_hello() const { return last_hello_; }
  size_t outstanding(size_t producer) const { return outstanding_[producer].size(); }
  uint64_t counter(ShardCounter which, size_t of = 0) const {
    return shards[of]->counter(which).Read();
  }
  SpaceEntry* entry(const std::string& space) { return catalogue_.Find(space); }
  SpaceEntry* MakeSpace(const std::string& space, Metric metric) {
    return catalogue_.FindOrAdd(space, metric);
  }

  SimulatedClock& clock;
  const StampBoard* stamps = nullptr;

 private:
  SpaceCatalogue catalogue_;
  std::optional<RingMesh> mesh_;
  std::vector<ProducerPort> ports_;

 public:
  std::vector<std::unique_ptr<Shard>> shards;
  Shard* shard = nullptr;  // the first
  // Before the answers, whose hits it reads; nullptr: the shards have no logs.
  std::unique_ptr<RecordReader> records;
  // Everything that came back, in order.
  std::vector<std::pair<size_t, Completion>> completions;
  std::map<uint64_t, RigAnswer> answers;
  std::map<uint64_t, CommitStamp> alone_stamps;  // without a session, by the request's number
  CommandRequest commanded;                      // the sums of what the shards have answered
  RefusalReason command_reason = RefusalReason::kNone;
  size_t commands_under_way = 0;
  bool hold_completions = false;
  bool polled_elsewhere = false;  // by threads of the test; this one only takes what comes back
  bool hold_results = false;
  struct HeldResult {
    size_t producer;
    size_t shard;
    SlotId slot;
  };
  std::vector<HeldResult> held_results;
  uint64_t poll_allocations = 0;

 private:
  SpscRing<SlotId>::Producer& LaneOf(size_t producer, Lane lane, size_t to) {
    return ports_[producer].shards[to].lanes[static_cast<size_t>(lane)];
  }
  SlotId Take(size_t producer, size_t bytes) {
    const SlotId slot = ports_[producer].slab->Acquire(bytes);
    CHECK(slot != kNoSlot, "the test keeps to its slots");
    return slot;
  }
  void Push(size_t producer, Lane lane, SlotId slot, size_t to = 0) {
    CHECK(LaneOf(producer, lane, to).TryPush(slot), "the test keeps to its lanes");
    CHECK(outstanding_[producer].insert(slot).second, "a slot is pushed once");
  }
  Completion Await(size_t producer, SlotId slot) {
    const size_t from = completions.size();
    std::optional<Completion> found;
    const bool came = PollUntil([&] {
      for (size_t i = from; i < completions.size(); ++i) {
        if (completions[i].first == producer && completions[i].second.slot == slot) {
          found = completions[i].second;
        }
      }
      return found.has_value();
    });
    EXPECT_TRUE(came) << "no completion";
    return found.value_or(Completion{});
  }
  void ReturnResult(size_t producer, size_t from, SlotId slot) {
    CHECK(ports_[producer].shards[from].result_returns.TryPush(slot),
          "a ring for every result slot");
  }
  void Take(size_t producer, size_t from, const Completion& completion) {
    completions.emplace_back(producer, completion);
    if (completion.result_slot != kNoSlot) TakeResult(producer, from, completion);
    if (completion.kind == CompletionKind::kRecallDone ||
        completion.kind == CompletionKind::kIntrospectDone) {
      RigAnswer& answer = answers[completion.sequence];
      EXPECT_FALSE(answer.ended) << "an answer ends once";
      answer.ended = true;
      answer.reason = completion.reason;
      if (!ContinueReading(&answer)) reading_.push_back(completion.sequence);
    }
    if (completion.slot == kNoSlot) return;
    EXPECT_EQ(outstanding_[producer].erase(completion.slot), 1u) << "a slot comes back once";
    if (completion.kind == CompletionKind::kHello) {
      last_hello_ =
          *reinterpret_cast<const HelloRequest*>(ports_[producer].slab->At(completion.slot));
    }
    if (completion.kind == CompletionKind::kCommand) {
      const auto* request =
          reinterpret_cast<const CommandRequest*>(ports_[producer].slab->At(completion.slot));
      commanded.observations += request->observations;
      commanded.bytes_before += request->bytes_before;
      commanded.bytes_after += request->bytes_after;
      if (completion.reason != RefusalReason::kNone) command_reason = completion.reason;
      --commands_under_way;
    }
    if (completion.kind == CompletionKind::kObserve) {
      last_observe_ =
          *reinterpret_cast<const ObserveRequest*>(ports_[producer].slab->At(completion.slot));
      last_space_dimension = last_observe_.space_dimension;
      if (last_observe_.session.value() == 0) {
        alone_stamps[last_observe_.sequence] = last_observe_.stamp;
      }
    }
    ports_[producer].slab->Release(completion.slot);
  }
  void TakeResult(size_t producer, size_t from_shard, const Completion& completion) {
    const std::byte* slot =
        ports_[producer].shards[from_shard].result_slab->At(completion.result_slot);
    RigAnswer& answer = answers[completion.sequence];
    EXPECT_FALSE(answer.ended) << "nothing follows the end";
    if (completion.kind == CompletionKind::kResults) {
      answer.lasts.push_back(ReadBatch(slot, &answer.hits).is_last());
    } else {
      ResultBatch batch;
      std::memcpy(&batch, slot, sizeof(batch));
      const std::byte* from = slot + sizeof(batch);
      for (uint16_t i = 0; i < batch.count; ++i) {
        RigRecord read;
        std::memcpy(&read.record, from, sizeof(read.record));
        read.name.assign(reinterpret_cast<const char*>(from + sizeof(read.record)),
                         read.record.name_bytes);
        EXPECT_EQ(read.record.record_bytes, SpaceRecordBytes(read.name.size()));
        EXPECT_EQ(SumOf(MemoryInRecord(read.record, {from, read.record.record_bytes})),
                  read.record.resident_bytes);
        from += read.record.record_bytes;
        answer.records.push_back(read);
      }
      EXPECT_EQ(static_cast<size_t>(from - slot), sizeof(batch) + batch.body_bytes);
      answer.lasts.push_back(batch.is_last());
    }
    if (hold_results) {
      held_results.push_back({producer, from_shard, completion.result_slot});
    } else {
      ReturnResult(producer, from_shard, completion.result_slot);
    }
  }

  // True when all hits are whole.
  bool ContinueReading(RigAnswer* answer) {
    for (;;) {
      const auto next = [answer] { return answer->resolved + answer->window.size(); };
      while (!answer->window.full() && next() < answer->hits.size()) {
        const Hit& hit = answer->hits[next()];
        // Those that were whole come back as they are.
        if (hit.at_address.empty() && answer->window.size() > 0) break;
        if (hit.at_address.empty()) {
          ++answer->resolved;
        } else if (!answer->window.Add(hit.at_address.data(), records.get())) {
          return false;
        }
      }
      if (answer->window.size() == 0) break;
      const size_t bytes = answer->window.BytesAt(0, records.get());
      if (bytes == 0) return false;
      std::vector<std::byte> whole(sizeof(ResultBatch) + bytes);
      const ResultBatch head{.body_bytes = static_cast<uint32_t>(bytes), .count = 1};
      std::memcpy(whole.data(), &head, sizeof(head));
      answer->window.WriteFirst(&whole[sizeof(head)], records.get());
      std::vector<Hit> read;
      ReadBatch(whole.data(), &read);
      answer->hits[answer->resolved++] = read[0];
    }
    answer->done = true;
    if (answer->pins != 0) records->LeavePins(std::exchange(answer->pins, 0));
    return true;
  }

  std::vector<uint64_t> reading_;              // answers that are not whole yet
  std::vector<std::set<SlotId>> outstanding_;  // by producer
  HelloRequest last_hello_;
  ObserveRequest last_observe_;
  uint64_t last_request_id_ = 0;

 public:
  uint16_t last_space_dimension = 0;
};

}  // namespace engram
