#include "stream.h"

#include <atomic>
#include <cstring>

namespace zipmoe {
namespace {

constexpr std::uint64_t kPieceBytes = std::uint64_t{1} << 20;
constexpr std::uint64_t kLineWords = 8;

std::uint64_t read_piece(const std::uint8_t* from, std::uint64_t bytes) {
  std::uint64_t folded[kLineWords] = {};
  for (; bytes >= sizeof folded; from += sizeof folded, bytes -= sizeof folded) {
    std::uint64_t line[kLineWords];
    std::memcpy(line, from, sizeof line);
    for (std::uint64_t i = 0; i < kLineWords; ++i) folded[i] ^= line[i];
  }
  std::uint64_t result = 0;
  for (; bytes >= sizeof result; from += sizeof result, bytes -= sizeof result) {
    std::uint64_t word;
    std::memcpy(&word, from, sizeof word);
    result ^= word;
  }
  for (const std::uint64_t word : folded) result ^= word;
  return result;
}

}  // namespace

std::uint64_t read_all(std::span<const std::uint8_t> bytes, WorkerPool& pool) {
  std::atomic<std::uint64_t> folded = 0;
  pool.run(bytes.size(), kPieceBytes, [&](unsigned, std::uint64_t begin, std::uint64_t end) {
    folded ^= read_piece(bytes.data() + begin, end - begin);
  });
  return folded;
}

}  // namespace zipmoe
