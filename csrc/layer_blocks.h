// The two halves of a decoder layer as the engine runs them, each in one call: what they consist
// of. Nothing here owns what it points to.
#pragma once
#include <cstdint>
#include <optional>
#include <span>

#include "attention.h"
#include "matmul.h"
#include "norm_kernels.h"
#include "router.h"

namespace zipmoe {

// A product, and the bias (BF16) added to it if that is not null.
struct Projection {
  const PackedMatrix* weights = nullptr;
  const std::uint16_t* bias = nullptr;
};

// The three products of a gated block, or the two of one without a gate (`gate` null then).
struct GatedMatrices {
  const PackedMatrix* gate;
  const PackedMatrix* up;
  const PackedMatrix* down;
};

// A gated block that all tokens visit.
struct DenseBlock {
  GatedMatrices matrices;
  Gate gate;
};

// Self-attention with rotary position embeddings: queries, keys and values; norms of queries and
// keys, of each head or of all at once, as their width says; rotation; attention; output.
struct AttentionBlock {
  Projection query, key, value, output;
  std::uint64_t heads, kv_heads;
  std::uint32_t width;  // of a head
  std::optional<NormRule> query_norm, key_norm;
  float scaling;
};

// What a call of it is about: `batch` sequences of `queries` new tokens.
struct AttentionCall {
  std::uint64_t batch, queries;
  const std::uint16_t* x;  // [batch, queries, hidden]
  // Of each new token's position; `rotated` words of a head are.
  HeadTensor<const std::uint16_t> cos, sin;
  std::uint32_t rotated;
  // The cache of each sequence. New tokens, the last ones that are counted, are written into it.
  std::span<const CachedTokens> cached;
  bool causal;  // as far as `mask` does not say it; there are no old tokens then
  AttentionMask mask;
};

// Routed experts, and an expert that all tokens visit (`shared`), weighted by the sigmoid of a
// product where there is `shared_gate`.
struct MoeBlock {
  const PackedMatrix* router;
  RouterRule rule;
  Gate gate;
  std::optional<DenseBlock> shared;
  const PackedMatrix* shared_gate = nullptr;
};

// A decoder layer: x + attention(norm(x)), then the same with the experts, or, where it has none,
// with a dense block.
struct DecoderLayer {
  const AttentionBlock* attention = nullptr;
  const MoeBlock* moe = nullptr;  // null: `dense` instead
  DenseBlock dense{};
  NormRule before_attention, before_mlp;
  // The layer after it, whose router is asked beforehand which experts it will want; null: it has
  // none, or is unknown.
  const DecoderLayer* next = nullptr;
  std::uint64_t next_number = 0;  // of the experts of `next`
};

// Throw std::invalid_argument where the parts do not fit each other.
void check(const AttentionBlock& block);
void check(const MoeBlock& block);
void check(const DenseBlock& block, std::uint64_t hidden);
void check(const DecoderLayer& layer);

}  // namespace zipmoe
