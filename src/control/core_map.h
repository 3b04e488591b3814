#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "src/core/topology.h"
#include "src/core_runner.h"

// Which processor does what: the plan where the operator leaves it open, and the check of what
// stands in the end. Plain values in, plain values out: the same for the daemon at its start, for
// `engramctl topology --suggest` and for machines that are not there.

namespace engram {

enum class CoreRole : uint8_t { kControl, kIngress, kShard, kRecall };
inline constexpr CoreRole kCoreRoles[] = {CoreRole::kControl, CoreRole::kIngress, CoreRole::kShard,
                                          CoreRole::kRecall};
std::string_view CoreRoleName(CoreRole role);   // "ingress"
std::string_view CoreRoleField(CoreRole role);  // "cores.ingress"

enum class CoreMode : uint8_t {
  kAuto,             // run to completion up to two worker cores, else pipelined
  kRunToCompletion,  // ingress i and shard i share a processor
  kPipelined,        // no processor is both
};
std::string_view CoreModeName(CoreMode mode);

// Processors of one role. A commit stamp has a byte for the shard's number.
inline constexpr size_t kMaxCoresOfRole = 255;

// Processors by number, of each role.
struct CoreMap {
  std::vector<int> control = {};
  std::vector<int> ingress = {};
  std::vector<int> shard = {};
  std::vector<int> recall = {};

  const std::vector<int>& of(CoreRole role) const;
  std::vector<int>& of(CoreRole role);
  friend bool operator==(const CoreMap&, const CoreMap&) = default;
};

// What the operator asks for. Empty lists are the planner's (no recall cores, for that role).
struct CoreRequest {
  CoreMap given = {};
  std::vector<int> sockets = {};  // only these, by socket_index; empty: all
  CoreMode mode = CoreMode::kAuto;
  IdleStrategy idle = IdleStrategy::kHybrid;
};

// Why these processors have this role; without a role: why they have none.
struct CoreReason {
  std::optional<CoreRole> role;
  std::vector<int> cpus;
  std::string why;
};

struct CorePlan {
  CoreMap map;
  CoreMode mode = CoreMode::kRunToCompletion;  // what the map amounts to
  std::string mode_reason;
  std::vector<CoreReason> reasons;  // role by role; within a role, in the order of the map's list
};

// Fills in what the request leaves open, in this order:
//   1. Whole free cores are gathered node by node: within the sockets asked for, without those that
//      a given list uses. A worker takes one processor of a core and leaves the hyperthreads beside
//      it free.
//   2. Control: the first core of the first node where there are four cores or more. On smaller
//      machines the last hyperthread, else the last core.
//   3. Up to two worker cores, or where asked: run to completion, an ingress and a shard on each.
//   4. Else pipelined, node by node: about one ingress core to three shards, all on the same node.
// Deterministic. Always answers; what cannot work is for CheckCoreMap to say.
CorePlan PlanCoreMap(const Topology& topology, const CoreRequest& request);

struct CoreFault {
  // Of the fields concerned; the first one that the operator wrote is the one to point at.
  std::vector<std::string_view> fields;
  std::string message;  // what is wrong, with the value; what to do
};

// Everything that is wrong with `map`, which PlanCoreMap made from `request`. Without a topology,
// only what needs none.
std::vector<CoreFault> CheckCoreMap(const Topology* topology, const CoreRequest& request,
                                    const CoreMap& map);

// The section [cores] of a configuration file, with a reason in a comment at each line.
std::string CoreMapToml(const CorePlan& plan, IdleStrategy idle);

// {0, 1, 2, 5} as "0-2, 5".
std::string CpuRanges(std::vector<int> cpus);

std::string_view IdleStrategyName(IdleStrategy idle);

}  // namespace engram
