#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "src/control/json_request.h"

namespace engram {

// Reads a text in memory of exactly the size that the reader may look at, with what may stand
// behind it.
class ExactReader {
 public:
  std::optional<std::string> Read(std::string_view text, JsonRequest* request,
                                  JsonReader::Form form = JsonReader::Form::kMessage) {
    // Not the same bytes twice, so that whoever looks at them is seen.
    padding_ = static_cast<char>(padding_ * 5 + 3);
    std::vector<char> memory(text.begin(), text.end());
    memory.insert(memory.end(), JsonReader::kPaddingBytes, padding_);
    return reader_.Read({memory.data(), text.size()}, form, request);
  }

 private:
  JsonReader reader_;
  char padding_ = '"';
};

}  // namespace engram
