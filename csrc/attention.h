// Attention of BF16 queries over BF16 keys and values, each query row computed alone over its own
// keys in one fixed order (attention_kernels.h): no bit depends on threads, batch, padding, other
// rows, or on how a prompt is cut.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "attention_kernels.h"
#include "isa.h"
#include "pool.h"

namespace zipmoe {

// A [batch, heads, rows, width] tensor: strides in elements, the words of a row side by side.
template <class Word>
struct HeadTensor {
  Word* data;
  std::ptrdiff_t batch, head, row;
  [[nodiscard]] Word* at(std::uint64_t b, std::uint64_t h, std::uint64_t r) const {
    return data + static_cast<std::ptrdiff_t>(b) * batch + static_cast<std::ptrdiff_t>(h) * head +
           static_cast<std::ptrdiff_t>(r) * row;
  }
};

// The keys and values of one sequence: [kv_heads, count, width] each, strides in elements.
struct CachedTokens {
  std::uint16_t *keys, *values;
  std::ptrdiff_t key_head, key_row, value_head, value_row;
  std::uint64_t count;
};

struct AttentionShape {
  std::uint64_t batch, heads, kv_heads, queries;  // heads: a multiple of kv_heads
  std::uint32_t key_width, value_width;
};

enum class MaskType : std::uint8_t { boolean, bfloat16, float32 };

// A [batch, heads, queries, keys] tensor of any strides (0 where it is the same for all), in
// elements. Boolean: which keys are allowed. Others are added to the scores; the type's lowest
// finite number, and what is below it, means that the key is not allowed.
struct AttentionMask {
  const void* data = nullptr;  // null: none
  std::ptrdiff_t batch = 0, head = 0, row = 0, key = 0;
  MaskType type = MaskType::boolean;

  // What it says of the queries from `first` on.
  [[nodiscard]] AttentionMask from_row(std::uint64_t first) const;
};

// One more score per query, which takes weight and gives nothing: a [batch, heads, queries] tensor.
struct AttentionSinks {
  const float* data = nullptr;  // null: none
  std::ptrdiff_t batch = 0, head = 0, row = 0;
};

// Which keys a query may see, and how scores become weights. A key must be allowed by all: `mask`,
// `causal` (its number at most that of the query, `offset` more than its row) and `window` (if not
// 0: it and the window - 1 before it, with `causal`).
struct AttentionRule {
  float scaling = 1.0F;
  float softcap = 0.0F;  // 0: none
  bool causal = false;
  std::int64_t offset = 0;
  std::uint64_t window = 0;
  AttentionMask mask, bias;  // `bias` only adds, and is not boolean
  AttentionSinks sinks;
};

// Sequences of a batch share nothing: each attends to its own keys, however many they are.
struct AttentionInput {
  AttentionShape shape;
  HeadTensor<const std::uint16_t> queries;
  std::span<const CachedTokens> cached;  // of each sequence; is only read
};

class Attention {
 public:
  // threads = 0: the pool that the process shares.
  Attention(unsigned threads, Isa isa);
  Attention(std::shared_ptr<WorkerPool> pool, Isa isa);
  ~Attention();

  // out[b, h, t] = the weighted values of query t; 0 where no key is allowed. A row with a NaN or
  // an infinite score, or with a NaN among its keys' values, is NaN where it would be by the
  // formula; keys that are not allowed are never looked at. Throws std::invalid_argument for shapes
  // that do not fit. One call at a time: a second one waits.
  void run(const AttentionInput& input, const AttentionRule& rule,
           const HeadTensor<std::uint16_t>& out);

  [[nodiscard]] Isa isa() const { return isa_; }

 private:
  class Tile;
  std::shared_ptr<WorkerPool> pool() const;

  std::shared_ptr<WorkerPool> own_pool_;  // null: the shared one
  Isa isa_;
  const AttentionKernels& kernels_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Tile>> tiles_;  // what a thread needs, kept
};

}  // namespace zipmoe
