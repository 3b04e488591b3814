#pragma once

#include <string>
#include <string_view>

#include <google/protobuf/descriptor.h>

namespace engram {

// Why protobuf does not read `bytes` as a message of `type`, for a person: the field, what it has,
// and what was expected. Empty where it does read them. Protobuf itself only says that it does not.
std::string WireFault(const google::protobuf::Descriptor& type, std::string_view bytes);

}  // namespace engram
