#include "index/attribute_index.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "src/core/check.h"
#include "src/core/hash.h"

namespace engram {

namespace {

constexpr size_t kAttributeHeaderBytes = 2;

std::unexpected<Error> Unsound(const char* what, uint32_t which) {
  return Fail(ErrorCode::kCorrupt,
              "attributes: " + std::string(what) + " (" + std::to_string(which) + ")");
}

}  // namespace

AttributeIndex::AttributeIndex(ArenaHeap* heap, std::span<const std::string> declared,
                               uint64_t seed)
    : heap_(heap),
      seed_(MixBits(seed)),
      pages_(heap),
      terms_(heap),
      sets_(heap),
      lists_(heap),
      term_map_(heap),
      set_map_(heap) {
  CHECK(declared.size() <= kMaxFilterKeys, "keys of filters are bounded");
  for (const std::string_view key : {kTagKey, kWhoKey, kWhereKey, kMemoryTypeKey}) {
    keys_.emplace_back(key);
  }
  for (const std::string& key : declared) {
    if (KeyOf(key) == kNoKey) keys_.push_back(key);
  }
}

AttributeIndex::~AttributeIndex() {
  for (SetId set = 1; set < made_sets_; ++set) {
    if (sets_[set].count > 1) heap_->FreeArray(sets_[set].members, sets_[set].count);
  }
  for (uint32_t term = 0; term < made_terms_; ++term) {
    if (terms_[term].text != nullptr) heap_->Free(terms_[term].text, terms_[term].value_bytes);
  }
  for (size_t page = 0; page < pages_.capacity(); ++page) {
    if (pages_[page] != nullptr) {
      heap_->Free(reinterpret_cast<std::byte*>(pages_[page]), sizeof(Page));
    }
  }
}

uint8_t AttributeIndex::KeyOf(std::string_view key) const {
  const auto found = std::ranges::find(keys_, key);
  return found == keys_.end() ? kNoKey : static_cast<uint8_t>(found - keys_.begin());
}

// ---------------------------------------------------------------------------------------------
// Terms

uint64_t AttributeIndex::HashOfTerm(uint8_t key, std::string_view value) const {
  return HashString(value, seed_ + key);
}

uint32_t AttributeIndex::FindTerm(uint8_t key, std::string_view value) const {
  return term_map_.Find(HashOfTerm(key, value), [&](uint32_t term) {
    return terms_[term].key == key && ValueOf(terms_[term]) == value;
  });
}

// In no set yet. kNone when the heap is spent.
uint32_t AttributeIndex::MakeTerm(uint8_t key, std::string_view value) {
  const bool is_new = first_free_term_ == kNone;
  if (is_new && !terms_.Reserve(size_t{made_terms_} + 1)) return kNone;
  std::byte* const text = heap_->Allocate(value.size());
  if (text == nullptr) return kNone;
  const uint32_t term = is_new ? made_terms_ : first_free_term_;
  if (!term_map_.Insert(HashOfTerm(key, value), term)) {
    heap_->Free(text, value.size());
    return kNone;
  }
  if (is_new) {
    ++made_terms_;
  } else {
    first_free_term_ = terms_[term].sets.tail;
  }
  if (!value.empty()) std::memcpy(text, value.data(), value.size());
  block_bytes_ += ArenaHeap::BlockBytes(value.size());
  terms_[term] = {.text = text,
                  .sets = {},
                  .nodes = 0,
                  .key = key,
                  .value_bytes = static_cast<uint8_t>(value.size()),
                  .reserved = 0};
  return term;
}

void AttributeIndex::FreeTerm(uint32_t term) {
  Term& freed = terms_[term];
  term_map_.Erase(HashOfTerm(freed.key, ValueOf(freed)), term);
  heap_->Free(freed.text, freed.value_bytes);
  block_bytes_ -= ArenaHeap::BlockBytes(freed.value_bytes);
  freed = {};
  freed.sets.tail = std::exchange(first_free_term_, term);
}

// Those that were made for a set that has come to nothing.
void AttributeIndex::FreeUnused(std::span<const uint32_t> terms) {
  for (const uint32_t term : terms) {
    if (terms_[term].text != nullptr && terms_[term].sets.count == 0) FreeTerm(term);
  }
}

// The terms of what is kept, rising, made where they are new. False when the heap is spent; nothing
// has changed then.
bool AttributeIndex::TakeTerms(std::span<const std::byte> attributes, Terms* terms, size_t* count) {
  *count = 0;
  AttributeReader reader(attributes);
  for (Attribute attribute; reader.Next(&attribute);) {
    const uint8_t key = KeyOf(attribute.key);
    if (key == kNoKey) continue;
    CHECK(*count < terms->size(), "attributes are bounded");
    uint32_t term = FindTerm(key, attribute.value);
    if (term == kNone) term = MakeTerm(key, attribute.value);
    if (term == kNone) {
      FreeUnused(std::span(*terms).first(*count));
      return false;
    }
    (*terms)[(*count)++] = term;
  }
  const auto end = terms->begin() + static_cast<ptrdiff_t>(*count);
  std::sort(terms->begin(), end);
  *count = static_cast<size_t>(std::unique(terms->begin(), end) - terms->begin());
  return true;
}

// ---------------------------------------------------------------------------------------------
// Sets

uint64_t AttributeIndex::HashOfSet(std::span<const uint32_t> terms) const {
  uint64_t hash = seed_;
  for (const uint32_t term : terms) hash = MixBits(hash ^ term);
  return hash;
}

uint64_t AttributeIndex::HashOfSet(const Set& set) const {
  uint64_t hash = seed_;
  for (const Member& member : set.all()) hash = MixBits(hash ^ member.term);
  return hash;
}

AttributeIndex::SetId AttributeIndex::FindSet(std::span<const uint32_t> terms) const {
  const SetId found = set_map_.Find(HashOfSet(terms), [&](SetId set) {
    return std::ranges::equal(sets_[set].all(), terms, {}, &Member::term);
  });
  return found == kNone ? kNoAttributes : found;
}

// Without nodes yet. kNoAttributes when the heap is spent.
AttributeIndex::SetId AttributeIndex::MakeSet(std::span<const uint32_t> terms) {
  const bool is_new = first_free_set_ == kNone;
  if ((is_new && !sets_.Reserve(size_t{made_sets_} + 1)) || !lists_.Reserve(terms.size())) {
    return kNoAttributes;
  }
  Member* members = nullptr;
  if (terms.size() > 1) {
    members = heap_->AllocateArray<Member>(terms.size());
    if (members == nullptr) return kNoAttributes;
  }
  const SetId id = is_new ? made_sets_ : first_free_set_;
  if (!set_map_.Insert(HashOfSet(terms), id)) {
    if (members != nullptr) heap_->FreeArray(members, terms.size());
    return kNoAttributes;
  }
  if (is_new) {
    ++made_sets_;
  } else {
    first_free_set_ = sets_[id].nodes.tail;
  }
  Set& set = sets_[id];
  set = Set{};
  set.count = static_cast<uint32_t>(terms.size());
  if (members != nullptr) {
    set.members = members;
    block_bytes_ += ArenaHeap::BlockBytes(terms.size() * sizeof(Member));
  }
  for (size_t i = 0; i < terms.size(); ++i) set.all()[i] = {.term = terms[i], .place = 0};
  for (const uint32_t term : terms) {
    lists_.Push(&terms_[term].sets, id, [this, term](SetId moved, uint32_t place) {
      std::ranges::lower_bound(sets_[moved].all(), term, {}, &Member::term)->place = place;
    });
  }
  return id;
}

void AttributeIndex::FreeSet(SetId id) {
  Set& set = sets_[id];
  set_map_.Erase(HashOfSet(set), id);
  for (const Member& member : set.all()) {
    Term& term = terms_[member.term];
    lists_.Remove(&term.sets, member.place, [this, &member](SetId moved, uint32_t place) {
      std::ranges::lower_bound(sets_[moved].all(), member.term, {}, &Member::term)->place = place;
    });
    if (term.sets.count == 0) FreeTerm(member.term);
  }
  if (set.count > 1) {
    heap_->FreeArray(set.members, set.count);
    block_bytes_ -= ArenaHeap::BlockBytes(set.count * sizeof(Member));
  }
  set = Set{};
  set.nodes.tail = std::exchange(first_free_set_, id);
}

// ---------------------------------------------------------------------------------------------
// Nodes

bool AttributeIndex::MakePage(NodeId node) {
  const size_t index = node / kPageNodes;
  if (!pages_.Reserve(index + 1)) return false;
  if (pages_[index] != nullptr) return true;
  auto* const page = reinterpret_cast<Page*>(heap_->Allocate(sizeof(Page)));
  if (page == nullptr) return false;
  std::memset(static_cast<void*>(page), 0, sizeof(Page));
  page_bytes_ += ArenaHeap::BlockBytes(sizeof(Page));
  pages_[index] = page;
  return true;
}

bool AttributeIndex::Add(NodeId node, std::span<const std::byte> attributes) {
  if (attributes.empty()) return true;
  CHECK(SetOf(node) == kNoAttributes, "a node is given its attributes once");
  Terms terms;
  size_t count = 0;
  if (!TakeTerms(attributes, &terms, &count)) return false;
  if (count == 0) return true;
  const std::span<const uint32_t> taken = std::span(terms).first(count);
  SetId set = kNoAttributes;
  if (MakePage(node)) {
    set = FindSet(taken);
    // A set that was made has no node, and so room for the first one.
    if (set != kNoAttributes && !lists_.Reserve(1)) return false;
    if (set == kNoAttributes) set = MakeSet(taken);
  }
  if (set == kNoAttributes) {
    FreeUnused(taken);
    return false;
  }
  Join(node, set);
  return true;
}

bool AttributeIndex::AddAs(NodeId node, NodeId other) {
  const SetId set = SetOf(other);
  if (set == kNoAttributes) return true;
  CHECK(SetOf(node) == kNoAttributes, "a node is given its attributes once");
  if (!MakePage(node) || !lists_.Reserve(1)) return false;
  Join(node, set);
  return true;
}

// There is a page, and room in the lists.
void AttributeIndex::Join(NodeId node, SetId set) {
  pages_[node / kPageNodes]->set[node % kPageNodes] = set;
  lists_.Push(&sets_[set].nodes, node,
              [this](NodeId moved, uint32_t place) { MoveNode(moved, place); });
  for (const Member& member : sets_[set].all()) ++terms_[member.term].nodes;
  ++nodes_;
}

void AttributeIndex::Remove(NodeId node) {
  const SetId set = SetOf(node);
  if (set == kNoAttributes) return;
  Page* const page = pages_[node / kPageNodes];
  page->set[node % kPageNodes] = kNoAttributes;
  for (const Member& member : sets_[set].all()) --terms_[member.term].nodes;
  lists_.Remove(&sets_[set].nodes, page->place[node % kPageNodes],
                [this](NodeId moved, uint32_t place) { MoveNode(moved, place); });
  --nodes_;
  if (sets_[set].nodes.count == 0) FreeSet(set);
}

size_t AttributeIndex::AttributeBytes(NodeId node) const {
  const SetId set = SetOf(node);
  if (set == kNoAttributes) return 0;
  size_t bytes = 0;
  for (const Member& member : sets_[set].all()) {
    const Term& term = terms_[member.term];
    bytes += kAttributeHeaderBytes + keys_[term.key].size() + term.value_bytes;
  }
  return bytes;
}

void AttributeIndex::WriteAttributes(NodeId node, std::byte* to) const {
  const SetId set = SetOf(node);
  if (set == kNoAttributes) return;
  std::array<uint32_t, kMaxAttributes> terms;
  size_t count = 0;
  for (const Member& member : sets_[set].all()) terms[count++] = member.term;
  std::ranges::sort(std::span(terms).first(count), {}, [this](uint32_t term) {
    return std::pair(terms_[term].key, ValueOf(terms_[term]));
  });
  const auto put = [&to](std::string_view text) {
    if (!text.empty()) std::memcpy(to, text.data(), text.size());
    to += text.size();
  };
  for (const uint32_t id : std::span(terms).first(count)) {
    const Term& term = terms_[id];
    *to++ = static_cast<std::byte>(keys_[term.key].size());
    *to++ = static_cast<std::byte>(term.value_bytes);
    put(keys_[term.key]);
    put(ValueOf(term));
  }
}

// ---------------------------------------------------------------------------------------------
// Filters

RefusalReason AttributeIndex::Compile(std::span<const std::byte> filter,
                                      CompiledFilter* compiled) const {
  const RefusalReason sound = CheckFilter(filter);
  if (sound != RefusalReason::kNone) return sound;
  FilterReader reader(filter);
  compiled->times = reader.times();
  compiled->matches_none = false;
  compiled->rarest = CompiledFilter::kNoClause;
  compiled->most = UINT64_MAX;
  compiled->clause_count = compiled->term_count = 0;
  for (FilterClause clause; reader.Next(&clause);) {
    const uint8_t key = KeyOf(clause.key);
    if (key == kNoKey) return RefusalReason::kUnknownFilterKey;
    if (!CompileClause(clause, key, compiled)) compiled->matches_none = true;
  }
  return RefusalReason::kNone;
}

// False where nobody meets it.
bool AttributeIndex::CompileClause(const FilterClause& clause, uint8_t key,
                                   CompiledFilter* compiled) const {
  const size_t first = compiled->term_count;
  FilterValueReader values(clause);
  for (std::string_view value; values.Next(&value);) {
    const uint32_t term = FindTerm(key, value);
    if (term != kNone) compiled->terms[compiled->term_count++] = term;
  }
  const auto begin = compiled->terms.begin() + static_cast<ptrdiff_t>(first);
  const auto end = compiled->terms.begin() + static_cast<ptrdiff_t>(compiled->term_count);
  std::sort(begin, end);
  compiled->term_count = static_cast<size_t>(std::unique(begin, end) - compiled->terms.begin());
  const size_t count = compiled->term_count - first;
  if (count == 0) return clause.excludes;
  CompiledFilter::Clause& added = compiled->clauses[compiled->clause_count];
  added = {.excludes = clause.excludes,
           .first = static_cast<uint8_t>(first),
           .count = static_cast<uint8_t>(count)};
  if (!clause.excludes) NoteMost(added, compiled->clause_count, compiled);
  ++compiled->clause_count;
  return true;
}

// A node with two of the values counts twice.
void AttributeIndex::NoteMost(const CompiledFilter::Clause& clause, size_t place,
                              CompiledFilter* compiled) const {
  uint64_t nodes = 0;
  for (const uint32_t term : compiled->TermsOf(clause)) nodes += terms_[term].nodes;
  if (compiled->rarest != CompiledFilter::kNoClause && nodes >= compiled->most) return;
  compiled->most = nodes;
  compiled->rarest = place;
}

bool AttributeIndex::Matches(SetId set, const CompiledFilter& filter) const {
  const std::span<const Member> members =
      set == kNoAttributes ? std::span<const Member>() : sets_[set].all();
  for (size_t i = 0; i < filter.clause_count; ++i) {
    const CompiledFilter::Clause& clause = filter.clauses[i];
    const std::span<const uint32_t> wanted = filter.TermsOf(clause);
    // Both rise.
    auto member = members.begin();
    auto term = wanted.begin();
    bool has_any = false;
    while (!has_any && member != members.end() && term != wanted.end()) {
      has_any = member->term == *term;
      if (member->term < *term) {
        ++member;
      } else {
        ++term;
      }
    }
    if (has_any == clause.excludes) return false;
  }
  return true;
}

void AttributeIndex::Candidates::Begin(const AttributeIndex* index, const CompiledFilter* filter) {
  CHECK(filter->rarest != CompiledFilter::kNoClause, "some clause is required");
  index_ = index;
  filter_ = filter;
  next_term_ = 0;
  set_reader_ = PostingLists::Reader();
  node_reader_ = PostingLists::Reader();
  sets_ = {};
  AskForSets();
}

// The next block, while the one before is gone through.
void AttributeIndex::Candidates::AskForSets() {
  const CompiledFilter::Clause& rarest = filter_->clauses[filter_->rarest];
  std::span<const SetId> next = set_reader_.Next();
  while (next.empty() && next_term_ < rarest.count) {
    ahead_term_ = next_term_++;
    const uint32_t term = filter_->TermsOf(rarest)[ahead_term_];
    set_reader_ = index_->lists_.Read(index_->terms_[term].sets);
    next = set_reader_.Next();
  }
  ahead_count_ = next.size();
  for (size_t i = 0; i < ahead_count_; ++i) {
    ahead_[i] = next[i];
    index_->PrefetchRecord(next[i]);
  }
}

// False when there are no more.
bool AttributeIndex::Candidates::NextSets() {
  if (ahead_count_ == 0) return false;
  std::copy_n(ahead_.begin(), ahead_count_, block_.begin());
  sets_ = std::span(block_).first(ahead_count_);
  term_ = ahead_term_;
  AskForSets();
  for (const SetId set : sets_) index_->PrefetchMembers(set);
  return true;
}

// A set with two of the rarest clause's values comes with the first of them.
bool AttributeIndex::Candidates::IsCandidate(SetId set) const {
  const CompiledFilter::Clause& rarest = filter_->clauses[filter_->rarest];
  if (filter_->clause_count == 1 && rarest.count == 1) return true;
  const auto earlier = filter_->TermsOf(rarest).first(term_);
  for (const Member& member : index_->sets_[set].all()) {
    if (std::ranges::binary_search(earlier, member.term)) return false;
  }
  return index_->Matches(set, *filter_);
}

bool AttributeIndex::Candidates::Next(std::span<const NodeId>* nodes) {
  *nodes = node_reader_.Next();
  if (!nodes->empty()) return true;
  if (sets_.empty() && !NextSets()) return false;
  size_t count = 0;
  for (; !sets_.empty(); sets_ = sets_.subspan(1)) {
    const SetId set = sets_.front();
    if (!IsCandidate(set)) continue;
    const PostingLists::List& list = index_->sets_[set].nodes;
    if (list.count == 1) {
      single_[count++] = list.tail;
      continue;
    }
    if (count > 0) break;  // First those that were gathered.
    sets_ = sets_.subspan(1);
    node_reader_ = index_->lists_.Read(list);
    *nodes = node_reader_.Next();
    return true;
  }
  *nodes = std::span(single_).first(count);
  return true;
}

// ---------------------------------------------------------------------------------------------

size_t AttributeIndex::bytes() const {
  return page_bytes_ + block_bytes_ + lists_.bytes() + pages_.bytes() + terms_.bytes() +
         sets_.bytes() + term_map_.bytes() + set_map_.bytes();
}

Result<void> AttributeIndex::CheckSet(SetId id) const {
  const Set& set = sets_[id];
  std::vector<uint32_t> terms;
  for (const Member& member : set.all()) {
    terms.push_back(member.term);
    const PostingLists::List& sets = terms_[member.term].sets;
    const SetId there = sets.count == 1 ? sets.tail : lists_.At(member.place);
    if (there != id) return Unsound("a set is not where it says", id);
  }
  if (!std::ranges::is_sorted(terms) || std::ranges::adjacent_find(terms) != terms.end()) {
    return Unsound("terms do not rise", id);
  }
  if (FindSet(terms) != id) return Unsound("a set is not in the map", id);
  uint32_t nodes = 0;
  PostingLists::Reader reader = lists_.Read(set.nodes);
  for (auto some = reader.Next(); !some.empty(); some = reader.Next()) {
    for (const NodeId node : some) {
      ++nodes;
      if (SetOf(node) != id) return Unsound("a node has another set", node);
      if (set.nodes.count > 1 &&
          lists_.At(pages_[node / kPageNodes]->place[node % kPageNodes]) != node) {
        return Unsound("a node is not where it says", node);
      }
    }
  }
  if (nodes == 0 || nodes != set.nodes.count) return Unsound("nodes of a set", id);
  return {};
}

Result<void> AttributeIndex::CheckTerm(uint32_t id) const {
  const Term& term = terms_[id];
  if (FindTerm(term.key, ValueOf(term)) != id) return Unsound("a term is not in the map", id);
  uint64_t nodes = 0;
  uint32_t sets = 0;
  PostingLists::Reader reader = lists_.Read(term.sets);
  for (auto some = reader.Next(); !some.empty(); some = reader.Next()) {
    for (const SetId set : some) {
      ++sets;
      nodes += sets_[set].nodes.count;
      if (!std::ranges::binary_search(sets_[set].all(), id, {}, &Member::term)) {
        return Unsound("a set lacks a term that has it", set);
      }
    }
  }
  if (sets == 0 || sets != term.sets.count) return Unsound("sets of a term", id);
  if (nodes != term.nodes) return Unsound("nodes of a term", id);
  return {};
}

Result<void> AttributeIndex::CheckInvariants() const {
  uint64_t nodes = 0;
  size_t sets = 0;
  size_t terms = 0;
  for (SetId set = 1; set < made_sets_; ++set) {
    if (sets_[set].count == 0) continue;
    ++sets;
    nodes += sets_[set].nodes.count;
    if (Result<void> sound = CheckSet(set); !sound) return sound;
  }
  for (uint32_t term = 0; term < made_terms_; ++term) {
    if (terms_[term].text == nullptr) continue;
    ++terms;
    if (Result<void> sound = CheckTerm(term); !sound) return sound;
  }
  uint64_t paged = 0;
  for (size_t page = 0; page < pages_.capacity(); ++page) {
    if (pages_[page] == nullptr) continue;
    paged += static_cast<uint64_t>(
        std::ranges::count_if(pages_[page]->set, [](SetId set) { return set != kNoAttributes; }));
  }
  if (nodes != nodes_ || paged != nodes_) return Unsound("number of nodes", made_sets_);
  if (sets != set_map_.size()) return Unsound("number of sets", made_sets_);
  if (terms != term_map_.size()) return Unsound("number of terms", made_terms_);
  return {};
}

}  // namespace engram
