// How a space comes by the codes that its graph is walked with (see space.h), and linking by them.
//
// 1. Drift: where there are codes, whether the centroid of a sample of what lives is elsewhere by
//    now.
// 2. Learn: a centroid from the sample, and how well its codes tell near from far. Where that is
//    not well enough the graph is walked with int8 codes; where these are no better, with the
//    vectors as they are kept. Where it is, and there are codes whose centroid has not moved, they
//    stay.
// 3. Encode: every node in the graph gets its code, and is listed with it if it is in no list yet.
//    Readers walk as before meanwhile.
// 4. Publish: from then on readers walk with the new codes. Earlier ones go once no reader has
//    them; until then nothing is linked, as it would have no earlier code.
// 5. Recode: the lists' copies of earlier codes are replaced.
// It begins once there is a graph, and again each time when the space has taken in some times as
// many nodes as lived then. Linking waits for it: what is not linked is found by the scan.

#include <algorithm>
#include <array>
#include <new>
#include <utility>

#include "index/space.h"
#include "src/core/check.h"
#include "src/core/hash.h"

namespace engram {

namespace {

// Nodes to take in before learning is thought of again, in units of those that live.
constexpr uint64_t kLearnAgainFactor = 3;
// Of a sample, the share that is neighbours of each other, and of how many lists.
constexpr size_t kNeighboursShare = 4;
constexpr uint32_t kListsSampled = 8;
// A new centroid that saves less of the residuals is not worth encoding everything again.
constexpr double kWorthwhileDrift = 0.05;
constexpr uint32_t kWorkOfDrift = 32;
constexpr uint32_t kWorkOfLearning = 2'000;
constexpr uint32_t kWorkOfEncoding = 128;
constexpr uint32_t kWorkOfListing = 64;
constexpr uint64_t kWorkOfGathering = uint64_t{InvertedLists::kMostAtOnce} * kWorkOfEncoding;

using Numbers = std::array<float, kMaxDimension>;

}  // namespace

bool Space::WantsCodes() const {
  if (options_.traversal != Traversal::kRabitq || !has_graph_) return false;
  if (codes_step_ != CodesStep::kNone && codes_step_ != CodesStep::kLearned) return true;
  return nodes_taken_ >= learn_at_ && retired_codes_ == nullptr;
}

void Space::StepCodes(CodeLearning* learning, uint32_t max_distances) {
  switch (codes_step_) {
    case CodesStep::kNone:
    case CodesStep::kLearned:
      BeginLearning(learning);
      break;
    case CodesStep::kDrift:
      MeasureDrift(learning, max_distances);
      break;
    case CodesStep::kLearning:
      LearnSome(learning, max_distances);
      break;
    case CodesStep::kEncoding:
      EncodeSome(max_distances);
      break;
    case CodesStep::kRecoding:
      RecodeSome(max_distances);
      break;
  }
}

// A sample of what lives: most of it spread over all places, the rest the members of some lists,
// which shows whether near ones can be told from each other.
void Space::BeginLearning(CodeLearning* learning) {
  const size_t most = learning->sample.size();
  const size_t spread = lists_ ? most - most / kNeighboursShare : most;
  const size_t nodes = node_count();
  const size_t places = std::min(nodes, spread);
  size_t count = 0;
  for (size_t place = 0; place < places; ++place) {
    const auto node = static_cast<NodeId>(place * nodes / places);
    if (IsLive(node)) learning->sample[count++] = node;
  }
  learning->spread_size = count;
  const uint32_t lists = lists_ ? lists_->count() : 0;
  for (uint32_t i = 0; i < std::min(lists, kListsSampled); ++i) {
    const auto list = static_cast<uint32_t>(MixBits(nodes_taken_ + i) % lists);
    lists_->ForEachBlock(list, [&](const InvertedLists::Block& block) {
      for (const NodeId node : block.nodes) {
        if (count < most && IsLive(node)) learning->sample[count++] = node;
      }
    });
  }
  learning->sample_size = count;
  learning->next = 0;
  learning->has_moved = true;
  learn_at_ =
      nodes_taken_ + std::max<uint64_t>({kLearnAgainFactor * live_, options_.graph_from, 1});
  const WalkCodes* const codes = walk_codes();
  if (learning->spread_size == 0) return;
  if (codes != nullptr && learning->drift.Start(&codes->format())) {
    codes_step_ = CodesStep::kDrift;
  } else {
    StartLearner(learning);
  }
}

// 1.
void Space::MeasureDrift(CodeLearning* learning, uint32_t max_distances) {
  Numbers numbers;
  for (uint32_t work = 0; work < max_distances; work += kWorkOfDrift) {
    if (learning->next == learning->spread_size) {
      learning->has_moved = learning->drift.SavedShare() >= kWorthwhileDrift;
      learning->drift.Stop();
      StartLearner(learning);
      return;
    }
    code_format_->Decode(codes_->Row(learning->sample[learning->next++]), numbers.data());
    learning->drift.Add(numbers.data());
  }
}

// 2.
void Space::StartLearner(CodeLearning* learning) {
  learning_ = learning;
  const auto code_row = [](const void* context, size_t index) {
    const auto* space = static_cast<const Space*>(context);
    return space->codes_->Row(space->learning_->sample[index]);
  };
  const auto exact_row = [](const void* context, size_t index) {
    const auto* space = static_cast<const Space*>(context);
    return space->exact_->Row(space->learning_->sample[index]);
  };
  RabitqSample sample{.format = &*code_format_,
                      .count = learning->sample_size,
                      .row = code_row,
                      .context = this,
                      .mean_count = learning->spread_size};
  if (exact_) {
    sample.format = &*exact_format_;
    sample.row = exact_row;
    sample.coarse = &*code_format_;
    sample.coarse_row = code_row;
  }
  learning->learner.Start(sample, options_.build.seed + nodes_taken_);
  codes_step_ = CodesStep::kLearning;
}

void Space::LearnSome(CodeLearning* learning, uint32_t max_distances) {
  for (uint32_t work = 0; work < max_distances; work += kWorkOfLearning) {
    const RabitqLearner::Progress progress = learning->learner.Step();
    if (progress == RabitqLearner::Progress::kGoesOn) continue;
    EndLearning(learning, progress == RabitqLearner::Progress::kDone);
    return;
  }
}

void Space::EndLearning(CodeLearning* learning, bool is_done) {
  RabitqLearner& learner = learning->learner;
  const bool is_good = is_done && learner.IsGood();
  RabitqFormat* format = nullptr;
  if (is_good && learning->has_moved) format = learner.TakeFormat();
  if (is_done) {
    // The int8 rows are what codes are made of, and what candidates are compared by.
    const bool is_int8_good = learner.IsCoarseGood();
    walks_exact_.store(!is_int8_good, std::memory_order_release);
    if (!is_good || !is_int8_good) {
      RabitqFormat::Destroy(std::exchange(format, nullptr), heap_);
      WithdrawCodes();
    }
  }
  const double residual = learner.mean_squared_residual();
  learner.Stop();
  learning_ = nullptr;
  if (format != nullptr) {
    BeginEncoding(format, residual);
  } else if (codes_step_ == CodesStep::kLearning) {
    GiveUpCodes();
  }
}

void Space::BeginEncoding(RabitqFormat* format, double mean_squared_residual) {
  std::byte* memory = heap_->Allocate(sizeof(WalkCodes));
  if (memory == nullptr) {
    RabitqFormat::Destroy(format, heap_);
    GiveUpCodes();
    return;
  }
  next_codes_ = new (memory) WalkCodes(heap_, format, mean_squared_residual);
  if (!lists_)
    lists_.emplace(heap_, &*code_format_, &*codes_, SignBlocks(*format), format->row_bytes());
  next_encoded_ = 0;
  codes_step_ = CodesStep::kEncoding;
}

// The data are not, or no longer, fit for codes.
void Space::WithdrawCodes() {
  retired_codes_ = walk_codes_.exchange(nullptr, std::memory_order_acq_rel);
  if (retired_codes_ != nullptr) retired_codes_epoch_ = epochs_->Close();
  lists_.reset();
  codes_step_ = CodesStep::kNone;
}

// Nothing new is needed, or memory is short: what there is stays in use.
void Space::GiveUpCodes() {
  DropCodes(std::exchange(next_codes_, nullptr));
  const bool has_codes = walk_codes() != nullptr;
  if (!has_codes) lists_.reset();
  codes_step_ = has_codes ? CodesStep::kLearned : CodesStep::kNone;
}

// 3.
void Space::EncodeSome(uint32_t max_distances) {
  std::array<NodeId, InvertedLists::kMostAtOnce> unlisted;
  for (uint32_t work = 0; work < max_distances;) {
    size_t count = 0;
    // To choose lists for one costs as much as for some.
    const auto has_time = [&] {
      return work < uint64_t{max_distances} + (count > 0 ? kWorkOfGathering : 0);
    };
    for (; next_encoded_ < node_count() && count < unlisted.size() && has_time(); ++next_encoded_) {
      const NodeId node = next_encoded_;
      ++work;
      if (!graph_.IsLinked(node) && !graph_.IsDoomed(node)) continue;
      if (!EncodeNode(next_codes_, node)) {
        GiveUpCodes();
        return;
      }
      work += kWorkOfEncoding;
      if (walk_codes() == nullptr && !lists_->Has(node)) unlisted[count++] = node;
    }
    if (count > 0) {
      if (!ListNodes(*next_codes_, std::span(unlisted).first(count))) {
        GiveUpCodes();
        return;
      }
      work += kWorkOfListing * static_cast<uint32_t>(count);
      lists_->SplitOne();
    }
    if (next_encoded_ == node_count()) {
      PublishCodes(std::exchange(next_codes_, nullptr));
      return;
    }
  }
}

bool Space::EncodeNode(WalkCodes* codes, NodeId node) {
  if (!codes->rows().Reserve(size_t{node} + 1)) return false;
  Numbers numbers;
  code_format_->Decode(codes_->Row(node), numbers.data());
  codes->format().Encode(numbers.data(), codes->rows().Row(node));
  return true;
}

bool Space::ListNodes(const WalkCodes& codes, std::span<const NodeId> nodes) {
  if (!lists_->Reserve(node_count())) return false;
  std::array<const std::byte*, InvertedLists::kMostAtOnce> rows;
  std::array<InvertedLists::Choice, InvertedLists::kMostAtOnce> choices;
  for (size_t i = 0; i < nodes.size(); ++i) rows[i] = codes_->Row(nodes[i]);
  lists_->Choose(block_products_, std::span(rows).first(nodes.size()), 0, choices.data());
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (!lists_->Add(choices[i].home, nodes[i], codes.rows().Row(nodes[i]))) return false;
  }
  return true;
}

// 4.
void Space::PublishCodes(WalkCodes* codes) {
  CHECK(retired_codes_ == nullptr, "earlier codes have gone before others are learned");
  retired_codes_ = walk_codes_.exchange(codes, std::memory_order_acq_rel);
  if (retired_codes_ == nullptr) {
    codes_step_ = CodesStep::kLearned;
    return;
  }
  retired_codes_epoch_ = epochs_->Close();
  next_recoded_ = 0;
  codes_step_ = CodesStep::kRecoding;
}

void Space::ReclaimCodes() {
  if (retired_codes_ == nullptr || !epochs_->Passed(retired_codes_epoch_)) return;
  DropCodes(std::exchange(retired_codes_, nullptr));
}

void Space::DropCodes(WalkCodes* codes) {
  if (codes == nullptr) return;
  codes->~WalkCodes();
  heap_->Free(reinterpret_cast<std::byte*>(codes), sizeof(WalkCodes));
}

// 5.
void Space::RecodeSome(uint32_t max_distances) {
  const WalkCodes& codes = *walk_codes();
  for (uint32_t work = 0; work < max_distances && next_recoded_ < lists_->count();
       ++next_recoded_) {
    lists_->Recode(next_recoded_, [&codes](NodeId node) { return codes.rows().Row(node); });
    work += lists_->size(next_recoded_) + 1;
  }
  if (next_recoded_ >= lists_->count()) codes_step_ = CodesStep::kLearned;
}

// ---------------------------------------------------------------------------------------------
// Linking

bool Space::BeginLinking(HnswLinker* linker, NodeId node) {
  CHECK(nodes_[node].state == NodeState::kUnlinked, "only a new node is linked");
  CHECK(retired_codes_ == nullptr, "no reader walks by codes that the node does not get");
  NoteLinking(node);
  WalkCodes* const codes = walk_codes_.load(std::memory_order_relaxed);
  if (codes == nullptr) {
    if (!linker->Begin(&graph_, LinkTarget(), node)) return false;
  } else {
    if (!EncodeNode(codes, node)) return false;
    Numbers numbers;
    code_format_->Decode(codes_->Row(node), numbers.data());
    codes->format().EncodeQuery(numbers.data(), linker->walk_query());
    const SearchTarget walk = codes->TargetFor(&graph_, linker->walk_query());
    if (!linker->Begin(&graph_, LinkTarget(), node, &walk)) return false;
  }
  nodes_[node].state = NodeState::kLinking;
  return true;
}

bool Space::BeginLinking(BatchLinker* linker, std::span<const NodeId> nodes) {
  CHECK(retired_codes_ == nullptr, "no reader walks by codes that the nodes do not get");
  WalkCodes* const codes = walk_codes_.load(std::memory_order_relaxed);
  const NodeId last = *std::max_element(nodes.begin(), nodes.end());
  if (!codes->rows().Reserve(size_t{last} + 1)) return false;
  const BatchTarget target{.graph = &graph_,
                           .vectors = TargetFor(nullptr),
                           .format = &*code_format_,
                           .codes = codes,
                           .lists = &*lists_};
  for (const NodeId node : nodes) NoteLinking(node);
  if (!linker->Begin(target, nodes)) return false;
  for (const NodeId node : nodes) {
    CHECK(nodes_[node].state == NodeState::kUnlinked, "only a new node is linked");
    nodes_[node].state = NodeState::kLinking;
  }
  return true;
}

void Space::FinishLinking(const BatchLinker& linker) {
  for (const NodeId node : linker.nodes()) EndLinking(node);
}

// Where there are lists it is listed, as far as there is memory, for those that are linked after
// it.
void Space::FinishLinking(NodeId node) {
  EndLinking(node);
  const WalkCodes* const codes = walk_codes();
  if (codes == nullptr) return;
  ListNodes(*codes, {&node, 1});
  lists_->SplitOne();
}

void Space::EndLinking(NodeId node) {
  CHECK(fresh_.first() == node, "nodes are linked in the order in which they came");
  fresh_.PopFirst();
  ++taken_first_;
  if (nodes_[node].state == NodeState::kRetiredLinking) {
    ListRetired(node);
    return;
  }
  CHECK(nodes_[node].state == NodeState::kLinking, "the node was being linked");
  nodes_[node].state = NodeState::kLinked;
  --unlinked_;
}

}  // namespace engram
