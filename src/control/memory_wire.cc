#include "src/control/memory_wire.h"

#include <cstdint>
#include <cstdio>
#include <map>
#include <utility>

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/wire_format_lite.h>

#include "src/control/memory_codec.h"
#include "src/core/check.h"

namespace engram {

namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedInputStream;

std::string HexOf(char byte) {
  char text[8];
  std::snprintf(text, sizeof(text), "0x%02x", static_cast<unsigned>(static_cast<uint8_t>(byte)));
  return text;
}

// Walks over a message's bytes as protobuf does, up to the first field that it would not take.
class WireWalk {
 public:
  explicit WireWalk(std::string_view bytes)
      : input_(reinterpret_cast<const uint8_t*>(bytes.data()), static_cast<int>(bytes.size())) {}

  // False once fault() says why. `path` names the message within the request, with a dot behind.
  bool Message(const Descriptor& type, const std::string& path) {
    std::map<int, int> seen;
    for (;;) {
      const int begin = input_.CurrentPosition();
      const uint32_t tag = input_.ReadTag();
      // CodedInputStream takes longer ones, a message's own reader does not.
      if (tag == 0 || input_.CurrentPosition() - begin > kMaxTagBytes) {
        if (tag == 0 && input_.ConsumedEntireMessage()) return true;
        return Fail(path + "tag: no number of a field; expected a field as protobuf writes it");
      }
      const int number = WireFormatLite::GetTagFieldNumber(tag);
      const FieldDescriptor* field = type.FindFieldByNumber(number);
      std::string name = path + (field != nullptr ? field->name() : std::to_string(number));
      const bool sized =
          WireFormatLite::GetTagWireType(tag) == WireFormatLite::WIRETYPE_LENGTH_DELIMITED;
      if (field == nullptr || !sized) {
        // Not ours, or a number.
        if (WireFormatLite::SkipField(&input_, tag)) continue;
        return Fail(name + ": ends before it is whole; expected a field as protobuf writes it");
      }
      const bool packed = field->is_packable();
      if (field->is_repeated() && !packed) name += "[" + std::to_string(seen[number]++) + "]";
      if (!Sized(*field, name)) return false;
    }
  }

  std::string fault() && { return std::move(fault_); }

 private:
  static constexpr int kMaxTagBytes = 5;

  bool Fail(std::string fault) {
    fault_ = std::move(fault);
    return false;
  }

  // A field with a length before it.
  bool Sized(const FieldDescriptor& field, const std::string& name) {
    uint32_t bytes = 0;
    if (!input_.ReadVarint32(&bytes) || bytes > static_cast<uint32_t>(input_.BytesUntilLimit())) {
      return Fail(name + ": its length is beyond the message's end; expected a whole message");
    }
    const int size = static_cast<int>(bytes);
    if (field.type() == FieldDescriptor::TYPE_MESSAGE) {
      const auto limit = input_.PushLimit(size);
      const bool sound = Message(*field.message_type(), name + ".");
      input_.PopLimit(limit);
      return sound;
    }
    if (field.type() == FieldDescriptor::TYPE_STRING) return Text(size, name);
    if (field.is_packable() && field.type() == FieldDescriptor::TYPE_ENUM) {
      return Enumerators(size, name);
    }
    const bool numbers = field.is_packable() && field.type() == FieldDescriptor::TYPE_FLOAT;
    if (numbers && size % 4 != 0) {
      return Fail(name + ": " + std::to_string(size) + " bytes; expected 4 for each number");
    }
    return input_.Skip(size);
  }

  // Packed: one varint behind the other.
  bool Enumerators(int size, const std::string& name) {
    const auto limit = input_.PushLimit(size);
    uint64_t number = 0;
    bool sound = true;
    while (sound && input_.BytesUntilLimit() > 0) sound = input_.ReadVarint64(&number);
    input_.PopLimit(limit);
    return sound || Fail(name + ": a number ends before it is whole; expected whole numbers");
  }

  bool Text(int size, const std::string& name) {
    std::string text;
    CHECK(input_.ReadString(&text, size), "the length was checked");
    const size_t good = Utf8Prefix(text);
    if (good == text.size()) return true;
    return Fail(name + ": byte " + std::to_string(good) + " is " + HexOf(text[good]) +
                ", which is no UTF-8 there; expected text in UTF-8");
  }

  CodedInputStream input_;
  std::string fault_;
};

}  // namespace

std::string WireFault(const Descriptor& type, std::string_view bytes) {
  WireWalk walk(bytes);
  walk.Message(type, "");
  return std::move(walk).fault();
}

}  // namespace engram
