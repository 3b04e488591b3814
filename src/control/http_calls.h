#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "src/control/gateway_call.h"
#include "src/control/json_request.h"
#include "src/control/memory_calls.h"
#include "src/control/space_order.h"
#include "src/core/clock.h"
#include "src/core/space_catalogue.h"

// The calls over HTTP: which there are, what they ask, and how they are answered. No transport
// here.

namespace engram {

enum class HttpMethod : uint8_t { kGet, kPost, kDelete, kOptions, kOther };

// A request as a transport has read it.
struct HttpRequest {
  HttpMethod method = HttpMethod::kGet;
  std::string_view target{};  // path and query
  std::string_view space{};   // the header x-memory-space; empty: there is none
  std::string_view body{};    // followed by JsonReader::kPaddingBytes
};

struct HttpAnswer {
  unsigned status = 200;
  std::string body{};
  std::string_view content_type = "application/json";
  uint32_t retry_after_ms = 0;  // 0: not said
  std::string_view allow{};     // with 405
};

// {"error":{"code","message","retry_after_ms"?}}
HttpAnswer HttpErrorAnswer(unsigned status, std::string_view code, std::string_view message,
                           uint32_t retry_after_ms = 0);
// The status that a refusal is told with.
unsigned HttpStatusOf(RefusalReason reason);

// Path and query of a target, decoded (RFC 3986).
struct HttpTarget {
  std::string path;  // as it came: a part of it is decoded when it is taken out
  std::vector<std::pair<std::string, std::string>> query;

  // Nothing where the target is none, or has a % without two digits behind it.
  static std::optional<HttpTarget> Read(std::string_view target);
  // The last value; empty where there is none.
  std::string_view Value(std::string_view name) const;
};
// Nothing where a % has no two digits behind it. `plus_is_space`: as in queries.
std::optional<std::string> PercentDecoded(std::string_view text, bool plus_is_space);

// Who waits for a call.
class HttpCaller {
 public:
  virtual ~HttpCaller() = default;
  // From the gateway core's thread, once.
  virtual void OnAnswered() = 0;
};

// One call that the gateway core answers. Filled by HttpCalls::Route.
class HttpCall : public GatewayCall {
 public:
  // What was asked, in turn, with its part of the answer.
  HttpAnswer Tell(int64_t now_ns);
  // Set before the call is submitted; it lives until it was told.
  HttpCaller* caller = nullptr;
  void Answered() override { caller->OnAnswered(); }

 private:
  friend class HttpCalls;
  enum class Kind : uint8_t { kRemember, kRecall, kForget, kSpaces };

  HttpAnswer TellRefusal() const;
  void TellRemembered(std::string* text) const;
  void TellRecalled(int64_t now_ns, std::string* text) const;
  void TellSpaces(std::string* text) const;

  Kind kind_ = Kind::kSpaces;
  JsonRequest request_;  // that the question's views point into
  std::vector<std::string> ids_;
  CallText text_;
  RecallLimits limits_;
  int64_t began_ns_ = 0;
};

struct HttpSurroundings {
  Clock* clock;
  const SpaceCatalogue* spaces;
  JsonReader* reader;
  std::function<std::string()> metrics;     // empty: there are none
  std::function<std::string()> recovering;  // how far it is
};

// A reference of its own; see GatewayCall.
using HttpCallPtr = std::unique_ptr<HttpCall, void (*)(HttpCall*)>;
// What a request comes to: an answer, a question for the gateway core, or an order.
using HttpPlan = std::variant<HttpAnswer, HttpCallPtr, std::unique_ptr<SpaceOrder>>;

// Thread safety: one thread's alone.
class HttpCalls {
 public:
  explicit HttpCalls(HttpSurroundings surroundings) : around_(std::move(surroundings)) {}

  // `serves`: what was recovered is there.
  HttpPlan Route(const HttpRequest& request, bool serves);
  static HttpAnswer TellOrder(const SpaceOrder& order, const SpaceOutcome& outcome);

 private:
  HttpAnswer Health(std::string_view path, bool serves) const;
  HttpAnswer Recovering() const;
  HttpPlan Remember(const HttpRequest& request, const HttpTarget& target);
  HttpPlan Recall(const HttpRequest& request, const HttpTarget& target);
  HttpPlan Forget(const HttpRequest& request, const HttpTarget& target, std::string_view id);
  HttpPlan Spaces();
  HttpPlan CreateSpace(const HttpRequest& request);
  HttpPlan DropSpace(std::string_view id);
  Asked AskQuery(const HttpTarget& target, HttpCall* call);
  Asked AskSpace(const HttpRequest& request, const HttpTarget& target, HttpCall* call) const;
  std::optional<HttpAnswer> ReadBody(const HttpRequest& request, JsonReader::Form form,
                                     JsonRequest* read);

  const HttpSurroundings around_;
};

}  // namespace engram
