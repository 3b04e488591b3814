#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "src/core/ids.h"

// A session's id as Engram's clients have it.

namespace engram {

// 16 hexadecimal digits.
std::string SessionText(SessionId session);

// Nothing where it is no id that a server gave.
std::optional<SessionId> ReadSession(std::string_view text);

}  // namespace engram
