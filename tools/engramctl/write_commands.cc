#include <algorithm>
#include <cstdio>
#include <memory>
#include <utility>
#include <vector>

#include "src/core/clock.h"
#include "tools/clients/cpp/feed.h"
#include "tools/engramctl/commands.h"
#include "tools/engramctl/feed_loop.h"
#include "tools/engramctl/table.h"
#include "tools/engramctl/text_encoder.h"
#include "tools/engramctl/text_file.h"
#include "tools/engramctl/vector_file.h"

namespace engram {

namespace {

// Sends `count` observations over one session and says what became of them.
int SendAll(const ServerOptions& server, const HelloOptions& hello, uint64_t count,
            ObservationSource source, const char* done_text) {
  auto connection = OpenConnection(server, hello);
  if (!connection) return connection.error();
  std::vector<std::unique_ptr<Feed>> feeds;
  feeds.push_back(std::make_unique<Feed>(*std::move(connection), std::move(source)));
  Feed& feed = *feeds.front();
  feed.Offer(count);
  const Result<void> done = DriveFeeds(feeds, [](int64_t) { return kNothingMore; });
  if (!done) {
    ReportError(done.error());
    Say(feed.counts().Describe(count));
    return kExitFailed;
  }
  for (const auto& [reason, refused] : feed.counts().refused) {
    std::fprintf(stderr, "engramctl: %s refused: %s\n", WithThousands(refused).c_str(),
                 reason.c_str());
  }
  if (server.json) {
    std::printf("{\"observations_acked\":%llu}\n",
                static_cast<unsigned long long>(feed.counts().acked));
  } else {
    std::printf("%s %s\n", WithThousands(feed.counts().acked).c_str(), done_text);
  }
  return feed.counts().acked == count ? kExitOk : kExitFailed;
}

}  // namespace

int RunEncode(const EncodeOptions& options) {
  const Result<TextEncoder> encoder = TextEncoder::Load(options.encoder);
  if (!encoder) return ReportError(encoder.error());
  const Result<std::vector<TextRow>> texts =
      ReadTexts(options.texts == "-" ? "/dev/stdin" : options.texts);
  if (!texts) return ReportError(texts.error());
  Result<FvecsWriter> writer = FvecsWriter::Create(options.out);
  if (!writer) return ReportError(writer.error());
  std::vector<float> vector(encoder->dimension());
  uint64_t wordless = 0;
  for (const TextRow& text : *texts) {
    encoder->Encode(text.text, vector);
    if (std::ranges::all_of(vector, [](float value) { return value == 0; })) ++wordless;
    if (auto appended = writer->Append(vector); !appended) return ReportError(appended.error());
  }
  if (auto finished = writer->Finish(); !finished) return ReportError(finished.error());
  if (wordless > 0) {
    std::fprintf(stderr,
                 "engramctl: %s texts have no word in them; a space with cosine refuses their zero "
                 "vectors\n",
                 WithThousands(wordless).c_str());
  }
  std::printf("%s texts as vectors of %u in %s\n", WithThousands(texts->size()).c_str(),
              encoder->dimension(), options.out.c_str());
  return kExitOk;
}

int RunPut(const ServerOptions& server, const PutOptions& options) {
  const Result<TextEncoder> encoder = TextEncoder::Load(options.encoder);
  if (!encoder) return ReportError(encoder.error());
  std::vector<float> vector(encoder->dimension());
  encoder->Encode(options.text, vector);
  HelloOptions hello;
  hello.space = options.space;
  hello.dimension = encoder->dimension();
  const auto source = [&](uint64_t, Observation* observation) {
    observation->id = options.id;
    observation->dimension = encoder->dimension();
    observation->vector = std::as_bytes(std::span<const float>(vector));
    observation->payload = options.text;
    observation->when_ns = SystemClock().WallNs();
  };
  return SendAll(server, hello, 1, source, "observation stored");
}

int RunDelete(const ServerOptions& server, const DeleteOptions& options) {
  HelloOptions hello;
  hello.space = options.space;
  const auto source = [&](uint64_t index, Observation* observation) {
    observation->op = ObservationOp::kDelete;
    observation->dtype = VectorDtype::kNone;
    observation->id = options.ids[index];
    observation->when_ns = SystemClock().WallNs();
  };
  return SendAll(server, hello, options.ids.size(), source, "deletions done");
}

}  // namespace engram
