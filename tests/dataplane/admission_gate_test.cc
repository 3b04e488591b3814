#include "dataplane/admission_gate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>

#include "src/core/attributes.h"
#include "tests/dataplane/wire.h"

namespace engram {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A slot of exactly the size that the gate asks for.
class Slot {
 public:
  explicit Slot(size_t bytes)
      : bytes_(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{64}))) {
    std::memset(bytes_, 0xAB, bytes);
  }
  ~Slot() { ::operator delete(bytes_, std::align_val_t{64}); }
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;
  std::byte* get() { return bytes_; }
  const ObserveRequest& observe() const { return *reinterpret_cast<const ObserveRequest*>(bytes_); }
  const RecallRequest& recall() const { return *reinterpret_cast<const RecallRequest*>(bytes_); }
  WireBytes Body(size_t bytes) const {
    return {bytes_ + kRequestBodyOffset, bytes_ + kRequestBodyOffset + bytes};
  }

 private:
  std::byte* bytes_;
};

struct Admission {
  RefusalReason reason = RefusalReason::kNone;
  ObserveRequest request;
  WireBytes body;
};

// Record to wire bytes, through the decoder, into a slot.
Admission Admit(const WireRecord& record, const SpaceRules& rules, uint8_t payload_kind = 0) {
  const WireBytes body = ObserveBodyOf(std::span(&record, 1), payload_kind);
  ObserveReader reader;
  EXPECT_EQ(ObserveReader::Open(body, &reader), RefusalReason::kNone);
  const ObservationView view = reader.Next();
  Slot slot(SlotBytesFor(view));
  Admission admission;
  admission.reason = AdmitObservation(view, rules, slot.get());
  admission.request = slot.observe();
  if (admission.reason == RefusalReason::kNone) {
    admission.body = slot.Body(SlotBytesFor(view) - kRequestBodyOffset);
  } else {
    EXPECT_EQ(admission.request.header.kind, RequestKind::kObserve);
    EXPECT_EQ(admission.request.op, ObservationOp::kSkip);
    EXPECT_EQ(admission.request.skip_reason, admission.reason);
  }
  return admission;
}

RefusalReason AdmitQuery(const WireRecall& recall, const SpaceRules& rules) {
  const uint16_t flags = recall.filter.empty() ? 0 : 8;
  const WireBytes body = RecallBodyOf(recall, flags);
  RecallView view;
  EXPECT_EQ(DecodeRecall(body, flags, &view), RefusalReason::kNone);
  Slot slot(SlotBytesFor(view));
  return AdmitRecall(view, rules, slot.get());
}

WireBytes BytesFrom(std::span<const uint8_t> values) {
  const auto bytes = std::as_bytes(values);
  return {bytes.begin(), bytes.end()};
}

TEST(AdmissionGateTest, SlotHoldsWhatCame) {
  const std::array<float, 3> vector{1, -2, 0.5F};
  WireRecord record = F32Record("the-id", vector, "the-payload");
  record.when_ns = 123'456'789;
  record.confidence = 0.75F;
  const Admission admission = Admit(record, {.metric = Metric::kCosine, .dimension = 3});
  ASSERT_EQ(admission.reason, RefusalReason::kNone);
  const ObserveRequest& request = admission.request;
  EXPECT_EQ(request.header.kind, RequestKind::kObserve);
  EXPECT_EQ(request.op, ObservationOp::kUpsert);
  EXPECT_EQ(request.dtype, VectorDtype::kF32);
  EXPECT_EQ(request.skip_reason, RefusalReason::kNone);
  EXPECT_EQ(request.dimension, 3);
  EXPECT_EQ(request.id_bytes, 6);
  EXPECT_EQ(request.payload_bytes, 11u);
  EXPECT_EQ(request.when_ns, 123'456'789);
  EXPECT_EQ(request.confidence, 0.75F);
  const WireBytes expected =
      WireWriter().Raw(record.vector).Text("the-id").Text("the-payload").Take();
  EXPECT_EQ(admission.body, expected);
}

TEST(AdmissionGateTest, ThePayloadKindGoesIntoTheSlot) {
  const std::array<float, 1> vector{1};
  for (const uint8_t kind : {0, 1, 2}) {
    const Admission admission = Admit(F32Record("id", vector, "payload"), {}, kind);
    EXPECT_EQ(static_cast<uint8_t>(admission.request.payload_kind), kind);
  }
}

TEST(AdmissionGateTest, AttributesLieBetweenIdAndPayload) {
  const std::array<float, 1> vector{1};
  WireRecord record = F32Record("id", vector, "payload");
  ASSERT_TRUE(AppendAttribute("source", "docs", &record.attributes));
  ASSERT_TRUE(AppendAttribute(kTagKey, "red", &record.attributes));
  const Admission admission = Admit(record, {});
  ASSERT_EQ(admission.reason, RefusalReason::kNone);
  EXPECT_EQ(admission.request.attribute_bytes, record.attributes.size());
  EXPECT_EQ(admission.request.payload_bytes, 7u);
  EXPECT_EQ(
      admission.body,
      WireWriter().Raw(record.vector).Text("id").Text(record.attributes).Text("payload").Take());
}

TEST(AdmissionGateTest, UnsoundAttributesMayNotEnter) {
  const std::array<float, 2> vector{1, kNan};
  WireRecord record = F32Record("id", std::span(vector).first(1), "payload");
  record.attributes = "no attributes";
  EXPECT_EQ(Admit(record, {}).reason, RefusalReason::kBadAttributes);
  EXPECT_EQ(Admit(record, {}).request.attribute_bytes, 0);
  // The vector comes first.
  record = F32Record("id", vector, "payload");
  record.attributes = "no attributes";
  EXPECT_EQ(Admit(record, {}).reason, RefusalReason::kNotFinite);
}

TEST(AdmissionGateTest, DeleteNeedsNoVector) {
  const Admission admission =
      Admit(DeleteRecord("gone"), {.metric = Metric::kCosine, .dimension = 768});
  ASSERT_EQ(admission.reason, RefusalReason::kNone);
  EXPECT_EQ(admission.request.op, ObservationOp::kDelete);
  EXPECT_EQ(admission.request.id_bytes, 4);
  EXPECT_EQ(WireText(admission.body), "gone");
}

// They come from the gateway; no frame carries them.
TEST(AdmissionGateTest, SuppressAndRestoreNeedNoVectorEither) {
  for (const ObservationOp op : {ObservationOp::kSuppress, ObservationOp::kRestore}) {
    const std::string id = "hidden";
    ObservationView view;
    view.op = op;
    view.confidence = 1;
    view.id = id;
    Slot slot(SlotBytesFor(view));
    ASSERT_EQ(AdmitObservation(view, {.metric = Metric::kCosine, .dimension = 768}, slot.get()),
              RefusalReason::kNone);
    EXPECT_EQ(slot.observe().op, op);
    EXPECT_EQ(slot.observe().id_bytes, 6);
    EXPECT_EQ(std::memcmp(slot.get() + kRequestBodyOffset, id.data(), id.size()), 0);
  }
}

TEST(AdmissionGateTest, NotFiniteIsFoundAtEachPlace) {
  for (const size_t dimension : {1, 3, 16, 17, 64, 100}) {
    for (size_t place = 0; place < dimension; ++place) {
      for (const float bad : {kNan, kInfinity, -kInfinity}) {
        std::vector<float> vector(dimension, 0.5F);
        vector[place] = bad;
        EXPECT_EQ(Admit(F32Record("x", vector), {.metric = Metric::kL2}).reason,
                  RefusalReason::kNotFinite);
        EXPECT_EQ(AdmitQuery(F32Recall(vector), {.metric = Metric::kL2}),
                  RefusalReason::kNotFinite);
      }
    }
  }
  // f16 and bf16: infinity, and NaN of either sign.
  struct HalfCase {
    uint8_t dtype;
    std::array<uint8_t, 2> bad;
  };
  for (const HalfCase& c : {HalfCase{2, {0x00, 0x7C}}, HalfCase{2, {0x01, 0xFC}},
                            HalfCase{3, {0x80, 0x7F}}, HalfCase{3, {0xC0, 0xFF}}}) {
    for (size_t place = 0; place < 40; ++place) {
      std::vector<uint8_t> halves(80, 0x3C);
      halves[2 * place] = c.bad[0];
      halves[2 * place + 1] = c.bad[1];
      EXPECT_EQ(Admit({.dtype = c.dtype,
                       .dimension = 40,
                       .vector = BytesFrom(halves),
                       .id = "x",
                       .payload = {}},
                      {.metric = Metric::kL2})
                    .reason,
                RefusalReason::kNotFinite)
          << int{c.dtype} << " " << place;
    }
  }
}

TEST(AdmissionGateTest, ZeroVectorHasNoCosine) {
  for (const size_t dimension : {1, 7, 64, 4096}) {
    std::vector<float> zeros(dimension, 0.0F);
    zeros[dimension / 2] = -0.0F;
    const WireRecord record = F32Record("x", zeros);
    EXPECT_EQ(Admit(record, {.metric = Metric::kCosine}).reason, RefusalReason::kZeroVector);
    EXPECT_EQ(Admit(record, {.metric = Metric::kInnerProduct}).reason, RefusalReason::kNone);
    EXPECT_EQ(Admit(record, {.metric = Metric::kL2}).reason, RefusalReason::kNone);
    EXPECT_EQ(AdmitQuery(F32Recall(zeros), {.metric = Metric::kCosine}),
              RefusalReason::kZeroVector);
    EXPECT_EQ(AdmitQuery(F32Recall(zeros), {.metric = Metric::kL2}), RefusalReason::kNone);
    for (const size_t place : {size_t{0}, dimension - 1}) {
      std::vector<float> almost(dimension, 0.0F);
      almost[place] = 1e-20F;
      EXPECT_EQ(Admit(F32Record("x", almost), {.metric = Metric::kCosine}).reason,
                RefusalReason::kNone);
    }
  }
  EXPECT_EQ(Admit({.dtype = 4, .dimension = 9, .vector = WireBytes(9), .id = "x", .payload = {}},
                  {.metric = Metric::kCosine})
                .reason,
            RefusalReason::kZeroVector);
}

TEST(AdmissionGateTest, ConfidenceIsWithinZeroAndOne) {
  const std::array<float, 1> vector{1};
  for (const float bad : {-0.001F, 1.001F, kNan, kInfinity, -kInfinity}) {
    WireRecord record = F32Record("x", vector);
    record.confidence = bad;
    EXPECT_EQ(Admit(record, {}).reason, RefusalReason::kBadConfidence) << bad;
    WireRecord gone = DeleteRecord("x");
    gone.confidence = bad;
    EXPECT_EQ(Admit(gone, {}).reason, RefusalReason::kBadConfidence) << bad;
  }
  for (const float good : {0.0F, -0.0F, 0.5F, 1.0F}) {
    WireRecord record = F32Record("x", vector);
    record.confidence = good;
    EXPECT_EQ(Admit(record, {}).reason, RefusalReason::kNone) << good;
  }
}

TEST(AdmissionGateTest, ScaleCountsForInt8Only) {
  const std::array<uint8_t, 2> values{0x80, 0x7F};
  const std::array<float, 2> vector{1, 1};
  for (const float bad :
       {0.0F, -1.0F, kNan, kInfinity, -kInfinity, std::numeric_limits<float>::max()}) {
    WireRecord int8{.dtype = 4,
                    .dimension = 2,
                    .scale = bad,
                    .vector = BytesFrom(values),
                    .id = "x",
                    .payload = {}};
    EXPECT_EQ(Admit(int8, {.metric = Metric::kCosine}).reason, RefusalReason::kBadScale) << bad;
    WireRecall query{.dimension = 2, .dtype = 4, .scale = bad, .vector = BytesFrom(values)};
    EXPECT_EQ(AdmitQuery(query, {.metric = Metric::kCosine}), RefusalReason::kBadScale) << bad;
    WireRecord f32 = F32Record("x", vector);
    f32.scale = bad;
    EXPECT_EQ(Admit(f32, {.metric = Metric::kCosine}).reason, RefusalReason::kNone) << bad;
    WireRecall f32_query = F32Recall(vector);
    f32_query.scale = bad;
    EXPECT_EQ(AdmitQuery(f32_query, {.metric = Metric::kCosine}), RefusalReason::kNone) << bad;
  }
  WireRecord int8{.dtype = 4,
                  .dimension = 2,
                  .scale = 0.25F,
                  .vector = BytesFrom(values),
                  .id = "x",
                  .payload = {}};
  const Admission admission = Admit(int8, {.metric = Metric::kCosine});
  EXPECT_EQ(admission.reason, RefusalReason::kNone);
  EXPECT_EQ(admission.request.scale, 0.25F);
}

TEST(AdmissionGateTest, DimensionIsTheSpaces) {
  const std::array<float, 3> vector{1, 2, 3};
  const Admission wrong = Admit(F32Record("x", vector), {.dimension = 4});
  EXPECT_EQ(wrong.reason, RefusalReason::kWrongDimension);
  EXPECT_EQ(wrong.request.dimension, 3);  // for the nak's text
  EXPECT_EQ(Admit(F32Record("x", vector), {.dimension = 3}).reason, RefusalReason::kNone);
  EXPECT_EQ(Admit(F32Record("x", vector), {.dimension = 0}).reason, RefusalReason::kNone);
  EXPECT_EQ(AdmitQuery(F32Recall(vector), {.dimension = 4}), RefusalReason::kWrongDimension);
  EXPECT_EQ(AdmitQuery(F32Recall(vector), {.dimension = 3}), RefusalReason::kNone);
}

TEST(AdmissionGateTest, ADecodersFaultBecomesASkipInTheSmallestSlot) {
  WireBytes body = ObserveBodyOf(std::vector<WireRecord>{DeleteRecord("abc")});
  SetWireNumber(body, 4 + 4, 1, 99);  // op
  ObserveReader reader;
  ASSERT_EQ(ObserveReader::Open(body, &reader), RefusalReason::kNone);
  const ObservationView view = reader.Next();
  EXPECT_EQ(SlotBytesFor(view), kRequestBodyOffset);
  Slot slot(SlotBytesFor(view));
  EXPECT_EQ(AdmitObservation(view, {}, slot.get()), RefusalReason::kBadOperation);
  EXPECT_EQ(slot.observe().op, ObservationOp::kSkip);
  EXPECT_EQ(slot.observe().skip_reason, RefusalReason::kBadOperation);
}

TEST(AdmissionGateTest, SmallestAndGreatestFit) {
  const std::array<float, 1> one{1};
  const Admission smallest = Admit(F32Record("x", one), {.metric = Metric::kCosine});
  EXPECT_EQ(smallest.reason, RefusalReason::kNone);
  EXPECT_EQ(smallest.body.size(), 5u);

  std::vector<float> vector(4096);
  for (size_t i = 0; i < vector.size(); ++i) vector[i] = static_cast<float>(i) - 2000;
  WireRecord record = F32Record(std::string(256, 'i'), vector, std::string(65'536, 'p'));
  while (AppendAttribute("k", std::string(255, 'v'), &record.attributes)) {
  }
  const size_t left = kMaxAttributesBytes - record.attributes.size();
  ASSERT_TRUE(AppendAttribute("k", std::string(left - 3, 'v'), &record.attributes));
  const WireBytes body = ObserveBodyOf(std::span(&record, 1));
  ObserveReader reader;
  ASSERT_EQ(ObserveReader::Open(body, &reader), RefusalReason::kNone);
  const ObservationView view = reader.Next();
  EXPECT_LE(SlotBytesFor(view), kMaxSlotBytes);
  EXPECT_EQ(SlotBytesFor(view), kRequestBodyOffset + 16'384 + 256 + 4'096 + 65'536);
  EXPECT_EQ(kMaxSlotBytes % 64, 0u);
  const Admission greatest = Admit(record, {.metric = Metric::kCosine, .dimension = 4096});
  ASSERT_EQ(greatest.reason, RefusalReason::kNone);
  EXPECT_EQ(greatest.body, WireWriter()
                               .Raw(record.vector)
                               .Text(record.id)
                               .Text(record.attributes)
                               .Text(record.payload)
                               .Take());
}

TEST(AdmissionGateTest, RecallSlotHoldsWhatCame) {
  const std::array<float, 3> vector{3, 2, 1};
  WireRecall wire = F32Recall(vector);
  wire.k = 7;
  wire.ef = 99;
  FilterWriter filter;
  filter.SetTimes({.end_ns = 5});
  wire.filter = filter.Bytes();
  const uint16_t flags = 8;
  const WireBytes body = RecallBodyOf(wire, flags);
  RecallView view;
  ASSERT_EQ(DecodeRecall(body, flags, &view), RefusalReason::kNone);
  Slot slot(SlotBytesFor(view));
  ASSERT_EQ(AdmitRecall(view, {.metric = Metric::kCosine, .dimension = 3}, slot.get()),
            RefusalReason::kNone);
  EXPECT_EQ(slot.recall().header.kind, RequestKind::kRecall);
  EXPECT_EQ(slot.recall().dtype, VectorDtype::kF32);
  EXPECT_EQ(slot.recall().dimension, 3);
  EXPECT_EQ(slot.recall().k, 7u);
  EXPECT_EQ(slot.recall().ef, 99u);
  EXPECT_EQ(slot.recall().scale, 1.0F);
  EXPECT_EQ(slot.recall().filter_bytes, 16);
  EXPECT_EQ(SlotBytesFor(view), kRequestBodyOffset + 12 + 16);
  EXPECT_EQ(slot.Body(28), WireWriter().Raw(wire.vector).Text(wire.filter).Take());
}

}  // namespace
}  // namespace engram
