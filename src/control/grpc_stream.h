#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <optional>
#include <string>

#include <grpcpp/impl/codegen/proto_utils.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/status.h>

#include "src/control/grpc_call.h"
#include "src/control/session_stream.h"
#include "src/core/check.h"
#include "src/core/stream_network.h"

namespace engram {

// What the streams of gRPC have in common: one pipe, one write under way, one end.
//
// Work reads as the stream's life: answers that are there are written, then what the client asked
// is taken. gRPC's threads and the core of the pipes both call for it by Pump; whoever comes first
// does it, and does it again for those who came meanwhile.
//
// Lifecycle: the reactor derives from this; Begin; then Pump from OnReadDone, OnWriteDone, OnCancel
// and OnReady. It is deleted once both gRPC (OnDone) and the pipe (OnGone) have let go.
// Thread safety: Pump may be called by any thread; what it calls runs on one at a time.
class GrpcStream : public StreamClient {
 public:
  void OnReady() override { Pump(); }
  void OnGone() override { Leave(); }

 protected:
  explicit GrpcStream(CallContext* context) : context_(context) {}

  // Connects the pipe and begins; else ends with the reason.
  void Begin() {
    counted_ = context_->calls.Enter();
    if (!counted_) {
      end_ = grpc::Status(grpc::StatusCode::UNAVAILABLE,
                          std::string(DescribeRefusal(RefusalReason::kShuttingDown).text));
    } else if (end_) {
      // What was asked cannot be done.
    } else if (!context_->serves.load(std::memory_order_acquire)) {
      end_ = RecoveringStatus(*context_);
    } else {
      // The pipe's, given back by OnGone.
      references_.fetch_add(1, std::memory_order_relaxed);
      StreamPipe* pipe = context_->streams->Connect(this);
      if (pipe != nullptr) {
        stream_.emplace(pipe);
      } else {
        references_.fetch_sub(1, std::memory_order_relaxed);
        end_ = BusyStatus("connection_limit: too many streams are open",
                          context_->door.RetryAfterMs());
      }
    }
    Pump();
  }

  // gRPC's word that it is through.
  void Done() {
    // Nobody pumps: a stream that is done was finished, and Work does nothing after that.
    if (counted_) context_->calls.Leave();
    Leave();
  }

  void Cancel() {
    is_cancelled_.store(true, std::memory_order_release);
    Pump();
  }

  void Pump() {
    if (work_.fetch_add(1, std::memory_order_acq_rel) != 0) return;
    // Whoever sees the last of it done may delete the stream.
    references_.fetch_add(1, std::memory_order_relaxed);
    uint32_t seen = 1;
    for (;;) {
      Work();
      const uint32_t now = work_.fetch_sub(seen, std::memory_order_acq_rel);
      if (now == seen) break;
      seen = now - seen;
    }
    Leave();
  }

  void WriteDone(bool ok) {
    // Not written: the call is going, and OnCancel says so.
    if (!ok) is_cancelled_.store(true, std::memory_order_release);
    write_done_.store(true, std::memory_order_release);
    Pump();
  }

  // The stream ends once what is to be said was said.
  void End(grpc::Status status) {
    if (!end_) end_ = std::move(status);
  }
  bool is_ending() const { return end_.has_value(); }
  SessionStream& stream() { return *stream_; }
  CallContext* context() { return context_; }

  template <typename Response>
  void Say(const Response& response) {
    bool own_buffer = false;
    const auto written = grpc::SerializationTraits<Response>::Serialize(
        response, &responses_.emplace_back(), &own_buffer);
    CHECK(written.ok(), "a response of ours can be written");
  }

  // ---- The reactor's part ----
  // Makes responses of an event.
  virtual void Tell(const StreamEvent& event) = 0;
  // Takes the next of what the client asked. False where there is nothing, or no room for it now.
  virtual bool Take() = 0;
  virtual void BeginWrite(const grpc::ByteBuffer* response, grpc::WriteOptions options) = 0;
  virtual void BeginFinish(grpc::Status status) = 0;

 private:
  static constexpr size_t kResponsesAhead = 2;
  // What a client that does not read may still ask for: each request makes two responses at most
  // that no event stands for.
  static constexpr size_t kResponsesMost = 64;

  void Work() {
    if (is_finished_) return;
    if (is_cancelled_.load(std::memory_order_acquire)) {
      Finish({grpc::StatusCode::CANCELLED, "the client has gone"});
      return;
    }
    do {
      Answer();
    } while (!is_finished_ && !end_ && ((responses_.size() < kResponsesMost && Take()) || end_));
  }

  // Writes what there is. It is known whether more follows when a write begins: gRPC then waits
  // with sending.
  void Answer() {
    if (write_done_.exchange(false, std::memory_order_acquire)) {
      responses_.pop_front();
      is_writing_ = false;
    }
    while (stream_ && responses_.size() < kResponsesAhead + (is_writing_ ? 1 : 0)) {
      const auto event = stream_->Next();
      if (!event) break;
      Tell(*event);
    }
    if (is_writing_) return;
    if (responses_.empty()) {
      if (end_) Finish(*end_);
      return;
    }
    is_writing_ = true;
    grpc::WriteOptions options;
    if (responses_.size() > 1) options.set_buffer_hint();
    BeginWrite(&responses_.front(), options);
  }

  void Finish(grpc::Status status) {
    is_finished_ = true;
    if (stream_) stream_->Abandon();
    BeginFinish(std::move(status));
  }

  void Leave() {
    if (references_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }

  CallContext* const context_;
  bool counted_ = false;
  std::atomic<uint32_t> references_{1};
  std::atomic<uint32_t> work_{0};  // calls of Pump that Work has not answered
  std::atomic<bool> is_cancelled_{false};
  std::atomic<bool> write_done_{false};

  // Of whoever pumps.
  std::optional<SessionStream> stream_;
  std::deque<grpc::ByteBuffer> responses_;  // the first one is written, where is_writing_
  std::optional<grpc::Status> end_;
  bool is_writing_ = false;
  bool is_finished_ = false;
};

}  // namespace engram
