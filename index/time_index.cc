#include "index/time_index.h"

#include <cstring>
#include <string>

#include "src/core/check.h"

namespace engram {

TimeIndex::~TimeIndex() {
  for (size_t page = 0; page < page_count_; ++page) {
    for (uint32_t block = 0; block < pages_[page]->count; ++block) {
      const Block& freed = pages_[page]->blocks()[block];
      heap_->FreeArray(freed.nodes, freed.capacity);
    }
    heap_->Free(reinterpret_cast<std::byte*>(pages_[page]), PageBytes(pages_[page]->capacity));
  }
  if (pages_ != nullptr) heap_->FreeArray(pages_, page_capacity_);
}

std::unexpected<Error> TimeIndex::Unsound(const char* what) {
  return Fail(ErrorCode::kCorrupt, "index by time: " + std::string(what));
}

std::byte* TimeIndex::Take(size_t bytes) {
  std::byte* const block = heap_->Allocate(bytes);
  if (block != nullptr) bytes_ += ArenaHeap::BlockBytes(bytes);
  return block;
}

void TimeIndex::GiveBack(void* block, size_t bytes) {
  heap_->Free(static_cast<std::byte*>(block), bytes);
  bytes_ -= ArenaHeap::BlockBytes(bytes);
}

// The last block whose key is not behind `key`; the first one where there is none. {} without
// blocks.
TimeIndex::Place TimeIndex::Locate(Key key) const {
  if (page_count_ == 0) return {};
  Page** const page =
      std::upper_bound(pages_, pages_ + page_count_, key,
                       [](const Key& k, const Page* p) { return k < p->blocks()[0].key(); });
  const size_t at = page == pages_ ? 0 : static_cast<size_t>(page - pages_) - 1;
  const Block* const blocks = pages_[at]->blocks();
  const Block* const block =
      std::upper_bound(blocks, blocks + pages_[at]->count, key,
                       [](const Key& k, const Block& b) { return k < b.key(); });
  return {at, block == blocks ? 0 : static_cast<uint32_t>(block - blocks) - 1};
}

TimeIndex::Key TimeIndex::KeyBehind(Place place) const {
  if (place.block + 1 < pages_[place.page]->count) {
    return KeyAt({place.page, place.block + 1});
  }
  return place.page + 1 < page_count_ ? KeyAt({place.page + 1, 0}) : kBehindAll;
}

// Where its block has room, or none is there.
bool TimeIndex::Insert(Key key) {
  Place place;
  if (size_ == 0) {
    if (!MakeRoomForBlock(&place) || !InsertBlock(place, key, kLeastNodes)) return false;
  } else {
    place = Locate(key);
  }
  Block& block = At(place);
  if (!Append(&block, key.second)) return false;
  if (key < block.key()) std::tie(block.when_ns, block.node) = key;
  ++pages_[place.page]->nodes;
  ++size_;
  return true;
}

// A block that begins with `key`, where that is behind all of the full one's `keys`, or the full
// one in two halves. False when the heap is spent.
bool TimeIndex::MakeRoom(Place full, Key key, std::array<Key, kBlockNodes>* keys) {
  constexpr uint32_t kHalf = kBlockNodes / 2;
  Place upper{full.page, full.block + 1};
  if (!MakeRoomForBlock(&upper)) return false;
  if (key > *std::ranges::max_element(*keys)) return InsertBlock(upper, key, kLeastNodes);
  std::ranges::nth_element(*keys, keys->begin() + kHalf);
  if (!InsertBlock(upper, (*keys)[kHalf], kBlockNodes)) return false;
  // The lower one may have moved to the page before.
  const Place lower = upper.block > 0 ? Place{upper.page, upper.block - 1}
                                      : Place{upper.page - 1, pages_[upper.page - 1]->count - 1};
  for (uint32_t i = 0; i < kHalf; ++i) {
    At(lower).nodes[i] = (*keys)[i].second;
    At(upper).nodes[i] = (*keys)[kHalf + i].second;
  }
  At(lower).count = At(upper).count = kHalf;
  pages_[lower.page]->nodes -= kHalf;
  pages_[upper.page]->nodes += kHalf;
  return true;
}

// So that a block can be inserted at *place, which may become one in another page. False when the
// heap is spent; the blocks are as they were then.
bool TimeIndex::MakeRoomForBlock(Place* place) {
  if (page_count_ == 0) return AddPage(0);
  Page* page = pages_[place->page];
  if (page->count < page->capacity) return true;
  if (page->capacity < kPageBlocks) return Enlarge(&pages_[place->page]);
  const bool is_end = place->page + 1 == page_count_ && place->block == page->count;
  if (!AddPage(place->page + 1)) return false;
  Page** const next = &pages_[place->page + 1];
  if (is_end) {
    *place = {place->page + 1, 0};
    return true;
  }
  // The upper half moves.
  while ((*next)->capacity < kPageBlocks) {
    if (Enlarge(next)) continue;
    GiveBack(*next, PageBytes((*next)->capacity));
    std::copy(next + 1, pages_ + page_count_, next);
    --page_count_;
    return false;
  }
  constexpr uint32_t kHalf = kPageBlocks / 2;
  std::copy(page->blocks() + kHalf, page->blocks() + kPageBlocks, (*next)->blocks());
  page->count = (*next)->count = kHalf;
  for (uint32_t i = 0; i < kHalf; ++i) (*next)->nodes += (*next)->blocks()[i].count;
  page->nodes -= (*next)->nodes;
  if (place->block > kHalf) *place = {place->page + 1, place->block - kHalf};
  return true;
}

// An empty one.
bool TimeIndex::AddPage(size_t at) {
  if (page_count_ == page_capacity_) {
    const size_t capacity = std::max<size_t>(page_capacity_ * 2, 4);
    auto** const pages = reinterpret_cast<Page**>(Take(capacity * sizeof(Page*)));
    if (pages == nullptr) return false;
    std::copy(pages_, pages_ + page_count_, pages);
    if (pages_ != nullptr) GiveBack(pages_, page_capacity_ * sizeof(Page*));
    pages_ = pages;
    page_capacity_ = capacity;
  }
  auto* const page = reinterpret_cast<Page*>(Take(PageBytes(kLeastBlocks)));
  if (page == nullptr) return false;
  *page = {.count = 0, .capacity = kLeastBlocks, .nodes = 0};
  std::copy_backward(pages_ + at, pages_ + page_count_, pages_ + page_count_ + 1);
  pages_[at] = page;
  ++page_count_;
  return true;
}

bool TimeIndex::Enlarge(Page** page) {
  Page* const old = *page;
  auto* const larger = reinterpret_cast<Page*>(Take(PageBytes(old->capacity * 2)));
  if (larger == nullptr) return false;
  *larger = {.count = old->count, .capacity = old->capacity * 2, .nodes = old->nodes};
  std::copy(old->blocks(), old->blocks() + old->count, larger->blocks());
  GiveBack(old, PageBytes(old->capacity));
  *page = larger;
  return true;
}

// An empty one, where there is room. False when the heap is spent.
bool TimeIndex::InsertBlock(Place place, Key key, uint32_t capacity) {
  Page* const page = pages_[place.page];
  auto* const nodes = reinterpret_cast<NodeId*>(Take(capacity * sizeof(NodeId)));
  if (nodes == nullptr) {
    if (page->count == 0) EraseBlock({place.page, 0});
    return false;
  }
  Block* const at = page->blocks() + place.block;
  std::copy_backward(at, page->blocks() + page->count, page->blocks() + page->count + 1);
  *at = {.when_ns = key.first,
         .node = key.second,
         .count = 0,
         .capacity = static_cast<uint16_t>(capacity),
         .nodes = nodes};
  ++page->count;
  return true;
}

bool TimeIndex::Append(Block* block, NodeId node) {
  if (block->count == block->capacity) {
    const size_t bytes = block->capacity * sizeof(NodeId);
    auto* const nodes = reinterpret_cast<NodeId*>(Take(2 * bytes));
    if (nodes == nullptr) return false;
    std::copy(block->nodes, block->nodes + block->count, nodes);
    GiveBack(block->nodes, bytes);
    block->nodes = nodes;
    block->capacity = static_cast<uint16_t>(block->capacity * 2);
  }
  block->nodes[block->count++] = node;
  return true;
}

bool TimeIndex::Has(NodeId node, int64_t when_ns) const {
  if (size_ == 0) return false;
  const std::span<const NodeId> nodes = NodesAt(Locate({when_ns, node}));
  return std::ranges::find(nodes, node) != nodes.end();
}

void TimeIndex::Remove(NodeId node, int64_t when_ns) {
  if (size_ == 0) return;
  const Place place = Locate({when_ns, node});
  Block& block = At(place);
  NodeId* const end = block.nodes + block.count;
  NodeId* const found = std::find(block.nodes, end, node);
  if (found == end) return;
  *found = end[-1];
  --block.count;
  --pages_[place.page]->nodes;
  --size_;
  if (block.count == 0) {
    EraseBlock(place);
  } else if (block.count < kFewNodes) {
    if (place.block > 0) MergeWithNext({place.page, place.block - 1});
    if (place.block < pages_[place.page]->count) MergeWithNext(place);
  }
}

// The block, which is empty or has been merged, and the page where it was the last one.
void TimeIndex::EraseBlock(Place place) {
  Page* const page = pages_[place.page];
  if (place.block < page->count) {
    Block* const at = page->blocks() + place.block;
    GiveBack(at->nodes, at->capacity * sizeof(NodeId));
    std::copy(at + 1, page->blocks() + page->count, at);
    --page->count;
  }
  if (page->count > 0) return;
  GiveBack(page, PageBytes(page->capacity));
  std::copy(pages_ + place.page + 1, pages_ + page_count_, pages_ + place.page);
  --page_count_;
}

// Where both are in one page and have few nodes.
void TimeIndex::MergeWithNext(Place place) {
  if (place.block + 1 >= pages_[place.page]->count) return;
  Block& block = At(place);
  const Block& next = At({place.page, place.block + 1});
  const uint32_t count = block.count + next.count;
  if (count > kBlockNodes / 2 || count > block.capacity) return;
  std::copy(next.nodes, next.nodes + next.count, block.nodes + block.count);
  block.count = static_cast<uint16_t>(count);
  EraseBlock({place.page, place.block + 1});
}

uint64_t TimeIndex::CountAtMost(const TimeRange& range) const {
  if (size_ == 0 || (range.begin_ns >= range.end_ns && range.end_ns != kFilterToEnd)) return 0;
  const Place first = Locate({range.begin_ns, 0});
  const Place last =
      Locate(range.end_ns == kFilterToEnd ? kBehindAll : Key{range.end_ns - 1, kNoNode});
  uint64_t count = 0;
  for (size_t page = first.page; page <= last.page; ++page) {
    const uint32_t begin = page == first.page ? first.block : 0;
    const uint32_t end = page == last.page ? last.block + 1 : pages_[page]->count;
    if (begin == 0 && end == pages_[page]->count) {
      count += pages_[page]->nodes;
      continue;
    }
    for (uint32_t block = begin; block < end; ++block) count += At({page, block}).count;
  }
  return count;
}

void TimeIndex::Candidates::Begin(const TimeIndex* index, const TimeRange& range) {
  index_ = index;
  range_ = range;
  const Place first = index->Locate({range.begin_ns, 0});
  page_ = first.page;
  block_ = first.block;
}

bool TimeIndex::Candidates::Next(std::span<const NodeId>* nodes, bool* are_certain) {
  if (page_ >= index_->page_count_) return false;
  const Place place{page_, block_};
  const Key key = index_->KeyAt(place);
  const bool has_end = range_.end_ns != kFilterToEnd;
  if (has_end && (key.first >= range_.end_ns || range_.begin_ns >= range_.end_ns)) return false;
  *nodes = index_->NodesAt(place);
  *are_certain =
      key.first >= range_.begin_ns && (!has_end || index_->KeyBehind(place).first < range_.end_ns);
  if (++block_ == index_->pages_[page_]->count) {
    ++page_;
    block_ = 0;
  }
  return true;
}

}  // namespace engram
