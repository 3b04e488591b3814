#pragma once

#include <liburing.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <expected>
#include <string>

#include "src/core/result.h"

// What the network on io_uring is set up with (uring_network.cc), and what tries beforehand whether
// that works (uring_probe.cc).

namespace engram {

// One thread submits, and completions are worked off only when that thread asks for them; a flag
// in the shared ring says when there is something to ask for.
inline constexpr unsigned kUringSetupFlags =
    IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG;

inline constexpr int kBufferGroup = 0;
inline constexpr size_t kUringPageBytes = 4096;

// kPermissionDenied where that is why, else kUnavailable.
inline std::unexpected<Error> UringRefused(const std::string& what, int error) {
  auto failure = FailErrno(what, error);
  if (failure.error().code != ErrorCode::kPermissionDenied) {
    failure.error().code = ErrorCode::kUnavailable;
  }
  return failure;
}

// A ring of provided buffers over memory of the caller: the ring itself, then the buffers.
class BufferRing {
 public:
  static size_t MemoryBytes(size_t buffer_bytes, uint32_t count) {
    return RingBytes(count) + buffer_bytes * count;
  }
  int Register(io_uring* ring, std::byte* memory, size_t buffer_bytes, uint32_t count) {
    entries_ = reinterpret_cast<io_uring_buf_ring*>(memory);
    buffers_ = memory + RingBytes(count);
    buffer_bytes_ = buffer_bytes;
    mask_ = static_cast<int>(std::bit_ceil(count) - 1);
    io_uring_buf_reg registration{};
    registration.ring_addr = std::bit_cast<uintptr_t>(entries_);
    registration.ring_entries = std::bit_ceil(count);
    registration.bgid = kBufferGroup;
    io_uring_buf_ring_init(entries_);
    const int result = io_uring_register_buf_ring(ring, &registration, 0);
    if (result != 0) return result;
    for (uint32_t i = 0; i < count; ++i) Recycle(static_cast<uint16_t>(i));
    return 0;
  }
  // Makes the buffers' pages present, so that the first receives do not take the page faults.
  void Touch(uint32_t count) {
    for (size_t at = 0; at < buffer_bytes_ * count; at += kUringPageBytes)
      buffers_[at] = std::byte{0};
  }
  std::byte* At(uint16_t id) const { return buffers_ + id * buffer_bytes_; }
  void Recycle(uint16_t id) {
    io_uring_buf_ring_add(entries_, At(id), static_cast<unsigned>(buffer_bytes_), id, mask_, 0);
    io_uring_buf_ring_advance(entries_, 1);
  }

 private:
  static size_t RingBytes(uint32_t count) {
    return (std::bit_ceil(count) * sizeof(io_uring_buf) + kUringPageBytes - 1) / kUringPageBytes *
           kUringPageBytes;
  }
  io_uring_buf_ring* entries_ = nullptr;
  std::byte* buffers_ = nullptr;
  size_t buffer_bytes_ = 0;
  int mask_ = 0;
};

// Whether what the network builds on really works: a kernel or a sandbox may accept the set-up and
// refuse the operations. Takes up to 2 s where they do not complete. Errors: kPermissionDenied,
// kUnavailable.
Result<void> ProbeUring();

}  // namespace engram
