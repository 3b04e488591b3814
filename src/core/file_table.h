#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "src/core/check.h"
#include "src/core/disk.h"

namespace engram {

// The open files of one Disk: `State` by FileId. All room is taken at the start.
//
// Thread safety: one thread.
// Invariants: a place is either open, or in the list of free places; its generation rises each time
// it is opened, so a FileId kept too long is caught.
template <typename State>
class FileTable {
 public:
  explicit FileTable(uint32_t max_open_files) : places_(max_open_files) {
    free_.reserve(max_open_files);
    for (uint32_t i = max_open_files; i > 0; --i) free_.push_back(i - 1);
  }

  bool full() const { return free_.empty(); }
  // Not when full.
  FileId Add(State state) {
    CHECK(!full(), "ask full() first");
    const uint32_t index = free_.back();
    free_.pop_back();
    Place& place = places_[index];
    place.open = true;
    ++place.generation;
    place.state = std::move(state);
    return {index, place.generation};
  }
  State& Get(FileId file) {
    CHECK(file.index < places_.size(), "not a file of this disk");
    Place& place = places_[file.index];
    CHECK(place.open && place.generation == file.generation, "the file is not open");
    return place.state;
  }
  State Take(FileId file) {
    State state = std::move(Get(file));
    Place& place = places_[file.index];
    place.open = false;
    place.state = State{};
    free_.push_back(file.index);
    return state;
  }
  // Calls `action` with the state of each open file.
  template <typename Action>
  void ForEach(Action action) {
    for (Place& place : places_) {
      if (place.open) action(place.state);
    }
  }

 private:
  struct Place {
    bool open = false;
    uint32_t generation = 0;
    State state{};
  };
  std::vector<Place> places_;
  std::vector<uint32_t> free_;
};

}  // namespace engram
