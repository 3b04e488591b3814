#include "index/inverted_lists.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "index/distance.h"
#include "src/core/check.h"
#include "src/core/hash.h"

namespace engram {

namespace {

constexpr uint32_t kFirstCapacity = 64;
// So much more than was asked for may be chosen, to find the bound in few passes.
constexpr float kScanTolerance = 1.15F;
constexpr float kHomeTolerance = 2;
// Where more lists are near enough than there is room for.
constexpr float kEnough = 0.875F;
// Of many lists so many times those that are needed are chosen by signs.
constexpr float kPreselected = 2.5F;
constexpr float kLeastPreselected = 24;
constexpr size_t kMostPreselected = 2 * InvertedLists::kMostChosen;
constexpr float kEnoughPreselected = kEnough * kMostPreselected;

Int8Trailer TrailerOf(const std::byte* row, size_t padded_dimension) {
  Int8Trailer trailer;
  std::memcpy(&trailer, row + padded_dimension, sizeof(trailer));
  return trailer;
}

using Numbers = std::array<float, kMaxDimension>;

// The places of the nearest that together have about `members` members. `scores` of those that have
// none are infinite.
uint32_t TakeNearest(const float* scores, const float* sizes, size_t count, float members,
                     uint32_t* places, size_t most = InvertedLists::kMostChosen) {
  float bound = BoundOfNearest(scores, sizes, count, members, members * kScanTolerance);
  size_t found = PlacesNearer(scores, count, bound, most, places);
  if (found == most) {  // Maybe more than there is room for: the nearest, then.
    const auto room = static_cast<float>(most);
    bound = std::min(bound, BoundOfNearest(scores, nullptr, count, kEnough * room, room));
    found = PlacesNearer(scores, count, bound, most, places);
  }
  uint32_t taken = 0;
  for (size_t i = 0; i < found; ++i) {
    if (sizes[places[i]] > 0) places[taken++] = places[i];
  }
  return taken;
}

}  // namespace

InvertedLists::InvertedLists(ArenaHeap* heap, const VectorFormat* format,
                             const VectorStore* vectors, const RabitqFormat* coding,
                             uint32_t most_copies, uint32_t many)
    : heap_(heap),
      format_(format),
      vectors_(vectors),
      l2_(DistanceFunction(Precision::kInt8, Metric::kL2)),
      distances_(Int8DistancesFunction(format->metric())),
      most_copies_(most_copies),
      many_(many),
      coding_(coding),
      codes_(*coding),
      lists_(heap),
      groups_(heap),
      home_of_(heap) {
  CHECK(format->precision() == Precision::kInt8, "lists compare int8 rows");
}

void InvertedLists::Release() {
  for (uint32_t list = 0; list < count_; ++list) {
    while (lists_[list].first != nullptr) DropLast(&lists_[list]);
  }
  for (uint32_t group = 0; group * kGroupLists < count_; ++group) {
    heap_->Free(reinterpret_cast<std::byte*>(groups_[group]), GroupBytes());
  }
  FreeScores();
  count_ = 0;
}

bool InvertedLists::ReleaseSome(uint32_t most_members) {
  uint32_t released = 0;
  for (uint32_t list = count_; list-- > 0 && released < most_members;) released += Empty(list);
  return members_ == 0;
}

// Returns how many members it had.
uint32_t InvertedLists::Empty(uint32_t list) {
  List& emptied = lists_[list];
  const uint32_t members = emptied.size;
  if (members == 0) return 0;
  ForEachBlock(list, [this](const Block& block) {
    for (const NodeId node : block.nodes) home_of_[node] = kNoList;
  });
  while (emptied.first != nullptr) DropLast(&emptied);
  emptied.size = 0;
  sizes_[list] = 0;
  members_ -= members;
  ++empty_;
  return members;
}

bool InvertedLists::Reserve(size_t nodes) {
  if (!home_of_.Reserve(nodes)) return false;
  return count_ > 0 || AddList();
}

// Room for the sizes and scores of twice as many lists.
bool InvertedLists::GrowScores() {
  const uint32_t capacity = list_capacity_ == 0 ? kFirstCapacity : 2 * list_capacity_;
  const size_t stride = capacity + kSelectionSlack;
  auto* sizes = heap_->AllocateArray<float>(stride);
  auto* scores = heap_->AllocateArray<float>(kMostAtOnce * stride);
  if (sizes == nullptr || scores == nullptr) {
    if (sizes != nullptr) heap_->FreeArray(sizes, stride);
    if (scores != nullptr) heap_->FreeArray(scores, kMostAtOnce * stride);
    return false;
  }
  std::fill_n(sizes, stride, 0.0F);
  std::fill_n(scores, kMostAtOnce * stride, 0.0F);
  if (sizes_ != nullptr) std::copy_n(sizes_, count_, sizes);
  FreeScores();
  bytes_ += ScoreBytes(stride);
  sizes_ = sizes;
  scores_ = scores;
  list_capacity_ = capacity;
  return true;
}

void InvertedLists::FreeScores() {
  if (sizes_ == nullptr) return;
  heap_->FreeArray(sizes_, ScoreStride());
  heap_->FreeArray(scores_, kMostAtOnce * ScoreStride());
  bytes_ -= ScoreBytes(ScoreStride());
}

// An empty one, without a centroid.
bool InvertedLists::AddList() {
  if (count_ == list_capacity_ && !GrowScores()) return false;
  if (!lists_.Reserve(size_t{count_} + 1)) return false;
  const uint32_t group = count_ / kGroupLists;
  if (count_ % kGroupLists == 0) {
    if (!groups_.Reserve(size_t{group} + 1)) return false;
    std::byte* block = heap_->Allocate(GroupBytes());
    if (block == nullptr) return false;
    std::memset(block, 0, GroupBytes());
    bytes_ += ArenaHeap::BlockBytes(GroupBytes());
    groups_[group] = reinterpret_cast<Group*>(block);
  }
  lists_[count_] = List{};
  sizes_[count_] = 0;
  ++count_;
  ++empty_;
  return true;
}

// `instead`: an int8 row that is taken where the mean has no direction.
void InvertedLists::SetCentroid(uint32_t list, const float* mean, const std::byte* instead) {
  Numbers numbers;
  std::copy_n(mean, format_->dimension(), numbers.data());
  std::byte* const row = Centroid(list);
  const bool has_direction = format_->metric() != Metric::kCosine ||
                             NormaliseInPlace(numbers.data(), format_->dimension());
  if (has_direction) {
    format_->Encode(numbers.data(), row);
  } else {
    std::memcpy(row, instead, format_->row_bytes());
  }
  const Int8Trailer trailer = TrailerOf(row, format_->padded_dimension());
  if (unit_ == 0) unit_ = trailer.scale;
  Group* group = groups_[list / kGroupLists];
  const uint32_t place = list % kGroupLists;
  const double unit = unit_ == 0 ? 1 : unit_;
  group->norms[place] = static_cast<float>(trailer.squared_norm() / unit / unit);
  group->by_product[place] = static_cast<float>(-trailer.scale / unit);
  group->by_distance[place] = static_cast<float>(-2 * trailer.scale / unit);
}

void InvertedLists::EncodeCentroid(uint32_t list, std::byte* code) const {
  Numbers numbers;
  format_->Decode(Centroid(list), numbers.data());
  coding_->Encode(numbers.data(), code);
}

void InvertedLists::CodeCentroid(uint32_t list) {
  alignas(kCacheLineBytes) std::array<std::byte, kMostCodeBytes> code;
  EncodeCentroid(list, code.data());
  codes_.Set(CentroidCodes(list / kGroupLists), list % kGroupLists, code.data());
}

void InvertedLists::Use(const RabitqFormat* coding) {
  CHECK(coding->bits() == coding_->bits(), "codes of the space that it has");
  coding_ = coding;
  codes_ = SignBlocks(*coding);
}

// ---------------------------------------------------------------------------------------------
// Members

void InvertedLists::SetCode(Stored* block, uint32_t place, const std::byte* code) {
  codes_.Set(CodesOf(block), place, code, block->places);
  block->hashes()[place] = HashOf(code);
}

void InvertedLists::CopyCode(const Stored* from, uint32_t from_place, Stored* to,
                             uint32_t to_place) {
  codes_.Copy(CodesOf(from), from_place, CodesOf(to), to_place, from->places, to->places);
  to->hashes()[to_place] = from->hashes()[from_place];
}

// Different codes have the same one rarely enough.
uint32_t InvertedLists::HashOf(const std::byte* code) const {
  uint64_t hash = 0;
  for (size_t at = 0; at < coding_->row_bytes(); at += sizeof(uint64_t)) {
    uint64_t word;
    std::memcpy(&word, code + at, sizeof(word));
    hash = MixBits(hash ^ word);
  }
  return static_cast<uint32_t>(hash);
}

uint32_t InvertedLists::CopiesOf(const List& list, uint32_t hash) const {
  uint32_t copies = 0;
  uint32_t left = list.size;
  for (const Stored* block = list.first; left > 0; block = block->next) {
    const uint32_t here = std::min(left, kBlockMembers);
    for (uint32_t i = 0; i < here; ++i) copies += static_cast<uint32_t>(block->hashes()[i] == hash);
    left -= here;
  }
  return copies;
}

InvertedLists::Stored* InvertedLists::AllocateBlock(uint32_t places) {
  std::byte* bytes = heap_->Allocate(StoredBytes(places));
  if (bytes == nullptr) return nullptr;
  bytes_ += ArenaHeap::BlockBytes(StoredBytes(places));
  auto* block = reinterpret_cast<Stored*>(bytes);
  *block = {.next = nullptr, .places = places};
  std::fill_n(block->nodes(), places, kNoNode);
  return block;
}

void InvertedLists::FreeBlock(Stored* block) {
  const size_t bytes = StoredBytes(block->places);
  bytes_ -= ArenaHeap::BlockBytes(bytes);
  heap_->Free(reinterpret_cast<std::byte*>(block), bytes);
}

// For one member more, behind the last one. A block begins with a quarter of its places and doubles
// twice, so that what many short lists leave empty is little. False when the heap is spent.
bool InvertedLists::MakeRoom(List* list) {
  const uint32_t place = list->size % kBlockMembers;
  if (place > 0) return place < list->last->places || ResizeLast(list, 2 * list->last->places);
  Stored* block = AllocateBlock(kFewestPlaces);
  if (block == nullptr) return false;
  (list->first == nullptr ? list->first : list->last->next) = block;
  list->last = block;
  return true;
}

// The last block, which is not empty, gets so many places. False when the heap is spent.
bool InvertedLists::ResizeLast(List* list, uint32_t places) {
  Stored* block = AllocateBlock(places);
  if (block == nullptr) return false;
  const Stored* old = list->last;
  const uint32_t members = (list->size - 1) % kBlockMembers + 1;
  std::copy_n(old->nodes(), members, block->nodes());
  std::copy_n(old->hashes(), members, block->hashes());
  codes_.CopyFirst(members, CodesOf(old), old->places, CodesOf(block), places);
  DropLast(list);
  (list->first == nullptr ? list->first : list->last->next) = block;
  list->last = block;
  return true;
}

void InvertedLists::DropLast(List* list) {
  Stored* before = nullptr;
  for (Stored* block = list->first; block != list->last; block = block->next) before = block;
  FreeBlock(list->last);
  list->last = before;
  (before == nullptr ? list->first : before->next) = nullptr;
}

// The last member has gone, or to another place. A block that is three quarters empty is halved, so
// that it takes as many again to double it.
void InvertedLists::LeaveLastPlace(List* list) {
  const uint32_t left = --list->size % kBlockMembers;
  Stored* const last = list->last;
  last->nodes()[left] = kNoNode;
  if (left == 0) {
    DropLast(list);
  } else if (left <= last->places / 4 && last->places > kFewestPlaces) {
    (void)ResizeLast(list, last->places / 2);  // Without memory for it it stays as long.
  }
}

bool InvertedLists::Add(uint32_t list, NodeId node, const std::byte* code) {
  CHECK(!Has(node), "a node is in one list");
  List& to = lists_[list];
  if (most_copies_ < UINT32_MAX && CopiesOf(to, HashOf(code)) >= most_copies_) return true;
  const uint32_t place = to.size % kBlockMembers;
  if (!MakeRoom(&to)) return false;
  to.last->nodes()[place] = node;
  SetCode(to.last, place, code);
  if (to.size == 0) --empty_;
  ++to.size;
  ++members_;
  sizes_[list] = static_cast<float>(to.size);
  home_of_[node] = list + 1;
  return true;
}

// The last member takes its place.
void InvertedLists::Remove(NodeId node) {
  if (!Has(node)) return;
  const uint32_t list = home_of_[node] - 1;
  List& from = lists_[list];
  Stored* block = from.first;
  uint32_t place = 0;
  for (;; block = block->next) {
    CHECK(block != nullptr, "a node is in the list that is its home");
    const NodeId* const end = block->nodes() + block->places;
    const NodeId* const found = std::find(block->nodes(), block->nodes() + block->places, node);
    if (found == end) continue;
    place = static_cast<uint32_t>(found - block->nodes());
    break;
  }
  const uint32_t last_place = (from.size - 1) % kBlockMembers;
  block->nodes()[place] = from.last->nodes()[last_place];
  CopyCode(from.last, last_place, block, place);
  LeaveLastPlace(&from);
  --members_;
  if (from.size == 0) ++empty_;
  sizes_[list] = static_cast<float>(from.size);
  home_of_[node] = kNoList;
}

NodeId InvertedLists::MemberAt(uint32_t list, uint32_t place) const {
  const Stored* block = lists_[list].first;
  for (; place >= kBlockMembers; place -= kBlockMembers) block = block->next;
  return block->nodes()[place];
}

// ---------------------------------------------------------------------------------------------
// Choosing

void InvertedLists::Choose(const BlockProducts& products, std::span<const Row> rows, float members,
                           Choice* choices) {
  CHECK(rows.size() <= kMostAtOnce && count_ > 0, "up to 16 rows, and there is a list");
  if (!has_centroids()) BeginWith(rows);
  // Where the nearest by the metric are not the nearest by L2, signs would have to look twice.
  if (count_ < many_ || format_->metric() == Metric::kInnerProduct) {
    ChooseByProducts(products, rows, members, choices);
    return;
  }
  std::array<SignBlocks::Query, kMostAtOnce> queries;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].code != nullptr) queries[i] = codes_.QueryOf(rows[i].code);
  }
  // A group meets all rows while it is in the first-level cache.
  for (uint32_t first = 0; first < count_; first += kGroupLists) {
    for (size_t i = 0; i < rows.size(); ++i) {
      if (rows[i].code != nullptr) EstimateGroup(queries[i], first, scores_ + i * ScoreStride());
    }
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    float* const estimates = scores_ + i * ScoreStride();
    if (rows[i].code != nullptr && ChooseEstimated(rows[i], members, estimates, &choices[i])) {
      continue;
    }
    ChooseByProducts(products, rows.subspan(i, 1), members, &choices[i]);
  }
}

// The scores of the group of lists that begins with `first`, by signs.
void InvertedLists::EstimateGroup(const SignBlocks::Query& query, uint32_t first,
                                  float* scores) const {
  codes_.Estimate(CentroidCodes(first / kGroupLists), std::min(count_ - first, kGroupLists), query,
                  scores + first);
}

void InvertedLists::LeaveOutEmpty(float* scores) const {
  if (empty_ == 0) return;
  for (uint32_t list = 0; list < count_; ++list) {
    if (lists_[list].size == 0) scores[list] = HUGE_VALF;
  }
}

// Those that signs say are nearest, several times as many as are needed, are compared by int8. For
// vectors of norm 1 the order by the metric is the one by L2. False where there are none.
bool InvertedLists::ChooseEstimated(const Row& row, float members, float* estimates,
                                    Choice* choice) {
  if (members_ == 0) return false;
  LeaveOutEmpty(estimates);
  const float needed = members * static_cast<float>(count_ - empty_) / static_cast<float>(members_);
  const float least = std::clamp(kPreselected * needed, kLeastPreselected, kEnoughPreselected);
  std::array<uint32_t, kMostPreselected + kSelectionSlack> near;
  // Where only the home is looked for, some more cost less than to find a narrow bound.
  const float most = least * (members > 0 ? kScanTolerance : kHomeTolerance);
  const float bound = BoundOfNearest(estimates, nullptr, count_, least, most);
  const size_t count = PlacesNearer(estimates, count_, bound, kMostPreselected, near.data());
  if (count == 0) return false;
  std::array<const std::byte*, kMostPreselected> centroids;
  std::array<float, kMostPreselected + kSelectionSlack> scores{};
  std::array<float, kMostPreselected + kSelectionSlack> sizes{};
  for (size_t i = 0; i < count; ++i) {
    centroids[i] = Centroid(near[i]);
    sizes[i] = sizes_[near[i]];
  }
  distances_(row.vector, centroids.data(), count, format_->padded_dimension(), scores.data());
  choice->home = near[std::min_element(scores.begin(), scores.begin() + count) - scores.begin()];
  choice->count = TakeNearest(scores.data(), sizes.data(), count, members, choice->lists.data());
  for (uint32_t i = 0; i < choice->count; ++i) choice->lists[i] = near[choice->lists[i]];
  return true;
}

size_t InvertedLists::ChooseMany(const BlockProducts& products, const Row& row, float members,
                                 std::span<uint32_t> lists) const {
  CHECK(count_ > 0 && lists.size() > kSelectionSlack, "there is a list, and room for some");
  if (members_ == 0) return 0;
  if (row.code != nullptr) {
    const SignBlocks::Query query = codes_.QueryOf(row.code);
    for (uint32_t first = 0; first < count_; first += kGroupLists) {
      EstimateGroup(query, first, scores_);
    }
  } else {
    Choice unused;
    ScoreByProducts(products, {&row, 1}, &unused);
  }
  LeaveOutEmpty(scores_);
  return TakeNearest(scores_, sizes_, count_, members, lists.data(),
                     lists.size() - kSelectionSlack);
}

// A list's score is its centroid's distance but for what is the same for all lists: by L2 for the
// home, so that lists are compact, and by the metric for where to look.
void InvertedLists::ScoreByProducts(const BlockProducts& products, std::span<const Row> rows,
                                    Choice* choices) const {
  const size_t padded = format_->padded_dimension();
  alignas(kCacheLineBytes)
      std::array<std::byte, BlockProducts::PackedBytes(kMostAtOnce, kMaxDimension)>
          packed;
  std::array<const std::byte*, kMostAtOnce> vectors{};
  for (size_t i = 0; i < rows.size(); ++i) vectors[i] = rows[i].vector;
  products.PackQueries(vectors.data(), rows.size(), padded, packed.data());
  std::array<float, kMostAtOnce> scales;
  std::array<float, kMostAtOnce> nearest;
  nearest.fill(HUGE_VALF);
  for (size_t i = 0; i < rows.size(); ++i) {
    scales[i] = static_cast<float>(TrailerOf(vectors[i], padded).scale / (unit_ == 0 ? 1 : unit_));
    choices[i].home = 0;
  }
  std::array<int32_t, kMostAtOnce * kGroupLists + kSelectionSlack> out;
  std::array<float, kGroupLists + kSelectionSlack> by_distance;
  for (uint32_t first = 0; first < count_; first += kGroupLists) {
    const Group& group = *groups_[first / kGroupLists];
    const size_t lists = std::min(count_ - first, kGroupLists);
    products.Products(Centroid(first), CentroidStride(), lists, packed.data(), rows.size(), padded,
                      out.data(), kGroupLists);
    for (size_t i = 0; i < rows.size(); ++i) {
      const int32_t* const of_row = out.data() + i * kGroupLists;
      float* scores = scores_ + i * ScoreStride() + first;
      size_t place = 0;
      if (format_->metric() == Metric::kL2) {
        place = ScaleProducts(of_row, group.norms.data(), group.by_distance.data(), scales[i],
                              lists, scores);
      } else {
        place = ScaleProducts(of_row, group.zeros.data(), group.by_product.data(), scales[i], lists,
                              scores);
      }
      if (format_->metric() == Metric::kInnerProduct) {
        scores = by_distance.data();
        place = ScaleProducts(of_row, group.norms.data(), group.by_distance.data(), scales[i],
                              lists, scores);
      }
      if (scores[place] < nearest[i]) {
        nearest[i] = scores[place];
        choices[i].home = first + static_cast<uint32_t>(place);
      }
    }
  }
}

void InvertedLists::ChooseByProducts(const BlockProducts& products, std::span<const Row> rows,
                                     float members, Choice* choices) {
  ScoreByProducts(products, rows, choices);
  for (size_t i = 0; i < rows.size(); ++i) {
    float* const scores = scores_ + i * ScoreStride();
    LeaveOutEmpty(scores);
    choices[i].count = TakeNearest(scores, sizes_, count_, members, choices[i].lists.data());
  }
}

// The first list's centroid is the first row that has a direction.
void InvertedLists::BeginWith(std::span<const Row> rows) {
  for (const Row& row : rows) {
    if (TrailerOf(row.vector, format_->padded_dimension()).scale == 0) continue;
    Numbers numbers;
    format_->Decode(row.vector, numbers.data());
    SetCentroid(0, numbers.data(), row.vector);
    CodeCentroid(0);
    return;
  }
}

// ---------------------------------------------------------------------------------------------
// Checking

Result<void> InvertedLists::CheckInvariants() const {
  const auto unsound = [](const std::string& what, uint64_t number) {
    return Fail(ErrorCode::kCorrupt,
                "inverted lists: " + what + " (" + std::to_string(number) + ")");
  };
  size_t members = 0;
  uint32_t empty = 0;
  for (uint32_t list = 0; list < count_; ++list) {
    uint32_t listed = 0;
    bool sound = true;
    ForEachBlock(list, [&](const Block& block) {
      const bool is_last = block.next.block == nullptr;
      sound = sound && block.nodes.size() <= block.codes.places &&
              (is_last || block.nodes.size() == kBlockMembers);
      for (const NodeId node : block.nodes) {
        ++listed;
        sound = sound && node < home_of_.capacity() && home_of_[node] == list + 1;
      }
    });
    if (!sound) return unsound("a member or a block is elsewhere than it should, list", list);
    if (listed != lists_[list].size) return unsound("miscounted members, list", list);
    if (sizes_[list] != static_cast<float>(listed)) return unsound("wrong size, list", list);
    members += listed;
    empty += static_cast<uint32_t>(listed == 0);
  }
  if (members != members_) return unsound("miscounted members", members);
  if (empty != empty_) return unsound("miscounted empty lists", empty);
  size_t at_home = 0;
  for (size_t node = 0; node < home_of_.capacity(); ++node) {
    at_home += static_cast<size_t>(home_of_[node] != kNoList);
  }
  if (at_home != members) return unsound("nodes at home in lists that lack them", at_home);
  return {};
}

}  // namespace engram
