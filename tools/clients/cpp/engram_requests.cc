#include <poll.h>

#include <algorithm>
#include <cstring>

#include "tools/clients/cpp/client_support.h"
#include "tools/clients/cpp/engram_client.h"

// What is asked for one at a time: scrolls, checks, introspection, commands.

namespace engram {

namespace {

constexpr size_t kIntrospectionBytesMax = size_t{64} << 20;

}  // namespace

// Scroll and check ------------------------------------------------------------------------------

namespace {

// Sends a request by `send` and hands each frame that answers it to `take`, which says whether it
// was the last. Where the server has no room it is sent again.
template <typename Send, typename Take>
Result<void> Request(Connection& connection, FrameType type, int64_t timeout_ns, const Send& send,
                     const Take& take) {
  // Nothing else of the connection is under way, but answers that nobody waits for any more.
  constexpr uint64_t kRequest = UINT64_MAX;
  const int64_t deadline_ns = NowNs() + timeout_ns;
  send(kRequest);
  for (;;) {
    const Result<Frame> frame = connection.AwaitFrame(deadline_ns);
    if (!frame) return std::unexpected(frame.error());
    if (frame->header.type == FrameType::kNak && frame->header.sequence == kRequest) {
      const Result<Refusal> refusal = ParseNak(*frame);
      if (!refusal) return std::unexpected(refusal.error());
      if (!refusal->closing() && refusal->refused_type == type) {
        if (refusal->reason == RefusalReason::kUnknownSpace) {
          return Fail(ErrorCode::kNotFound, refusal->Describe());
        }
        const int64_t again_ns = NowNs() + int64_t{refusal->retry_after_ms} * kNanosPerMilli;
        if (DescribeRefusal(refusal->reason).effect != RefusalEffect::kWaits ||
            again_ns > deadline_ns) {
          return Fail(ErrorCode::kInvalidArgument, "refused: " + refusal->Describe());
        }
        poll(nullptr, 0, static_cast<int>(std::max(refusal->retry_after_ms, 1u)));
        send(kRequest);
        continue;
      }
    }
    if (frame->header.sequence != kRequest ||
        (frame->header.type != FrameType::kResult && frame->header.type != FrameType::kScrolled &&
         frame->header.type != FrameType::kChecked)) {
      if (auto passed = CheckUnrelatedFrame(*frame); !passed) return passed;
      continue;
    }
    const Result<bool> taken = take(*frame);
    if (!taken) return std::unexpected(taken.error());
    if (*taken) return {};
  }
}

}  // namespace

Result<ScrollPage> Scroll(Connection& connection, const ScrollQuery& query, int64_t timeout_ns) {
  ScrollPage page;
  RecallAnswer answer;
  const auto send = [&](uint64_t request) {
    answer.hits.clear();
    const ScrollBody body{
        .cursor = query.from.cursor, .partition = query.from.partition, .limit = query.limit};
    const int flags = (query.with_payload ? kFrameFlagWithPayload : 0) |
                      (query.with_vector ? kFrameFlagWithVector : 0);
    connection.SendFrame(FrameType::kScroll, static_cast<uint16_t>(flags), request, BytesOf(body));
  };
  const auto take = [&](const Frame& frame) -> Result<bool> {
    if (frame.header.type == FrameType::kResult) {
      if (auto added = AddHits(frame.body, kMaxPageResults, answer); !added) {
        return std::unexpected(added.error());
      }
      return false;
    }
    if (frame.header.type != FrameType::kScrolled || frame.body.size() != sizeof(ScrolledBody)) {
      return FailGrammar("a scroll ends with where it goes on");
    }
    const auto body = LoadAs<ScrolledBody>(frame.body.data());
    const bool forward =
        body.partition > query.from.partition ||
        (body.partition == query.from.partition && body.cursor > query.from.cursor);
    if (body.ended == 0 && !forward) return FailGrammar("a scroll does not go on");
    page.next = {.partition = body.partition, .cursor = body.cursor};
    page.partitions = body.partitions;
    page.ended = body.ended != 0;
    return true;
  };
  if (auto done = Request(connection, FrameType::kScroll, timeout_ns, send, take); !done) {
    return std::unexpected(done.error());
  }
  page.hits = std::move(answer.hits);
  return page;
}

Result<void> ContinueCheck(Connection& connection, SpaceCheck* check, int64_t timeout_ns) {
  const auto send = [&](uint64_t request) {
    const CheckBody body{.shard = check->shard, .state = check->state};
    connection.SendFrame(FrameType::kCheck, 0, request, BytesOf(body));
  };
  const auto take = [&](const Frame& frame) -> Result<bool> {
    if (frame.header.type != FrameType::kChecked || frame.body.size() < sizeof(CheckedBody)) {
      return FailGrammar("a check is answered by what it has come to");
    }
    const auto body = LoadAs<CheckedBody>(frame.body.data());
    const std::span<const std::byte> text = frame.body.subspan(sizeof(CheckedBody));
    if (text.size() != body.text_bytes || body.outcome > CheckOutcome::kUnsound) {
      return FailGrammar("a check's text is not as long as it says");
    }
    check->state = body.state;
    check->outcome = body.outcome;
    check->text.assign(reinterpret_cast<const char*>(text.data()), text.size());
    return true;
  };
  return Request(connection, FrameType::kCheck, timeout_ns, send, take);
}

// Introspection ---------------------------------------------------------------------------------

namespace {

// Asks for `what` and hands the part of each answering frame after its IntrospectionBody to `take`.
template <typename Take>
Result<void> Introspect(Connection& connection, IntrospectWhat what, int64_t timeout_ns,
                        const Take& take) {
  constexpr uint64_t kRequest = 1;
  const int64_t deadline_ns = NowNs() + timeout_ns;
  connection.SendFrame(FrameType::kIntrospect, 0, kRequest, BytesOf(IntrospectBody{.what = what}));
  size_t total_bytes = 0;
  for (;;) {
    const Result<Frame> frame = connection.AwaitFrame(deadline_ns);
    if (!frame) return std::unexpected(frame.error());
    if (frame->header.type != FrameType::kIntrospection) {
      if (auto passed = CheckUnrelatedFrame(*frame); !passed) return passed;
      continue;
    }
    if (frame->body.size() < sizeof(IntrospectionBody)) {
      return FailGrammar("an introspection is too short");
    }
    const auto body = LoadAs<IntrospectionBody>(frame->body.data());
    if (body.what != what) return FailGrammar("an introspection tells what was not asked");
    total_bytes += frame->body.size();
    if (total_bytes > kIntrospectionBytesMax) return FailGrammar("an introspection has no end");
    if (auto taken = take(body, frame->body.subspan(sizeof(IntrospectionBody))); !taken) {
      return taken;
    }
    if ((frame->header.flags & kFrameFlagMore) == 0) return {};
  }
}

}  // namespace

Result<std::vector<SpaceInfo>> IntrospectSpaces(Connection& connection, int64_t timeout_ns) {
  std::vector<SpaceInfo> spaces;
  const auto take = [&](const IntrospectionBody& body,
                        std::span<const std::byte> rest) -> Result<void> {
    for (uint32_t i = 0; i < body.count; ++i) {
      if (rest.size() < sizeof(SpaceRecord)) return FailGrammar("a space record is cut short");
      SpaceInfo info;
      info.record = LoadAs<SpaceRecord>(rest.data());
      if (info.record.record_bytes > rest.size() ||
          info.record.record_bytes < sizeof(SpaceRecord) + info.record.name_bytes) {
        return FailGrammar("a space record's length does not hold what it says");
      }
      info.name.assign(reinterpret_cast<const char*>(rest.data() + sizeof(SpaceRecord)),
                       info.record.name_bytes);
      info.memory = MemoryInRecord(info.record, rest.first(info.record.record_bytes));
      rest = rest.subspan(info.record.record_bytes);
      spaces.push_back(std::move(info));
    }
    return {};
  };
  const Result<void> done = Introspect(connection, IntrospectWhat::kSpaces, timeout_ns, take);
  if (!done) return std::unexpected(done.error());
  return spaces;
}

Result<std::string> IntrospectStatus(Connection& connection, int64_t timeout_ns) {
  std::string text;
  const auto take = [&](const IntrospectionBody&, std::span<const std::byte> rest) -> Result<void> {
    text.append(reinterpret_cast<const char*>(rest.data()), rest.size());
    return {};
  };
  const Result<void> done = Introspect(connection, IntrospectWhat::kStatus, timeout_ns, take);
  if (!done) return std::unexpected(done.error());
  return text;
}

Result<CommandDoneBody> CommandSpace(Connection& connection, SpaceCommand what,
                                     std::string_view space, int64_t timeout_ns) {
  constexpr uint64_t kRequest = 1;
  int64_t deadline_ns = NowNs() + timeout_ns;
  std::string body;
  const CommandBody head{.what = what, .space_bytes = static_cast<uint8_t>(space.size())};
  body.append(reinterpret_cast<const char*>(&head), sizeof(head));
  body.append(space);
  connection.SendFrame(FrameType::kCommand, 0, kRequest, BytesOf(std::string_view(body)));
  for (;;) {
    connection.KeepAlive(NowNs());
    const int64_t until_ns = std::min(deadline_ns, NowNs() + kKeepAliveNs / 2);
    const Result<Frame> frame = connection.AwaitFrame(until_ns);
    if (!frame) {
      // It has nothing to say yet, or the connection is gone: then that is said again.
      if (NowNs() >= until_ns && until_ns < deadline_ns) continue;
      return std::unexpected(frame.error());
    }
    deadline_ns = NowNs() + timeout_ns;
    if (frame->header.type != FrameType::kCommandDone) {
      if (auto passed = CheckUnrelatedFrame(*frame); !passed) {
        return std::unexpected(passed.error());
      }
      continue;
    }
    if (frame->body.size() != sizeof(CommandDoneBody)) {
      return FailGrammar("a command's answer has another length");
    }
    return LoadAs<CommandDoneBody>(frame->body.data());
  }
}

Result<void> RequestCheckpoint(Connection& connection, int64_t timeout_ns) {
  const auto take = [](const IntrospectionBody&, std::span<const std::byte>) -> Result<void> {
    return {};
  };
  return Introspect(connection, IntrospectWhat::kCheckpoint, timeout_ns, take);
}

Result<void> HoldFiles(Connection& connection, bool hold, int64_t timeout_ns) {
  const auto take = [](const IntrospectionBody&, std::span<const std::byte>) -> Result<void> {
    return {};
  };
  return Introspect(connection, hold ? IntrospectWhat::kHold : IntrospectWhat::kRelease, timeout_ns,
                    take);
}

}  // namespace engram
