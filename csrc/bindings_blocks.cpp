// Attention and MoE blocks and layers for Python. Matrices are kept alive here, tensors by whoever
// gives their addresses (zipmoe.blocks).
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "bindings.h"
#include "bindings_cache.h"
#include "bindings_matrix.h"
#include "bindings_tensors.h"
#include "engine.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace zipmoe {
namespace {

template <class Block>
struct Held {
  Block block;
  std::vector<nb::object> parts;  // what the block points to

  const PackedMatrix* hold(const nb::object& matrix) {
    parts.push_back(matrix);
    return &nb::cast<const HeldMatrix&>(matrix).matrix;
  }
};

using HeldAttention = Held<AttentionBlock>;
using HeldMoe = Held<MoeBlock>;

using BiasedMatrix = std::tuple<nb::object, Address>;
// Kind, eps, width, address of the weight, whether that is FP32.
using Norm = std::tuple<NormKind, float, std::uint32_t, Address, bool>;
// Gate, up and down, and the activation between them.
using Dense = std::tuple<nb::object, nb::object, nb::object, Gate>;

std::optional<NormRule> norm_of(const std::optional<Norm>& norm) {
  if (!norm) return {};
  const auto& [kind, eps, width, weight, is_wide] = *norm;
  return NormRule{kind, eps, width, is_wide ? nullptr : at<const std::uint16_t>(weight),
                  is_wide ? at<const float>(weight) : nullptr};
}

Projection projection_of(HeldAttention& held, const BiasedMatrix& part) {
  const auto& [matrix, bias] = part;
  return {held.hold(matrix), at<const std::uint16_t>(bias)};
}

template <class Block>
DenseBlock dense_of(Held<Block>& held, const Dense& parts) {
  const auto& [gate, up, down, kind] = parts;
  return {{held.hold(gate), held.hold(up), held.hold(down)}, kind};
}

using HeldLayer = Held<DecoderLayer>;

// Layers that follow each other, and the numbers of their experts.
using HeldLayers = Held<std::vector<std::pair<const DecoderLayer*, std::uint64_t>>>;

// What Python knows of the new tokens and of the cache: see AttentionCall.
using Step = std::tuple<std::uint64_t, std::uint64_t, Tensor, Tensor, std::uint32_t, Address, bool,
                        std::optional<Mask>>;

// Python writes them as rows of seven int64.
static_assert(sizeof(CachedTokens) == 7 * sizeof(std::int64_t));

std::span<const CachedTokens> cached_at(Address caches, std::uint64_t batch,
                                        std::uint64_t queries) {
  const std::span cached(at<const CachedTokens>(caches), batch);
  for (const CachedTokens& tokens : cached)
    if (tokens.count < queries) throw std::invalid_argument("a cache without the new tokens");
  return cached;
}

AttentionCall call_of(Address x, const Step& step) {
  const auto& [batch, queries, cos, sin, rotated, caches, causal, mask] = step;
  const auto cached = cached_at(caches, batch, queries);
  return {batch,
          queries,
          at<const std::uint16_t>(x),
          tensor_of<const std::uint16_t>(cos),
          tensor_of<const std::uint16_t>(sin),
          rotated,
          cached,
          causal,
          mask_of(mask)};
}

}  // namespace

static void bind_attention_block(nb::module_& m) {
  nb::class_<HeldAttention>(m, "AttentionBlock")
      .def(
          "__init__",
          [](HeldAttention* self, const BiasedMatrix& query, const BiasedMatrix& key,
             const BiasedMatrix& value, const BiasedMatrix& output, std::uint64_t heads,
             std::uint64_t kv_heads, std::uint32_t width, float scaling,
             const std::optional<Norm>& query_norm, const std::optional<Norm>& key_norm) {
            HeldAttention held;
            held.block = {projection_of(held, query),
                          projection_of(held, key),
                          projection_of(held, value),
                          projection_of(held, output),
                          heads,
                          kv_heads,
                          width,
                          norm_of(query_norm),
                          norm_of(key_norm),
                          scaling};
            check(held.block);
            new (self) HeldAttention(std::move(held));
          },
          nb::kw_only(), "query"_a, "key"_a, "value"_a, "output"_a, "heads"_a, "kv_heads"_a,
          "width"_a, "scaling"_a, "query_norm"_a = nb::none(), "key_norm"_a = nb::none())
      .def(
          "run",
          [](const HeldAttention& self, Engine& engine, Address x, Address out, const Step& step) {
            const AttentionCall call = call_of(x, step);
            nb::gil_scoped_release release;
            engine.attend(self.block, call, at<std::uint16_t>(out));
          },
          "engine"_a, "x"_a, "out"_a, "step"_a);
}

static void bind_moe_block(nb::module_& m) {
  nb::enum_<RouterScore>(m, "RouterScore")
      .value("softmax", RouterScore::softmax)
      .value("sigmoid", RouterScore::sigmoid);
  nb::enum_<GroupScore>(m, "GroupScore")
      .value("best", GroupScore::best)
      .value("two_best", GroupScore::two_best);
  nb::class_<RouterRule>(m, "RouterRule")
      .def(
          "__init__",
          [](RouterRule* self, std::uint32_t num_experts, std::uint32_t k, RouterScore score,
             bool normalises, float least_sum, float scaling, Address correction,
             std::uint32_t num_groups, std::uint32_t kept_groups, GroupScore group_score) {
            new (self) RouterRule{num_experts,
                                  k,
                                  score,
                                  normalises,
                                  least_sum,
                                  scaling,
                                  at<const float>(correction),
                                  num_groups,
                                  kept_groups,
                                  group_score};
            check(*self);
          },
          "num_experts"_a, "k"_a, nb::kw_only(), "score"_a, "normalises"_a = false,
          "least_sum"_a = 0.0F, "scaling"_a = 1.0F, "correction"_a = 0, "num_groups"_a = 1,
          "kept_groups"_a = 1, "group_score"_a = GroupScore::best)
      .def(
          "choose",
          [](const RouterRule& self, Address logits, std::uint64_t tokens, Address experts,
             Address weights) {
            Router router;
            for (std::uint64_t t = 0; t < tokens; ++t)
              router.choose(self, at<const float>(logits) + t * self.num_experts,
                            at<std::int64_t>(experts) + t * self.k,
                            at<float>(weights) + t * self.k);
          },
          "logits"_a, "tokens"_a, "experts"_a, "weights"_a);
  nb::class_<HeldMoe>(m, "MoeBlock")
      .def(
          "__init__",
          [](HeldMoe* self, const nb::object& router, const RouterRule& rule, Gate gate,
             const std::optional<Dense>& shared, const nb::object& shared_gate) {
            HeldMoe held;
            MoeBlock& block = held.block;
            block.router = held.hold(router);
            block.rule = rule;
            block.gate = gate;
            if (shared) block.shared = dense_of(held, *shared);
            if (!shared_gate.is_none()) block.shared_gate = held.hold(shared_gate);
            check(block);
            new (self) HeldMoe(std::move(held));
          },
          nb::kw_only(), "router"_a, "rule"_a, "gate"_a, "shared"_a = nb::none(),
          "shared_gate"_a = nb::none())
      .def(
          "run",
          [](const HeldMoe& self, Engine& engine, const CacheHandle& cache, std::uint64_t layer,
             Address x, std::uint64_t tokens, Address out) {
            const auto hidden = static_cast<std::ptrdiff_t>(self.block.router->columns());
            nb::gil_scoped_release release;
            engine.moe(*cache.get(), layer, self.block,
                       {at<const std::uint16_t>(x), hidden, tokens}, at<std::uint16_t>(out),
                       hidden);
          },
          "engine"_a, "cache"_a, "layer"_a, "x"_a, "tokens"_a, "out"_a);
}

static void bind_layer(nb::module_& m) {
  nb::class_<HeldLayer>(m, "DecoderLayer")
      .def(
          "__init__",
          [](HeldLayer* self, const nb::object& attention,
             const std::variant<Dense, nb::object>& mlp, const Norm& before_attention,
             const Norm& before_mlp) {
            HeldLayer held;
            held.block.attention = &nb::cast<const HeldAttention&>(attention).block;
            held.parts.push_back(attention);
            if (const auto* dense = std::get_if<Dense>(&mlp)) {
              held.block.dense = dense_of(held, *dense);
            } else {
              const auto& moe = std::get<nb::object>(mlp);
              held.block.moe = &nb::cast<const HeldMoe&>(moe).block;
              held.parts.push_back(moe);
            }
            held.block.before_attention = *norm_of(before_attention);
            held.block.before_mlp = *norm_of(before_mlp);
            check(held.block);
            new (self) HeldLayer(std::move(held));
          },
          nb::kw_only(), "attention"_a, "mlp"_a, "before_attention"_a, "before_mlp"_a)
      .def(
          "followed_by",
          [](HeldLayer& self, const nb::object& layer, std::uint64_t number) {
            const DecoderLayer& next = nb::cast<const HeldLayer&>(layer).block;
            if (next.moe == nullptr) throw std::invalid_argument("a layer without a router");
            self.block.next = &next;
            self.block.next_number = number;
            self.parts.push_back(layer);
          },
          "layer"_a, "number"_a)
      .def(
          "run",
          [](const HeldLayer& self, Engine& engine, const CacheHandle& cache, std::uint64_t number,
             Address x, Address out, const Step& step) {
            const AttentionCall call = call_of(x, step);
            nb::gil_scoped_release release;
            engine.run_layer(*cache.get(), number, self.block, call, at<std::uint16_t>(out));
          },
          "engine"_a, "cache"_a, "number"_a, "x"_a, "out"_a, "step"_a);
}

static void bind_layers(nb::module_& m) {
  nb::class_<HeldLayers>(m, "DecoderLayers")
      .def(
          "__init__",
          [](HeldLayers* self, const std::vector<std::pair<nb::object, std::uint64_t>>& layers) {
            HeldLayers held;
            for (const auto& [layer, number] : layers) {
              held.block.emplace_back(&nb::cast<const HeldLayer&>(layer).block, number);
              held.parts.push_back(layer);
            }
            new (self) HeldLayers(std::move(held));
          },
          "layers"_a)
      .def(
          "run",
          [](const HeldLayers& self, Engine& engine, const CacheHandle& cache, Address x,
             Address out, const Step& step, const std::vector<Address>& others) {
            if (others.size() + 1 != self.block.size())
              throw std::invalid_argument("not one cache for each layer");
            AttentionCall call = call_of(x, step);
            const nb::gil_scoped_release release;
            for (std::size_t n = 0; n <= others.size(); ++n) {
              if (n != 0) call.cached = cached_at(others[n - 1], call.batch, call.queries);
              const auto& [layer, number] = self.block[n];
              engine.run_layer(*cache.get(), number, *layer, call, at<std::uint16_t>(out));
              call.x = at<const std::uint16_t>(out);
            }
          },
          "engine"_a, "cache"_a, "x"_a, "out"_a, "step"_a, "others"_a);
}

void bind_blocks(nb::module_& m) {
  bind_attention_block(m);
  bind_moe_block(m);
  bind_layer(m);
  bind_layers(m);
}

}  // namespace zipmoe
