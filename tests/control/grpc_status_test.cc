#include "src/control/grpc_status.h"

#include <gtest/gtest.h>

#include "engram/v1/error_details.pb.h"

namespace engram {
namespace {

TEST(GrpcStatusTest, WhatPassesByItselfCarriesRetryInfo) {
  for (const RefusalReason reason :
       {RefusalReason::kQueueFull, RefusalReason::kSlotsExhausted, RefusalReason::kBacklogFull,
        RefusalReason::kMemoryFull, RefusalReason::kMergesFull}) {
    const grpc::Status status = RefusalStatus(reason, "full", 2'345);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
    EXPECT_EQ(status.error_message(), "full; call again in 2345 ms");
    v1::RpcStatus details;
    ASSERT_TRUE(details.ParseFromString(status.error_details()));
    EXPECT_EQ(details.code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
    EXPECT_EQ(details.message(), status.error_message());
    ASSERT_EQ(details.details_size(), 1);
    EXPECT_EQ(details.details(0).type_url(), "type.googleapis.com/google.rpc.RetryInfo");
    v1::RetryInfo retry;
    ASSERT_TRUE(retry.ParseFromString(details.details(0).value()));
    EXPECT_EQ(retry.retry_delay().seconds(), 2);
    EXPECT_EQ(retry.retry_delay().nanos(), 345'000'000);
  }
}

TEST(GrpcStatusTest, OtherRefusalsHaveTheirCode) {
  using grpc::StatusCode;
  for (const auto& [reason, code] : std::initializer_list<std::pair<RefusalReason, StatusCode>>{
           {RefusalReason::kWrongDimension, StatusCode::INVALID_ARGUMENT},
           {RefusalReason::kNotFinite, StatusCode::INVALID_ARGUMENT},
           {RefusalReason::kPayloadTooLarge, StatusCode::INVALID_ARGUMENT},
           {RefusalReason::kBadRecall, StatusCode::INVALID_ARGUMENT},
           {RefusalReason::kBadFilter, StatusCode::INVALID_ARGUMENT},
           {RefusalReason::kUnknownFilterKey, StatusCode::INVALID_ARGUMENT},
           {RefusalReason::kBadAttributes, StatusCode::INVALID_ARGUMENT},
           {RefusalReason::kDeadlinePassed, StatusCode::DEADLINE_EXCEEDED},
           {RefusalReason::kCancelled, StatusCode::CANCELLED},
           {RefusalReason::kUnknownSpace, StatusCode::NOT_FOUND},
           {RefusalReason::kSnapshotTooOld, StatusCode::OUT_OF_RANGE},
           {RefusalReason::kSpaceLimit, StatusCode::RESOURCE_EXHAUSTED},
           {RefusalReason::kShuttingDown, StatusCode::UNAVAILABLE},
           {RefusalReason::kRecovering, StatusCode::UNAVAILABLE},
           {RefusalReason::kFenced, StatusCode::ABORTED},
           {RefusalReason::kSessionExpired, StatusCode::NOT_FOUND},
           {RefusalReason::kSessionSpaceMismatch, StatusCode::INVALID_ARGUMENT},
           {RefusalReason::kBadCrc, StatusCode::INTERNAL}}) {
    const grpc::Status status = RefusalStatus(reason, "text", 5);
    EXPECT_EQ(status.error_code(), code) << DescribeRefusal(reason).name;
    EXPECT_EQ(status.error_message(), "text");
    EXPECT_EQ(status.error_details(), "");
  }
}

}  // namespace
}  // namespace engram
