#pragma once

#include <cstdint>

#include "src/core/result.h"
#include "src/core/unique_fd.h"

namespace engram {

// What a core without a network sleeps on: an eventfd.
//
// Thread safety: Wait is the owner's alone; Wake may be called by any thread.
class Doorbell {
 public:
  // Errors: kResourceExhausted when there are no more descriptors.
  static Result<Doorbell> Create();
  // Blocks until a Wake, or `timeout_ns` has passed. A Wake before it ends it at once.
  void Wait(int64_t timeout_ns);
  void Wake();

 private:
  explicit Doorbell(int fd) : fd_(fd) {}
  UniqueFd fd_;
};

}  // namespace engram
