#include "dataplane/decoder.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <span>

#include "src/core/attributes.h"
#include "tests/dataplane/wire.h"

namespace engram {
namespace {

// The bytes in memory of exactly their size, so that ASan sees a read beyond them.
class Exact {
 public:
  explicit Exact(std::span<const std::byte> bytes)
      : size_(bytes.size()), bytes_(std::make_unique<std::byte[]>(bytes.size())) {
    if (size_ > 0) std::memcpy(bytes_.get(), bytes.data(), size_);
  }
  std::span<const std::byte> get() const { return {bytes_.get(), size_}; }

 private:
  size_t size_;
  std::unique_ptr<std::byte[]> bytes_;
};

WireRecord Example(size_t id_bytes = 3, size_t payload_bytes = 5) {
  const std::array<float, 2> vector{1, 2};
  return F32Record(std::string(id_bytes, 'i'), vector, std::string(payload_bytes, 'p'));
}
RefusalReason OpenBody(std::span<const std::byte> body) {
  const Exact exact(body);
  ObserveReader reader;
  return ObserveReader::Open(exact.get(), &reader);
}
// Offsets within a record, as FORMAT.md has them.
constexpr size_t kRecordBytesAt = 0;
constexpr size_t kOpAt = 4;
constexpr size_t kDtypeAt = 5;
constexpr size_t kDimensionAt = 6;
constexpr size_t kIdBytesAt = 8;
constexpr size_t kAttributeBytesAt = 10;
constexpr size_t kPayloadBytesAt = 12;
constexpr size_t kBodyStart = 4;

// The fault of the first record, with `bytes` bytes at `offset` set; the body must open.
RefusalReason FaultWith(size_t offset, size_t bytes, uint64_t value, const WireRecord& record) {
  const std::vector<WireRecord> records{record, Example()};
  WireBytes body = ObserveBodyOf(records);
  SetWireNumber(body, kBodyStart + offset, bytes, value);
  const Exact exact(body);
  ObserveReader reader;
  if (ObserveReader::Open(exact.get(), &reader) != RefusalReason::kNone) {
    return RefusalReason::kBadFrame;
  }
  const RefusalReason fault = reader.Next().fault;
  // A faulty record does not disturb the next one.
  const ObservationView second = reader.Next();
  EXPECT_EQ(second.fault, RefusalReason::kNone);
  EXPECT_EQ(second.id, "iii");
  EXPECT_EQ(WireText(second.payload), "ppppp");
  return fault;
}

TEST(ObserveReaderTest, ReadsWhatWasWritten) {
  const std::array<float, 3> vector{1, -2, 3};
  WireRecord upsert = F32Record("first", vector, "payload");
  upsert.attributes = "attributes";  // the decoder does not look into them
  upsert.confidence = 0.5F;
  upsert.when_ns = -77;
  const std::vector<WireRecord> records{upsert, DeleteRecord("second")};
  const Exact body(ObserveBodyOf(records));
  ObserveReader reader;
  ASSERT_EQ(ObserveReader::Open(body.get(), &reader), RefusalReason::kNone);
  EXPECT_EQ(reader.remaining(), 2);
  const ObservationView first = reader.Next();
  EXPECT_EQ(first.op, ObservationOp::kUpsert);
  EXPECT_EQ(first.dtype, VectorDtype::kF32);
  EXPECT_EQ(first.dimension, 3);
  EXPECT_EQ(first.confidence, 0.5F);
  EXPECT_EQ(first.when_ns, -77);
  EXPECT_EQ(first.id, "first");
  EXPECT_EQ(WireText(first.attributes), "attributes");
  EXPECT_EQ(WireText(first.payload), "payload");
  EXPECT_TRUE(std::ranges::equal(std::span(first.vector, sizeof(vector)),
                                 std::as_bytes(std::span(vector))));
  const ObservationView second = reader.Next();
  EXPECT_EQ(second.op, ObservationOp::kDelete);
  EXPECT_EQ(second.id, "second");
  EXPECT_TRUE(second.attributes.empty());
  EXPECT_TRUE(second.payload.empty());
  EXPECT_EQ(second.fault, RefusalReason::kNone);
  EXPECT_EQ(reader.remaining(), 0);
}

TEST(ObserveReaderTest, RandomRecordsComeBack) {
  std::mt19937_64 random(1);
  for (int round = 0; round < 300; ++round) {
    std::vector<WireRecord> records(1 + random() % 20);
    for (WireRecord& record : records) {
      record.id.assign(1 + random() % (random() % 4 == 0 ? 256 : 20), '\0');
      for (char& c : record.id) c = static_cast<char>(random());
      record.when_ns = static_cast<int64_t>(random());
      record.confidence = static_cast<float>(random() % 1000) / 1000;
      record.scale = static_cast<float>(1 + random() % 1000) / 500;
      if (random() % 5 == 0) {
        record.op = 2;
        record.dtype = 0;
        continue;
      }
      record.dtype = static_cast<uint8_t>(1 + random() % 4);
      record.dimension = static_cast<uint16_t>(1 + random() % (random() % 8 == 0 ? 4096 : 16));
      const std::array<size_t, 5> element_bytes{0, 4, 2, 2, 1};
      record.vector.resize(record.dimension * element_bytes[record.dtype]);
      for (std::byte& byte : record.vector) byte = static_cast<std::byte>(random());
      record.payload.assign(random() % 3 == 0 ? 0 : random() % 50, '\0');
      for (char& c : record.payload) c = static_cast<char>(random());
      record.attributes.assign(random() % 2 == 0 ? 0 : random() % 100, '\0');
      for (char& c : record.attributes) c = static_cast<char>(random());
    }
    const Exact body(ObserveBodyOf(records));
    ObserveReader reader;
    ASSERT_EQ(ObserveReader::Open(body.get(), &reader), RefusalReason::kNone);
    for (const WireRecord& record : records) {
      ASSERT_GT(reader.remaining(), 0);
      const ObservationView view = reader.Next();
      ASSERT_EQ(view.fault, RefusalReason::kNone);
      EXPECT_EQ(static_cast<uint8_t>(view.op), record.op);
      EXPECT_EQ(static_cast<uint8_t>(view.dtype), record.dtype);
      EXPECT_EQ(view.dimension, record.dimension);
      EXPECT_EQ(view.scale, record.scale);
      EXPECT_EQ(view.confidence, record.confidence);
      EXPECT_EQ(view.when_ns, record.when_ns);
      EXPECT_EQ(view.id, record.id);
      EXPECT_EQ(WireText(view.attributes), record.attributes);
      EXPECT_EQ(WireText(view.payload), record.payload);
      EXPECT_EQ(WireText(std::span(view.vector, record.vector.size())), WireText(record.vector));
    }
    EXPECT_EQ(reader.remaining(), 0);
  }
}

TEST(ObserveReaderTest, AnyCutIsABadFrame) {
  const WireBytes body = ObserveBodyOf(std::vector<WireRecord>{Example(), Example(8, 0)});
  ASSERT_EQ(OpenBody(body), RefusalReason::kNone);
  for (size_t bytes = 0; bytes < body.size(); ++bytes) {
    EXPECT_EQ(OpenBody(std::span(body).first(bytes)), RefusalReason::kBadFrame) << bytes;
  }
}

TEST(ObserveReaderTest, TrailingBytesAreABadFrame) {
  for (const size_t more : {1, 7, 8, 31, 32, 64}) {
    WireBytes body = ObserveBodyOf(std::vector<WireRecord>{Example()});
    body.resize(body.size() + more);
    EXPECT_EQ(OpenBody(body), RefusalReason::kBadFrame) << more;
  }
}

TEST(ObserveReaderTest, CountsMustMatch) {
  WireBytes body = ObserveBodyOf(std::vector<WireRecord>{Example(), Example()});
  for (const uint64_t count : {0, 1, 3, 65535}) {
    SetWireNumber(body, 0, 2, count);
    EXPECT_EQ(OpenBody(body), RefusalReason::kBadFrame) << count;
  }
  EXPECT_EQ(OpenBody(WireWriter().U16(0).U16(0).Take()), RefusalReason::kBadFrame);
}

TEST(ObserveReaderTest, ThePayloadKindIsEveryRecords) {
  const std::vector<WireRecord> records{Example(), DeleteRecord("gone"), Example(8, 0)};
  for (const uint8_t kind : {0, 1, 2}) {
    const Exact body(ObserveBodyOf(records, kind));
    ObserveReader reader;
    ASSERT_EQ(ObserveReader::Open(body.get(), &reader), RefusalReason::kNone);
    while (reader.remaining() > 0) {
      EXPECT_EQ(static_cast<uint8_t>(reader.Next().payload_kind), kind);
    }
  }
  for (const uint8_t kind : {3, 4, 128, 255}) {
    EXPECT_EQ(OpenBody(ObserveBodyOf(records, kind)), RefusalReason::kBadFrame);
  }
}

TEST(ObserveReaderTest, RecordBytesMustFit) {
  const WireBytes sound = ObserveBodyOf(std::vector<WireRecord>{Example(), Example()});
  const uint64_t right = WireNumber(sound, kBodyStart, 4);
  for (const uint64_t bytes :
       {uint64_t{0}, uint64_t{1}, uint64_t{31}, uint64_t{32}, right - 8, right - 1, right + 1,
        right + 8, 2 * right, 2 * right + 1, uint64_t{0x7FFFFFFF}, uint64_t{0x80000000},
        uint64_t{0xFFFFFFFF}, uint64_t{0xFFFFFFF8}}) {
    WireBytes body = sound;
    SetWireNumber(body, kBodyStart + kRecordBytesAt, 4, bytes);
    EXPECT_EQ(OpenBody(body), RefusalReason::kBadFrame) << bytes;
    // Also where the numbers are wrong, so that the length is all that is left to skip by.
    if (bytes != right && bytes != right + 8 && bytes != right + 1 && bytes != 2 * right) {
      SetWireNumber(body, kBodyStart + kOpAt, 1, 99);
      EXPECT_EQ(OpenBody(body), RefusalReason::kBadFrame) << bytes;
    }
    // The last record, too: nothing of the frame is taken.
    body = sound;
    SetWireNumber(body, kBodyStart + right, 4, bytes);
    EXPECT_EQ(OpenBody(body), RefusalReason::kBadFrame) << bytes;
  }
}

TEST(ObserveReaderTest, PartLengthsMustFitTheRecord) {
  // Example(): 32 + 8 + 3 + 5 = 48 bytes, no padding; nor with 8 bytes of attributes.
  struct Field {
    size_t offset;
    size_t bytes;
    uint64_t right;
  };
  for (const Field& field : {Field{kDimensionAt, 2, 2}, Field{kIdBytesAt, 2, 3},
                             Field{kAttributeBytesAt, 2, 8}, Field{kPayloadBytesAt, 4, 5}}) {
    WireRecord record = Example();
    record.attributes.assign(8, 'a');
    WireBytes body = ObserveBodyOf(std::vector<WireRecord>{record});
    for (const uint64_t wrong : {field.right - 1, field.right + 1, field.right + 8}) {
      SetWireNumber(body, kBodyStart + field.offset, field.bytes, wrong);
      // A little less only becomes padding; anything more does not fit.
      const bool padding_hides_it = wrong < field.right;
      EXPECT_EQ(OpenBody(body), padding_hides_it ? RefusalReason::kNone : RefusalReason::kBadFrame)
          << field.offset << " " << wrong;
    }
  }
}

TEST(ObserveReaderTest, EachFaultIsNamedAndSkipped) {
  const WireRecord record = Example();
  EXPECT_EQ(FaultWith(kOpAt, 1, 1, record), RefusalReason::kNone);
  for (const uint64_t op : {0, 4, 5, 6, 255}) {  // 4 and 5 are the appliance's own
    EXPECT_EQ(FaultWith(kOpAt, 1, op, record), RefusalReason::kBadOperation) << op;
  }
  EXPECT_EQ(FaultWith(kOpAt, 1, 3, record), RefusalReason::kBadField);
  for (const uint64_t dtype : {0, 5, 255}) {
    EXPECT_EQ(FaultWith(kDtypeAt, 1, dtype, record), RefusalReason::kBadDtype) << dtype;
  }
  for (const uint64_t dimension : {0, 4097, 65535}) {
    EXPECT_EQ(FaultWith(kDimensionAt, 2, dimension, record), RefusalReason::kWrongDimension);
  }
  for (const uint64_t id_bytes : {0, 257, 65535}) {
    EXPECT_EQ(FaultWith(kIdBytesAt, 2, id_bytes, record), RefusalReason::kBadId) << id_bytes;
  }
  for (const uint64_t payload : {65'537ull, 0x7FFFFFFFull, 0xFFFFFFFFull}) {
    EXPECT_EQ(FaultWith(kPayloadBytesAt, 4, payload, record), RefusalReason::kPayloadTooLarge);
  }
  for (const uint64_t attributes : {4'097, 65'535}) {
    EXPECT_EQ(FaultWith(kAttributeBytesAt, 2, attributes, record), RefusalReason::kBadAttributes);
  }
  const WireRecord gone = DeleteRecord("eightid8");
  EXPECT_EQ(FaultWith(kAttributeBytesAt, 2, 1, gone), RefusalReason::kBadAttributes);
  EXPECT_EQ(FaultWith(kDtypeAt, 1, 1, gone), RefusalReason::kBadDtype);
  EXPECT_EQ(FaultWith(kDimensionAt, 2, 1, gone), RefusalReason::kWrongDimension);
  EXPECT_EQ(FaultWith(kPayloadBytesAt, 4, 1, gone), RefusalReason::kPayloadTooLarge);
  EXPECT_EQ(FaultWith(kIdBytesAt, 2, 0, gone), RefusalReason::kBadId);
}

TEST(ObserveReaderTest, AFaultyViewIsEmpty) {
  WireBytes body = ObserveBodyOf(std::vector<WireRecord>{Example()});
  SetWireNumber(body, kBodyStart + kPayloadBytesAt, 4, 0xFFFFFFFF);
  const Exact exact(body);
  ObserveReader reader;
  ASSERT_EQ(ObserveReader::Open(exact.get(), &reader), RefusalReason::kNone);
  const ObservationView view = reader.Next();
  EXPECT_EQ(view.vector, nullptr);
  EXPECT_TRUE(view.id.empty());
  EXPECT_TRUE(view.attributes.empty());
  EXPECT_TRUE(view.payload.empty());
}

TEST(ObserveReaderTest, LargestPartsAreSound) {
  WireRecord record = Example(256, 65'536);
  record.dimension = 4096;
  record.vector.assign(4096 * 4, std::byte{1});
  record.attributes.assign(4096, 'a');
  EXPECT_EQ(OpenBody(ObserveBodyOf(std::vector<WireRecord>{record})), RefusalReason::kNone);
}

WireBytes HelloBodyOf(const WireHello& hello) {
  const WireBytes frame = HelloBytes(hello);
  return {frame.begin() + 32, frame.end()};
}

TEST(DecodeHelloTest, ReadsEachField) {
  const Exact body(HelloBodyOf({.features = 0xFFFFFFFF,
                                .dimension = 768,
                                .metric = 3,
                                .priority = 1,
                                .space = "a_space-9"}));
  HelloView hello;
  ASSERT_EQ(DecodeHello(body.get(), &hello), RefusalReason::kNone);
  EXPECT_EQ(hello.body.features, 0xFFFFFFFFu);  // unknown bits are ignored
  EXPECT_EQ(hello.body.dimension, 768);
  EXPECT_EQ(hello.body.metric, Metric::kL2);
  EXPECT_EQ(hello.body.priority, Priority::kHigh);
  EXPECT_EQ(hello.space, "a_space-9");
}

TEST(DecodeHelloTest, NoSpaceIsDefault) {
  const Exact body(HelloBodyOf({}));
  HelloView hello;
  ASSERT_EQ(DecodeHello(body.get(), &hello), RefusalReason::kNone);
  EXPECT_EQ(hello.space, "default");
}

TEST(DecodeHelloTest, FaultsAreNamed) {
  const auto decode = [](const WireBytes& body) {
    const Exact exact(body);
    HelloView hello;
    return DecodeHello(exact.get(), &hello);
  };
  const WireBytes sound = HelloBodyOf({.space = "abc"});
  for (size_t bytes = 0; bytes < sound.size(); ++bytes) {
    EXPECT_EQ(decode(WireBytes(sound.begin(), sound.begin() + static_cast<ptrdiff_t>(bytes))),
              RefusalReason::kBadFrame);
  }
  for (const uint64_t space_bytes : {0, 2, 4, 255}) {
    WireBytes body = sound;
    SetWireNumber(body, 8, 1, space_bytes);
    EXPECT_EQ(decode(body), RefusalReason::kBadFrame) << space_bytes;
  }
  EXPECT_EQ(decode(HelloBodyOf({.metric = 4})), RefusalReason::kBadFrame);
  EXPECT_EQ(decode(HelloBodyOf({.priority = 2})), RefusalReason::kBadFrame);
  EXPECT_EQ(decode(HelloBodyOf({.dimension = 4096})), RefusalReason::kNone);
  EXPECT_EQ(decode(HelloBodyOf({.dimension = 4097})), RefusalReason::kDimensionMismatch);
  EXPECT_EQ(decode(HelloBodyOf({.space = std::string(64, 'a')})), RefusalReason::kNone);
  EXPECT_EQ(decode(HelloBodyOf({.space = std::string(65, 'a')})), RefusalReason::kBadSpaceId);
  EXPECT_EQ(decode(HelloBodyOf({.space = std::string(255, 'a')})), RefusalReason::kBadSpaceId);
  for (int c = 0; c < 256; ++c) {
    const bool allowed = (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
    EXPECT_EQ(decode(HelloBodyOf({.space = std::string("x") + static_cast<char>(c)})),
              allowed ? RefusalReason::kNone : RefusalReason::kBadSpaceId)
        << c;
  }
}

TEST(DecodeRecallTest, ReadsEachField) {
  const std::array<float, 3> vector{1, 2, 3};
  WireRecall wire = F32Recall(vector);
  wire.k = 1000;
  wire.ef = 10'000;
  const Exact body(RecallBodyOf(wire));
  RecallView recall;
  ASSERT_EQ(DecodeRecall(body.get(), 0, &recall), RefusalReason::kNone);
  EXPECT_EQ(recall.body.k, 1000u);
  EXPECT_EQ(recall.body.ef, 10'000u);
  EXPECT_EQ(recall.body.dimension, 3);
  EXPECT_TRUE(std::ranges::equal(std::span(recall.vector, sizeof(vector)),
                                 std::as_bytes(std::span(vector))));
}

TEST(DecodeRecallTest, AMomentIsOfASnapshotAndAfter1970) {
  const std::vector<float> vector{1, 2};
  WireRecall wire = F32Recall(vector);
  wire.bound = 0.5F;
  wire.at_unix_ns = 1'234'567'890'123;
  RecallView recall;
  for (const uint16_t flags : {4 + 64, 4 + 16 + 64, 4 + 8 + 64}) {
    const Exact body(RecallBodyOf(wire, flags));
    ASSERT_EQ(DecodeRecall(body.get(), flags, &recall), RefusalReason::kNone) << flags;
    EXPECT_EQ(recall.at_unix_ns, wire.at_unix_ns);
  }
  const Exact without(RecallBodyOf(wire, 4));
  ASSERT_EQ(DecodeRecall(without.get(), 4, &recall), RefusalReason::kNone);
  EXPECT_EQ(recall.at_unix_ns, 0);
  EXPECT_EQ(DecodeRecall(without.get(), 4 + 64, &recall), RefusalReason::kBadFrame);
  const Exact no_snapshot(RecallBodyOf(wire, 64));
  EXPECT_EQ(DecodeRecall(no_snapshot.get(), 64, &recall), RefusalReason::kBadRecall);
  for (const int64_t bad : {int64_t{0}, int64_t{-1}, INT64_MIN}) {
    wire.at_unix_ns = bad;
    const Exact body(RecallBodyOf(wire, 4 + 64));
    EXPECT_EQ(DecodeRecall(body.get(), 4 + 64, &recall), RefusalReason::kBadRecall) << bad;
  }
}

TEST(DecodeRecallTest, ABoundLiesBetweenVectorAndFilter) {
  const std::vector<float> vector{1, 2};
  WireRecall wire = F32Recall(vector);
  wire.bound = 0.75F;
  FilterWriter writer;
  const std::string_view docs = "docs";
  ASSERT_TRUE(writer.Require("source", {&docs, 1}));
  wire.filter = writer.Bytes();
  RecallView recall;
  for (const uint16_t flags : {16, 24}) {
    const Exact body(RecallBodyOf(wire, flags));
    ASSERT_EQ(DecodeRecall(body.get(), flags, &recall), RefusalReason::kNone);
    EXPECT_TRUE(recall.has_bound);
    EXPECT_EQ(recall.bound, 0.75F);
    EXPECT_EQ(recall.filter.size(), flags == 24 ? wire.filter.size() : 0);
  }
  const Exact without(RecallBodyOf(wire, 8));
  ASSERT_EQ(DecodeRecall(without.get(), 8, &recall), RefusalReason::kNone);
  EXPECT_FALSE(recall.has_bound);
  // Cut short, and no number.
  WireBytes cut = RecallBodyOf(wire, 16);
  cut.pop_back();
  const Exact short_body(cut);
  EXPECT_EQ(DecodeRecall(short_body.get(), 16, &recall), RefusalReason::kBadFrame);
  wire.bound = std::numeric_limits<float>::quiet_NaN();
  const Exact nan(RecallBodyOf(wire, 16));
  EXPECT_EQ(DecodeRecall(nan.get(), 16, &recall), RefusalReason::kBadRecall);
}

TEST(DecodeRecallTest, FaultsAreNamed) {
  const auto decode = [](const WireBytes& body) {
    const Exact exact(body);
    RecallView recall;
    return DecodeRecall(exact.get(), 0, &recall);
  };
  const std::array<float, 3> vector{1, 2, 3};
  const WireBytes sound = RecallBodyOf(F32Recall(vector));
  for (size_t bytes = 0; bytes < sound.size(); ++bytes) {
    EXPECT_EQ(decode(WireBytes(sound.begin(), sound.begin() + static_cast<ptrdiff_t>(bytes))),
              RefusalReason::kBadFrame)
        << bytes;
  }
  WireBytes longer = sound;
  longer.push_back(std::byte{0});
  EXPECT_EQ(decode(longer), RefusalReason::kBadFrame);
  struct Case {
    size_t offset;
    size_t bytes;
    uint64_t value;
    RefusalReason reason;
  };
  for (const Case& c :
       {Case{0, 4, 0, RefusalReason::kBadRecall}, Case{0, 4, 1, RefusalReason::kNone},
        Case{0, 4, kMaxRecallResults + 1, RefusalReason::kBadRecall},
        Case{0, 4, 0xFFFFFFFF, RefusalReason::kBadRecall},
        Case{4, 4, 10'001, RefusalReason::kBadRecall},
        Case{4, 4, 0xFFFFFFFF, RefusalReason::kBadRecall},
        Case{8, 2, 0, RefusalReason::kWrongDimension},
        Case{8, 2, 4097, RefusalReason::kWrongDimension}, Case{8, 2, 2, RefusalReason::kBadFrame},
        Case{8, 2, 4, RefusalReason::kBadFrame}, Case{8, 2, 4096, RefusalReason::kBadFrame},
        Case{10, 1, 0, RefusalReason::kBadDtype}, Case{10, 1, 5, RefusalReason::kBadDtype},
        Case{10, 1, 2, RefusalReason::kBadFrame}}) {
    WireBytes body = sound;
    SetWireNumber(body, c.offset, c.bytes, c.value);
    EXPECT_EQ(decode(body), c.reason) << c.offset << " " << c.value;
  }
}

// Two clauses, as they come from a client.
std::string SomeFilter() {
  FilterWriter writer;
  const std::array<std::string_view, 2> any{"docs", "mail"};
  const std::array<std::string_view, 1> none{"old"};
  EXPECT_TRUE(writer.Require("source", any));
  EXPECT_TRUE(writer.Exclude(kTagKey, none));
  writer.SetTimes({.begin_ns = -7});
  return writer.Bytes();
}
constexpr uint16_t kFiltered = 8;

TEST(DecodeRecallTest, AFilterFollowsTheVector) {
  const std::array<float, 3> vector{1, 2, 3};
  WireRecall wire = F32Recall(vector);
  for (const std::string& filter : {SomeFilter(), std::string()}) {
    wire.filter = filter;
    const Exact body(RecallBodyOf(wire, kFiltered));
    RecallView recall;
    ASSERT_EQ(DecodeRecall(body.get(), kFiltered, &recall), RefusalReason::kNone);
    EXPECT_EQ(WireText(recall.filter), filter);
    EXPECT_TRUE(std::ranges::equal(std::span(recall.vector, sizeof(vector)),
                                   std::as_bytes(std::span(vector))));
    // Only the flag says that there is one.
    EXPECT_EQ(DecodeRecall(body.get(), 0, &recall), RefusalReason::kBadFrame);
  }
  const Exact plain(RecallBodyOf(F32Recall(vector)));
  RecallView recall;
  recall.filter = plain.get();
  EXPECT_EQ(DecodeRecall(plain.get(), kFiltered, &recall), RefusalReason::kBadFrame);
  EXPECT_EQ(DecodeRecall(plain.get(), 0, &recall), RefusalReason::kNone);
  EXPECT_TRUE(recall.filter.empty());
}

TEST(DecodeRecallTest, FaultsOfAFilterAreNamed) {
  const std::array<float, 3> vector{1, 2, 3};
  WireRecall wire = F32Recall(vector);
  wire.filter = SomeFilter();
  const auto decode = [](const WireBytes& body) {
    const Exact exact(body);
    RecallView recall;
    return DecodeRecall(exact.get(), kFiltered, &recall);
  };
  const WireBytes sound = RecallBodyOf(wire, kFiltered);
  const size_t length_at = sound.size() - wire.filter.size() - 2;
  for (size_t bytes = 0; bytes < sound.size(); ++bytes) {
    EXPECT_EQ(decode(WireBytes(sound.begin(), sound.begin() + static_cast<ptrdiff_t>(bytes))),
              RefusalReason::kBadFrame);
  }
  for (const uint64_t length :
       {size_t{0}, wire.filter.size() - 1, wire.filter.size() + 1, size_t{0xFFFF}}) {
    WireBytes body = sound;
    SetWireNumber(body, length_at, 2, length);
    EXPECT_EQ(decode(body), RefusalReason::kBadFrame) << length;
  }
  // The frame is sound; what it says is not.
  wire.filter.pop_back();
  EXPECT_EQ(decode(RecallBodyOf(wire, kFiltered)), RefusalReason::kBadFilter);
  wire.filter.assign(4'097, '\0');
  EXPECT_EQ(decode(RecallBodyOf(wire, kFiltered)), RefusalReason::kBadFilter);
  wire.filter = SomeFilter();
  wire.k = 0;
  EXPECT_EQ(decode(RecallBodyOf(wire, kFiltered)), RefusalReason::kBadRecall);
}

RefusalReason FlowOf(const WireFlowRequest& flow, FlowRequestBody* read) {
  const WireBytes frame = FlowBytes(flow);
  const Exact body({frame.begin() + 32, frame.end()});
  return DecodeFlow(body.get(), read);
}

TEST(DecodeFlowTest, KnowsItsActionsAndWhatIsARate) {
  FlowRequestBody read;
  for (int action = 0; action < 256; ++action) {
    const RefusalReason reason = FlowOf({.action = static_cast<uint8_t>(action)}, &read);
    const bool known = action >= 1 && action <= 5;
    EXPECT_EQ(reason, known ? RefusalReason::kNone : RefusalReason::kBadFlow) << action;
  }
  EXPECT_EQ(FlowOf({.action = 5, .buffer_remaining = -7, .preferred_rate = 2.5F}, &read),
            RefusalReason::kNone);
  EXPECT_EQ(read.action, FlowAction::kBufferStatus);
  EXPECT_EQ(read.buffer_remaining, -7);
  EXPECT_EQ(read.preferred_rate, 2.5F);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (const float rate :
       {-1e-30F, -1.0F, kInfinity, -kInfinity, std::numeric_limits<float>::quiet_NaN()}) {
    for (const uint8_t action : {1, 3, 4}) {
      EXPECT_EQ(FlowOf({.action = action, .preferred_rate = rate}, &read), RefusalReason::kBadFlow)
          << rate;
    }
  }
  EXPECT_EQ(FlowOf({.action = 3, .preferred_rate = std::numeric_limits<float>::max()}, &read),
            RefusalReason::kNone);
}

TEST(DecodeFlowTest, HasOneLength) {
  for (size_t bytes = 0; bytes <= 24; ++bytes) {
    const Exact body(WireBytes(bytes, std::byte{1}));
    FlowRequestBody read;
    EXPECT_EQ(DecodeFlow(body.get(), &read) == RefusalReason::kBadFrame, bytes != 16) << bytes;
  }
}

TEST(DecodeScrollTest, ReadsEachFieldAndNamesFaults) {
  const auto decode = [](const WireBytes& body, ScrollBody* scroll) {
    return DecodeScroll(Exact(body).get(), scroll);
  };
  ScrollBody scroll;
  const WireBytes sound = WireWriter().U64(0xFFFFFFFFFF).U16(7).U16(512).U32(0).Take();
  ASSERT_EQ(decode(sound, &scroll), RefusalReason::kNone);
  EXPECT_EQ(scroll.cursor, 0xFFFFFFFFFFu);
  EXPECT_EQ(scroll.partition, 7);
  EXPECT_EQ(scroll.limit, 512);
  for (size_t bytes = 0; bytes < sound.size(); ++bytes) {
    EXPECT_EQ(
        decode(WireBytes(sound.begin(), sound.begin() + static_cast<ptrdiff_t>(bytes)), &scroll),
        RefusalReason::kBadFrame);
  }
  WireBytes longer = sound;
  longer.push_back(std::byte{0});
  EXPECT_EQ(decode(longer, &scroll), RefusalReason::kBadFrame);
  for (const uint64_t limit : {0, 513, 0xFFFF}) {
    WireBytes body = sound;
    SetWireNumber(body, 10, 2, limit);
    EXPECT_EQ(decode(body, &scroll), RefusalReason::kBadRecall) << limit;
  }
}

TEST(DecodeCheckTest, TakesOneLength) {
  CheckBody check;
  WireBytes body(136, std::byte{3});
  SetWireNumber(body, 0, 2, 0x1234);
  ASSERT_EQ(DecodeCheck(Exact(body).get(), &check), RefusalReason::kNone);
  EXPECT_EQ(check.shard, 0x1234);
  EXPECT_EQ(check.state[127], std::byte{3});
  for (const size_t bytes : {0u, 8u, 135u, 137u}) {
    EXPECT_EQ(DecodeCheck(Exact(WireBytes(bytes)).get(), &check), RefusalReason::kBadFrame);
  }
}

TEST(DecodeCommandTest, BoundsTheNameAndKnowsWhatThereIs) {
  const auto bytes = [](uint8_t what, uint8_t space_bytes, const std::string& name) {
    WireWriter writer;
    writer.U8(what).U8(space_bytes).U16(0).U32(0);
    for (const char letter : name) writer.U8(static_cast<uint8_t>(letter));
    return writer.Take();
  };
  CommandView command;
  const Exact sound(bytes(2, 3, "abc"));
  EXPECT_EQ(DecodeCommand(sound.get(), &command), RefusalReason::kNone);
  EXPECT_EQ(command.what, SpaceCommand::kDrop);
  EXPECT_EQ(command.space, "abc");
  for (const uint8_t what : {0, 4, 255}) {
    EXPECT_EQ(DecodeCommand(Exact(bytes(what, 3, "abc")).get(), &command),
              RefusalReason::kBadFrame);
  }
  for (const uint8_t length : {0, 2, 4, 255}) {
    EXPECT_EQ(DecodeCommand(Exact(bytes(1, length, "abc")).get(), &command),
              RefusalReason::kBadFrame);
  }
  EXPECT_EQ(DecodeCommand(Exact(bytes(1, 0, "")).get(), &command), RefusalReason::kBadSpaceId);
  EXPECT_EQ(DecodeCommand(Exact(bytes(1, 3, "A/b")).get(), &command), RefusalReason::kBadSpaceId);
  EXPECT_EQ(DecodeCommand({}, &command), RefusalReason::kBadFrame);
  for (size_t cut = 0; cut < 11; ++cut) {
    auto whole = bytes(1, 3, "abc");
    whole.resize(cut);
    EXPECT_EQ(DecodeCommand(Exact(whole).get(), &command), RefusalReason::kBadFrame) << cut;
  }
}

TEST(DecodeIntrospectTest, KnowsItsQuestions) {
  IntrospectWhat what{};
  for (int value = 0; value < 256; ++value) {
    const Exact body(WireWriter().U8(static_cast<uint64_t>(value)).Take());
    const RefusalReason reason = DecodeIntrospect(body.get(), &what);
    EXPECT_EQ(reason, value >= 1 && value <= 5 ? RefusalReason::kNone : RefusalReason::kBadFrame);
    if (reason == RefusalReason::kNone) {
      EXPECT_EQ(static_cast<int>(what), value);
    }
  }
  EXPECT_EQ(DecodeIntrospect({}, &what), RefusalReason::kBadFrame);
  EXPECT_EQ(DecodeIntrospect(Exact(WireWriter().U16(1).Take()).get(), &what),
            RefusalReason::kBadFrame);
}

}  // namespace
}  // namespace engram
