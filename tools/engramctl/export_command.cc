// `engramctl export`: every live observation of a space, page by page.
//
// 1. Pages are scrolled from partition 0 on until there is no later one (dataplane/FORMAT.md), so
//    an observation that lives throughout comes at least once, whatever is written meanwhile.
// 2. One that moved to another partition comes again; its id was seen, and it is left out.
// 3. Rows are written aside, flushed, and named when all are there.

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "src/core/clock.h"
#include "tools/engramctl/commands.h"
#include "tools/engramctl/export_row.h"
#include "tools/engramctl/file_copy.h"

namespace engram {

namespace {

constexpr uint64_t kFailuresShown = 20;

// A file that is written as NAME.partial until Finish, or standard output.
class OutputFile {
 public:
  Result<void> Open(const std::string& path) {
    if (path.empty()) {
      file_ = stdout;
      return {};
    }
    path_ = path;
    std::error_code ignored;
    if (std::filesystem::is_directory(path, ignored)) {
      return Fail(ErrorCode::kInvalidArgument, path + " is a directory; name a file");
    }
    owned_.reset(std::fopen(AsidePath().c_str(), "wbe"));
    file_ = owned_.get();
    if (file_ == nullptr) return FailErrno(AsidePath() + ": cannot create it", errno);
    return {};
  }

  Result<void> Write(const void* bytes, size_t count) {
    if (std::fwrite(bytes, 1, count, file_) != count) return FailWrite();
    bytes_ += count;
    return {};
  }
  Result<void> WriteLine(std::string line) {
    line.push_back('\n');
    return Write(line.data(), line.size());
  }

  // All of it is on the disk.
  Result<void> Sync() {
    if (std::fflush(file_) != 0) return FailWrite();
    if (owned_ != nullptr && fsync(fileno(file_)) != 0) return FailWrite();
    return {};
  }
  // Under its name; after Sync.
  Result<void> Name() {
    if (owned_ == nullptr) return {};
    if (std::rename(AsidePath().c_str(), path_.c_str()) != 0) {
      return FailErrno(path_ + ": cannot give the file its name", errno);
    }
    owned_.reset();
    const std::string folder = std::filesystem::path(path_).parent_path().string();
    return SyncFolder(folder.empty() ? "." : folder);
  }

  // Takes away what was written and has no name yet.
  void Discard() {
    if (owned_ == nullptr) return;
    owned_.reset();
    std::remove(AsidePath().c_str());
  }

  std::string AsidePath() const { return path_ + ".partial"; }
  uint64_t bytes() const { return bytes_; }

 private:
  struct Closer {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  std::unexpected<Error> FailWrite() const {
    return FailErrno((path_.empty() ? "standard output" : AsidePath()) + ": cannot write it",
                     errno);
  }

  std::string path_;
  std::unique_ptr<std::FILE, Closer> owned_;
  std::FILE* file_ = nullptr;
  uint64_t bytes_ = 0;
};

class Exporter {
 public:
  Exporter(Connection* connection, const ExportOptions& options)
      : connection_(*connection), options_(options) {}

  // Where it fails, nothing is left behind.
  Result<void> Run() {
    Result<void> done = WriteAll();
    if (!done) {
      rows_.Discard();
      ids_.Discard();
    }
    return done;
  }

  uint64_t exported() const { return exported_; }
  uint64_t repeats() const { return repeats_; }
  uint64_t unreadable() const { return unreadable_; }
  const OutputFile& rows() const { return rows_; }

 private:
  Result<void> WriteAll() {
    const bool is_fvecs = options_.format == ExportFormat::kFvecs;
    if (auto opened = rows_.Open(options_.output); !opened) return opened;
    if (is_fvecs) {
      if (auto opened = ids_.Open(options_.output + ".ids"); !opened) return opened;
    }
    ScrollQuery query{.with_payload = !is_fvecs, .with_vector = true};
    for (bool ended = false; !ended;) {
      const Result<ScrollPage> page = Scroll(connection_, query, kAnswerTimeoutNs);
      if (!page) return std::unexpected(page.error());
      for (const RecallHit& hit : page->hits) {
        if (auto taken = Take(hit); !taken) return taken;
      }
      query.from = page->next;
      ended = page->ended;
    }
    if (auto synced = rows_.Sync(); !synced) return synced;
    if (is_fvecs) {
      if (auto synced = ids_.Sync(); !synced) return synced;
    }
    if (unreadable_ > 0) return {};
    if (is_fvecs) {
      if (auto named = ids_.Name(); !named) return named;
    }
    return rows_.Name();
  }

  Result<void> Take(const RecallHit& hit) {
    if (hit.payload_omitted || hit.vector.empty()) {
      if (++unreadable_ <= kFailuresShown) {
        std::fprintf(stderr,
                     "engramctl: %s: its record cannot be read; the daemon's log names the place\n",
                     Printable(hit.id).c_str());
      }
      return {};
    }
    if (!seen_.Add(hit.id)) {
      ++repeats_;
      return {};
    }
    ++exported_;
    if (options_.format == ExportFormat::kJsonl) return rows_.WriteLine(JsonLineOf(hit));
    const auto dimension = static_cast<int32_t>(hit.vector.size());
    if (auto wrote = rows_.Write(&dimension, sizeof(dimension)); !wrote) return wrote;
    if (auto wrote = rows_.Write(hit.vector.data(), hit.vector.size() * sizeof(float)); !wrote) {
      return wrote;
    }
    return ids_.WriteLine(IdLineOf(hit.id));
  }

  Connection& connection_;
  const ExportOptions& options_;
  OutputFile rows_;
  OutputFile ids_;
  SeenIds seen_;
  uint64_t exported_ = 0;
  uint64_t repeats_ = 0;
  uint64_t unreadable_ = 0;
};

}  // namespace

int RunExport(const ServerOptions& server, const ExportOptions& options) {
  if (options.format == ExportFormat::kFvecs && options.output.empty()) {
    std::fprintf(stderr,
                 "engramctl: an fvecs export is two files, the vectors and their ids: name the "
                 "first with --output\n");
    return kExitUsage;
  }
  auto connection = OpenReader(server, options.space);
  if (!connection) return connection.error();
  SystemClock clock;
  const int64_t start_ns = clock.MonotonicNs();
  Exporter exporter(&*connection, options);
  if (auto done = exporter.Run(); !done) return ReportError(done.error(), options.space);
  const double seconds =
      static_cast<double>(clock.MonotonicNs() - start_ns) / static_cast<double>(kNanosPerSecond);

  // Standard output may be the export itself.
  std::FILE* const report = options.output.empty() ? stderr : stdout;
  if (server.json) {
    const nlohmann::json line = {
        {"space", options.space},           {"observations", exporter.exported()},
        {"repeats", exporter.repeats()},    {"unreadable", exporter.unreadable()},
        {"bytes", exporter.rows().bytes()}, {"seconds", Rounded(seconds, 3)}};
    std::fprintf(report, "%s\n", line.dump().c_str());
  } else {
    std::fprintf(report, "%llu observations, %llu bytes in %.2f s\n",
                 static_cast<unsigned long long>(exporter.exported()),
                 static_cast<unsigned long long>(exporter.rows().bytes()), seconds);
  }
  if (exporter.unreadable() == 0) return kExitOk;
  std::fprintf(stderr, "engramctl: %llu observations could not be read and are missing%s%s\n",
               static_cast<unsigned long long>(exporter.unreadable()),
               options.output.empty() ? "" : "; the others are in ",
               options.output.empty() ? "" : exporter.rows().AsidePath().c_str());
  return kExitFailed;
}

}  // namespace engram
