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
// 6. Release: where the data are not fit for codes the lists go.
// It begins once there is a graph, and again each time when the space has taken in some times as
// many nodes as lived then, or sooner, where what is linked shows that codes do not tell it apart
// (EstimateAgreement). Linking waits for it: what is not linked is found by the scan.

#include <algorithm>
#include <array>
#include <new>
#include <utility>

#include "index/space.h"
#include "src/core/check.h"
#include "src/core/hash.h"

namespace engram {

namespace {

// A new centroid that saves less of the residuals is not worth encoding everything again.
constexpr double kWorthwhileDrift = 0.05;
// But for codes that are doubted: a cloud that is far nearer to the new centroid saves little of
// all residuals, and much of its own.
constexpr double kWorthwhileInDoubt = 0.01;
constexpr uint32_t kWorkOfDrift = 32;
constexpr uint32_t kWorkOfLearning = 2'000;
constexpr uint32_t kWorkOfEncoding = 128;
constexpr uint32_t kWorkOfListing = 64;
constexpr uint32_t kMembersReleasedPerDistance = 8;
constexpr uint64_t kWorkOfGathering = uint64_t{InvertedLists::kMostAtOnce} * kWorkOfEncoding;

using Numbers = std::array<float, kMaxDimension>;

}  // namespace

bool Space::WantsCodes() const {
  if (options_.traversal != Traversal::kRabitq || !has_graph_) return false;
  if (codes_step_ != CodesStep::kNone && codes_step_ != CodesStep::kLearned) return true;
  return learn_when_.IsTime(nodes_taken_) && retired_codes_ == nullptr;
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
    case CodesStep::kReleasing:
      ReleaseSome(max_distances);
      break;
  }
}

// A sample of what lives: most of it spread over all places, the rest the members of some lists,
// which shows whether near ones can be told from each other: of any lists, or where codes are
// doubted.
void Space::BeginLearning(CodeLearning* learning) {
  const auto is_live = [this](NodeId node) { return IsLive(node); };
  learning->TakeSpread(node_count(), lists_ ? CodeLearning::kMostSpread : RabitqLearner::kMaxSample,
                       is_live);
  if (lists_ && learn_when_.is_doubted()) {
    for (const NodeId node : agreement_.disagreed()) {
      if (lists_->Has(node)) learning->TakeNear(*lists_, lists_->HomeOf(node), is_live);
    }
  } else if (lists_) {
    const auto most = static_cast<uint32_t>(learning->taken.size());
    for (uint32_t i = 0; i < std::min(lists_->count(), most); ++i) {
      const auto list = static_cast<uint32_t>(MixBits(nodes_taken_ + i) % lists_->count());
      learning->TakeNear(*lists_, list, is_live);
    }
  }
  learn_when_.Begin(nodes_taken_, live_, options_.graph_from);
  agreement_.Clear();
  const WalkCodes* const codes = walk_codes();
  if (learning->spread_size == 0) {
    learn_when_.End(nodes_taken_, live_, false);
    return;
  }
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
      learning->has_moved = learning->drift.SavedShare() >=
                            (learn_when_.is_doubted() ? kWorthwhileInDoubt : kWorthwhileDrift);
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
  // A look without a doubt need not be as sharp, and each one asked for costs as much.
  const size_t near =
      learn_when_.is_doubted() ? RabitqLearner::kQueries : RabitqLearner::kQueries / 4;
  RabitqSample sample{.format = &*code_format_,
                      .count = learning->sample_size,
                      .row = code_row,
                      .context = this,
                      .mean_count = learning->spread_size,
                      .near = learning->ChooseNear(near)};
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
  // The int8 rows are what codes are made of, and what candidates are compared by.
  const bool is_good = is_done && learner.IsGood() && learner.IsCoarseGood();
  if (is_done) walks_exact_.store(!learner.IsCoarseGood(), std::memory_order_release);
  RabitqFormat* const format = is_good && learning->has_moved ? learner.TakeFormat() : nullptr;
  const double residual = learner.mean_squared_residual();
  learner.Stop();
  learning_ = nullptr;
  if (!is_done) {
    GiveUpCodes();
  } else if (!is_good) {
    learn_when_.End(nodes_taken_, live_, true);
    WithdrawCodes();
  } else if (format != nullptr) {
    BeginEncoding(format, residual);
  } else {
    learn_when_.End(nodes_taken_, live_, false);
    codes_step_ = CodesStep::kLearned;
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
  if (!lists_) {
    lists_.emplace(heap_, &*code_format_, &*codes_, format);
    // All of equal ones: what is not there is found nowhere.
    waiting_.emplace(heap_, &*code_format_, &*codes_, format, UINT32_MAX);
  }
  next_encoded_ = 0;
  codes_step_ = CodesStep::kEncoding;
}

// The data are not, or no longer, fit for codes.
void Space::WithdrawCodes() {
  retired_codes_ = walk_codes_.exchange(nullptr, std::memory_order_acq_rel);
  if (retired_codes_ != nullptr) retired_codes_epoch_ = epochs_->Close();
  waiting_count_ = 0;
  codes_step_ = lists_ ? CodesStep::kReleasing : CodesStep::kNone;
}

// Memory is short: what there is stays in use.
void Space::GiveUpCodes() {
  learn_when_.Fail(nodes_taken_, live_);
  DropCodes(std::exchange(next_codes_, nullptr));
  if (walk_codes() != nullptr) {
    codes_step_ = CodesStep::kLearned;
  } else {
    codes_step_ = lists_ ? CodesStep::kReleasing : CodesStep::kNone;
  }
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
      if (!graph_.IsLinked(node) && !graph_.IsDoomed(node) && !waiting_->Has(node)) continue;
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
  std::array<InvertedLists::Row, InvertedLists::kMostAtOnce> rows;
  std::array<InvertedLists::Choice, InvertedLists::kMostAtOnce> choices;
  for (size_t i = 0; i < nodes.size(); ++i) {
    Numbers numbers;
    code_format_->Decode(codes_->Row(nodes[i]), numbers.data());
    const bool is_far = codes.IsFar(numbers.data());
    rows[i] = {codes_->Row(nodes[i]), is_far ? nullptr : codes.rows().Row(nodes[i])};
  }
  lists_->Choose(block_products_, std::span(rows).first(nodes.size()), 0, choices.data());
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (!lists_->Add(choices[i].home, nodes[i], codes.rows().Row(nodes[i]))) return false;
  }
  return true;
}

// 4.
void Space::PublishCodes(WalkCodes* codes) {
  CHECK(retired_codes_ == nullptr, "earlier codes have gone before others are learned");
  learn_when_.End(nodes_taken_, live_, true);
  retired_codes_ = walk_codes_.exchange(codes, std::memory_order_acq_rel);
  if (retired_codes_ == nullptr) {
    codes_step_ = CodesStep::kLearned;
    return;
  }
  retired_codes_epoch_ = epochs_->Close();
  lists_->Use(&codes->format());
  waiting_->Use(&codes->format());
  next_recoded_ = 0;
  codes_step_ = CodesStep::kRecoding;
}

void Space::ReclaimCodes() {
  if (retired_codes_ == nullptr || codes_step_ == CodesStep::kRecoding) return;
  if (!epochs_->Passed(retired_codes_epoch_)) return;
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
  const uint32_t linked = lists_->count();
  const uint32_t all = linked + waiting_->count();
  for (uint32_t work = 0; work < max_distances && next_recoded_ < all; ++next_recoded_) {
    const bool is_linked = next_recoded_ < linked;
    InvertedLists& lists = is_linked ? *lists_ : *waiting_;
    const uint32_t list = is_linked ? next_recoded_ : next_recoded_ - linked;
    lists.Recode(list, [&codes](NodeId node) { return codes.rows().Row(node); });
    work += lists.size(list) + 1;
  }
  if (next_recoded_ >= all) codes_step_ = CodesStep::kLearned;
}

// 6.
void Space::ReleaseSome(uint32_t max_distances) {
  const uint64_t members = uint64_t{max_distances} * kMembersReleasedPerDistance;
  const auto most = static_cast<uint32_t>(std::min<uint64_t>(members, UINT32_MAX));
  if (!waiting_->ReleaseSome(most) || !lists_->ReleaseSome(most)) return;
  waiting_.reset();
  lists_.reset();
  codes_step_ = CodesStep::kNone;
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
                           .lists = &*lists_,
                           .agreement = &agreement_};
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
  if (agreement_.IsDoubtful()) learn_when_.Doubt(nodes_taken_);
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
  PopFresh();
  if (nodes_[node].state == NodeState::kRetiredLinking) {
    ListRetired(node);
    return;
  }
  CHECK(nodes_[node].state == NodeState::kLinking, "the node was being linked");
  nodes_[node].state = NodeState::kLinked;
  --unlinked_;
}

}  // namespace engram
