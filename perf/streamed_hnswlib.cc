// Compiled and kept apart as hnswlib_index.cc is.

#include "perf/streamed_hnswlib.h"

#include <hnswlib/hnswlib.h>

#include <cstring>
#include <unordered_set>

namespace engram {

namespace {

class StreamedHnswlib final : public StreamedIndex {
  using Graph = hnswlib::HierarchicalNSW<float>;

 public:
  explicit StreamedHnswlib(const HnswlibOptions& options) {
    if (options.metric == Metric::kL2) {
      space_ = std::make_unique<hnswlib::L2Space>(options.dimension);
    } else {
      space_ = std::make_unique<hnswlib::InnerProductSpace>(options.dimension);
    }
    graph_ = std::make_unique<Graph>(space_.get(), options.capacity, options.M,
                                     options.ef_construction, options.seed);
    std::memset(graph_->data_level0_memory_, 0, options.capacity * graph_->size_data_per_element_);
  }

  bool Send(const Mutation& mutation, const VectorSet& base) override {
    ++visible_;
    if (mutation.row == kNoRow) {
      // Its label goes at once: release 0.8 keeps it until the place is taken, and where the tag
      // has come back in another place by then, it is that one's label which is lost.
      const auto found = graph_->label_lookup_.find(mutation.tag);
      vacant_.insert(found->second);
      graph_->markDeletedInternal(found->second);
      graph_->label_lookup_.erase(found);
    } else {
      Put(mutation.tag, base.Bytes(static_cast<size_t>(mutation.row)));
    }
    return true;
  }
  uint64_t visible() const override { return visible_; }

  bool Ask(const VectorSet& queries, size_t query, uint32_t k, uint32_t ef) override {
    graph_->setEf(ef);
    hits_.clear();
    auto found = graph_->searchKnn(queries.Bytes(query), k);
    for (; !found.empty(); found.pop()) hits_.push_back(static_cast<int64_t>(found.top().second));
    return true;
  }
  bool TakeAnswer(std::vector<int64_t>* tags) override {
    tags->swap(hits_);
    return true;
  }

  void Poll() override {}
  void Rest() override {}
  Waiting waiting() const override {
    return {.unlinked = 0, .retired = vacant_.size(), .linked_ever = 0};
  }

 private:
  // As addPoint(vector, tag, true) of release 0.7 with allow_replace_deleted; a tag that lives is
  // updated, as by addPoint(vector, tag).
  void Put(hnswlib::labeltype tag, const std::byte* vector) {
    if (vacant_.empty() || graph_->label_lookup_.contains(tag)) {
      graph_->addPoint(vector, tag);
      return;
    }
    const hnswlib::tableint place = *vacant_.begin();
    vacant_.erase(vacant_.begin());
    graph_->setExternalLabel(place, tag);
    graph_->label_lookup_[tag] = place;
    graph_->unmarkDeletedInternal(place);
    graph_->updatePoint(vector, place, 1.0F);
  }

  uint64_t visible_ = 0;
  std::unique_ptr<hnswlib::SpaceInterface<float>> space_;
  std::unique_ptr<Graph> graph_;
  std::unordered_set<hnswlib::tableint> vacant_;
  std::vector<int64_t> hits_;
};

}  // namespace

std::unique_ptr<StreamedIndex> MakeStreamedHnswlib(const HnswlibOptions& options) {
  return std::make_unique<StreamedHnswlib>(options);
}

}  // namespace engram
