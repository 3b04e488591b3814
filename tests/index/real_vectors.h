#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "tests/index/graph_fixture.h"

namespace engram {

// Appends up to `count` vectors of a .bvecs file (each: its dimension as int32, then bytes).
inline bool AppendBvecs(const std::string& path, size_t count, TestVectors* to) {
  std::ifstream file(path, std::ios::binary);
  for (size_t i = 0; i < count; ++i) {
    int32_t dimension = 0;
    if (!file.read(reinterpret_cast<char*>(&dimension), sizeof(dimension))) break;
    std::vector<uint8_t> bytes(static_cast<size_t>(dimension));
    if (!file.read(reinterpret_cast<char*>(bytes.data()), dimension)) return false;
    to->dimension = static_cast<uint32_t>(dimension);
    to->values.insert(to->values.end(), bytes.begin(), bytes.end());
  }
  return !to->values.empty();
}

// Fashion-MNIST below $ENGRAM_DATA_DIR. Empty, or the reason why there is none.
inline std::string LoadFashionMnist(size_t count, size_t query_count, TestVectors* data,
                                    TestVectors* queries) {
  const char* directory = std::getenv("ENGRAM_DATA_DIR");
  if (directory == nullptr) return "ENGRAM_DATA_DIR does not name the data sets";
  const std::string folder = std::string(directory) + "/fashion-mnist-784/";
  if (!AppendBvecs(folder + "base.bvecs", count, data) ||
      !AppendBvecs(folder + "query.bvecs", query_count, queries)) {
    return "no base.bvecs and query.bvecs in " + folder;
  }
  return "";
}

}  // namespace engram
