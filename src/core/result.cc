#include "src/core/result.h"

#include <cerrno>
#include <system_error>

namespace engram {

namespace {

ErrorCode CodeOfErrno(int errno_value) {
  switch (errno_value) {
    case ENOENT:
      return ErrorCode::kNotFound;
    case EEXIST:
    case EADDRINUSE:
      return ErrorCode::kAlreadyExists;
    case EPERM:
    case EACCES:
    case EROFS:
      return ErrorCode::kPermissionDenied;
    case ENOMEM:
    case ENOSPC:
    case EDQUOT:
    case EMFILE:
    case ENFILE:
      return ErrorCode::kResourceExhausted;
    case ENOSYS:
    case EOPNOTSUPP:
    case EAGAIN:
      return ErrorCode::kUnavailable;
    case EINVAL:
      return ErrorCode::kInvalidArgument;
    default:
      return ErrorCode::kInternal;
  }
}

}  // namespace

std::unexpected<Error> FailErrno(const std::string& what, int errno_value) {
  return Fail(CodeOfErrno(errno_value), what + ": " + std::generic_category().message(errno_value));
}

}  // namespace engram
