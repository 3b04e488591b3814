#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "dataplane/frame_format.h"
#include "src/core/hash.h"
#include "src/core/simulated_network.h"

namespace engram {

struct SimClientOptions {
  std::string space = "default";
  Metric metric = Metric::kCosine;
  uint16_t dimension = 8;
  Priority priority = Priority::kNormal;
  uint32_t observations = 100;
  uint32_t invalid_percent = 0;  // share of observations that must be refused
  uint32_t recall_percent = 30;  // chance of a recall after each ack
  bool honours_credit = true;
  std::string id_prefix = "o";
  uint64_t seed = 1;
};

// A client of the native frames in simulated time: streams observations with go-back-N and checks
// every answer against what it knows. It speaks from FORMAT.md, on its own buffers.
//
// What it asserts as it goes (violations are kept, not thrown): acks never fall, never pass what
// was sent; a recall begun after an ack finds the acked observation by its own vector; hits are in
// order; refusals name the reason that was provoked.
class SimClient {
 public:
  SimClient(SimulatedNetwork* network, const SimClientOptions& options);

  // Reads what arrived and sends what may be sent.
  void Step();
  // Everything was settled, every recall answered.
  bool done() const;
  const std::vector<std::string>& violations() const { return violations_; }
  // A digest of every frame that arrived, in order.
  uint64_t digest() const { return digest_; }

  // The observations that were acked, by id.
  const std::map<std::string, std::vector<float>>& stored() const { return stored_; }
  const std::map<RefusalReason, uint32_t>& refusals() const { return refusals_; }
  uint64_t rollbacks() const { return rollbacks_; }
  uint64_t recalls_answered() const { return recalls_answered_; }
  const SimClientOptions& options() const { return options_; }

 private:
  struct Observation {
    std::string id;
    std::vector<float> vector;
    RefusalReason fault = RefusalReason::kNone;  // what it must be refused for
  };

  void Violation(const std::string& what);
  void SendFrame(FrameHeader header, const std::vector<std::byte>& body);
  void SendHello();
  void SendObservations();
  void SendRecall(uint64_t sequence);
  void FlushOutgoing();
  bool TakeFrame();
  void TakeAck(const FrameHeader& header, std::span<const std::byte> body);
  void TakeNak(const FrameHeader& header, std::span<const std::byte> body);
  void TakeResult(const FrameHeader& header, std::span<const std::byte> body);
  void Settle(uint64_t sequence);

  SimulatedNetwork* network_;
  SimClientOptions options_;
  SplitMix64 random_;
  SimulatedNetwork::ClientHandle handle_;
  std::vector<Observation> observations_;  // sequence - 1
  std::vector<std::byte> incoming_;
  std::vector<std::byte> outgoing_;
  bool greeted_ = false;
  uint64_t session_ = 0;
  uint64_t settled_ = 0;
  uint64_t next_ = 1;
  uint64_t credit_ = 0;
  std::set<uint64_t> consumed_;           // refused for good, not passed by an ack yet
  std::map<uint64_t, uint64_t> recalls_;  // request id -> sequence whose id must come first
  std::map<uint64_t, uint32_t> hits_seen_;
  uint64_t next_recall_ = 1;
  std::map<std::string, std::vector<float>> stored_;
  std::map<RefusalReason, uint32_t> refusals_;
  uint64_t rollbacks_ = 0;
  uint64_t recalls_answered_ = 0;
  uint64_t digest_ = 0;
  std::vector<std::string> violations_;
};

}  // namespace engram
