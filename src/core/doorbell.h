#pragma once

#include <cstdint>

#include "src/core/result.h"

namespace engram {

// What a core without a network sleeps on: an eventfd.
//
// Thread safety: Wait is the owner's alone; Wake may be called by any thread.
class Doorbell {
 public:
  // Errors: kResourceExhausted when there are no more descriptors.
  static Result<Doorbell> Create();
  Doorbell(Doorbell&& other) noexcept;
  Doorbell& operator=(Doorbell&& other) noexcept;
  Doorbell(const Doorbell&) = delete;
  Doorbell& operator=(const Doorbell&) = delete;
  ~Doorbell();

  // Blocks until a Wake, or `timeout_ns` has passed. A Wake before it ends it at once.
  void Wait(int64_t timeout_ns);
  void Wake();

 private:
  explicit Doorbell(int fd) : fd_(fd) {}
  int fd_;
};

}  // namespace engram
