#pragma once

namespace engram {

// With a sanitizer, which takes its time, a test runs a part of its cases.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

}  // namespace engram
