#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "perf/peer_comparison.h"
#include "src/core/result.h"

namespace engram {

// What a comparison was of, for its reader.
struct ComparisonSubject {
  std::string set;  // name of the vector set
  uint32_t dimension = 0;
  size_t rows = 0;
  size_t queries = 0;
  std::string precision;
  std::string traversal;
  uint32_t default_ef = 0;  // of a shard; among the ef of the curves
  uint64_t seed = 0;
  ComparisonOptions options;
  MachineShare inserting;
  MachineShare recalling;
  double load_before = 0;  // load average of the last minute
  double load_after = 0;
};

// contenders[0] is ours, [1] hnswlib as it is usually built, the others hnswlib at cheaper
// settings.
//
// The figures, by their keys in the JSON line; null where there is none:
//   linked_inserts_over_hnswlib   linked inserts/s of all rows, ours over [1]'s. What waits for the
//                                 graph to begin (Space::kGraphFrom) does not count before it is
//                                 linked; its time does.
//   linked_inserts_over_hnswlib_chunk_median
//                                 the same as the median over chunks: not one noisy stretch's
//   linked_inserts_over_hnswlib_last_tenth
//                                 the same over the last tenth of the rows
//   recalls_over_hnswlib_at_090, _095, _098, _099
//                                 recalls/s at that recall@10, ours over [1]'s (RateRatio)
//   recalls_over_hnswlib_least    the least of these from 0.90 to 0.995 (LeastRateRatio)
//   recall_at_10                  ours with a shard's default ef
//   hnswlib_recall_at_10          that of [1] with the same ef
//   hnswlib_cheapest              of [1] and the cheaper settings the one with the most inserts/s
//                                 that has equal recalls/s at equal recall, at every recall of our
//                                 curve from 0.90 on (HaveEqualRates)
//   linked_inserts_over_hnswlib_cheapest
//                                 linked inserts/s, ours over that setting's
//   hnswlib_cheapest_at_095, _099, linked_inserts_over_hnswlib_cheapest_at_095, _099
//                                 likewise at this one recall
//   hnswlib_best_recalls_at_095, _099
//                                 recalls/s there of its best setting, over ours. Below 0.97 no
//                                 setting has our recalls/s, and "equal" above is as good as [1].
std::string ComparisonJson(const ComparisonSubject& subject,
                           const std::vector<Contender>& contenders);

// The same for people, on standard output.
void PrintComparison(const ComparisonSubject& subject, const std::vector<Contender>& contenders);

// Two plots into `directory`, which is made where it is missing: inserts/s over the rows that are
// in, and recall@10 against recalls/s. Returns their paths. Errors: those of the file system.
Result<std::vector<std::string>> WriteComparisonPlots(const ComparisonSubject& subject,
                                                      const std::vector<Contender>& contenders,
                                                      const std::string& directory);

}  // namespace engram
