// Attention, and a decoder layer, in one call; the other half of a layer is in engine_experts.cpp.
#include <algorithm>
#include <stdexcept>
#include <utility>

#include "engine_work.h"
#include "norm.h"

namespace zipmoe {
namespace {

// Tokens of a sequence that are attended to together; urgent calls pass between two such pieces.
constexpr std::uint64_t kAttendedTogether = 256;

void require(bool is_so, const char* what) {
  if (!is_so) throw std::invalid_argument(what);
}

}  // namespace

void check(const AttentionBlock& block) {
  const std::uint64_t width = block.width, inner = block.heads * width;
  const PackedMatrix& query = *block.query.weights;
  require(block.kv_heads != 0 && block.heads % block.kv_heads == 0 && query.rows() == inner &&
              block.output.weights->columns() == inner,
          "queries and output of an attention block do not fit its heads");
  for (const Projection* part : {&block.key, &block.value})
    require(part->weights->rows() == block.kv_heads * width &&
                part->weights->columns() == query.columns(),
            "keys and values of an attention block do not fit its heads");
  for (const auto& [norm, heads] :
       {std::pair(&block.query_norm, block.heads), std::pair(&block.key_norm, block.kv_heads)})
    require(!*norm || (*norm)->width == width || (*norm)->width == heads * width,
            "a norm of an attention block is neither of a head nor of all");
}

void check(const MoeBlock& block) {
  const std::uint64_t hidden = block.router->columns();
  require(block.router->rows() == block.rule.num_experts, "a router of other experts");
  if (block.shared) check(*block.shared, hidden);
  if (block.shared_gate != nullptr)
    require(block.shared_gate->rows() == 1 && block.shared_gate->columns() == hidden,
            "the gate of a shared expert does not fit");
}

void check(const DenseBlock& block, std::uint64_t hidden) {
  const auto& [gate, up, down] = block.matrices;
  require(up->columns() == hidden && down->rows() == hidden && down->columns() == up->rows() &&
              gate->columns() == hidden && gate->rows() == up->rows(),
          "the parts of a gated block do not fit");
}

void check(const DecoderLayer& layer) {
  const std::uint64_t hidden = layer.attention->query.weights->columns();
  if (layer.moe == nullptr) check(layer.dense, hidden);
  require((layer.moe == nullptr || layer.moe->router->columns() == hidden) &&
              layer.attention->output.weights->rows() == hidden &&
              layer.before_attention.width == hidden && layer.before_mlp.width == hidden,
          "the parts of a layer do not fit");
}

void Engine::run_layer(ExpertCache& cache, std::uint64_t number, const DecoderLayer& layer,
                       const AttentionCall& call, std::uint16_t* y) {
  const Turn turn(*this);
  const std::uint64_t tokens = call.batch * call.queries;
  const std::uint64_t hidden = layer.attention->query.weights->columns();
  auto* normed = grown<std::uint16_t>(normed_, tokens * hidden);
  auto* change = grown<std::uint16_t>(change_, tokens * hidden);
  rms_norm(call.x, tokens, layer.before_attention, normed, isa_, *pool_);
  AttentionCall inside = call;
  inside.x = normed;
  run_attention(*layer.attention, inside, change);
  add(call.x, change, tokens, hidden, y);
  give_way();
  rms_norm(y, tokens, layer.before_mlp, normed, isa_, *pool_);
  const auto stride = static_cast<std::ptrdiff_t>(hidden);
  const Input states{normed, stride, tokens};
  if (layer.moe == nullptr) {
    look_ahead(cache, layer, y, tokens);
    run_gated(layer.dense, states, change, stride);
  } else {
    const Columns columns = ask_for_experts(cache, number, *layer.moe, states);
    look_ahead(cache, layer, y, tokens);
    finish_moe(cache, number, *layer.moe, states, columns, change, stride);
  }
  add(y, change, tokens, hidden, y);
}

void Engine::add(const std::uint16_t* x, const std::uint16_t* more, std::uint64_t rows,
                 std::uint64_t width, std::uint16_t* out) {
  pool_->run(rows, kPieceTokens, [&](unsigned, std::uint64_t begin, std::uint64_t end) {
    dot_.add(x + begin * width, more + begin * width, (end - begin) * width, out + begin * width);
  });
}

void Engine::attend(const AttentionBlock& block, const AttentionCall& call, std::uint16_t* y) {
  const Turn turn(*this);
  run_attention(block, call, y);
}

// All keys and values come first, since a mask may show a token those that follow it.
void Engine::run_attention(const AttentionBlock& block, const AttentionCall& call,
                           std::uint16_t* y) {
  const std::uint64_t tokens = call.batch * call.queries;
  const std::uint64_t hidden = block.query.weights->columns(), inner = block.heads * block.width;
  const auto each_piece = [&](const auto& work) {
    const std::uint64_t most = call.batch == 1 ? kAttendedTogether : tokens;
    for (std::uint64_t first = 0; first < tokens; first += most) {
      if (first != 0) give_way();
      work(first, std::min(most, tokens - first));
    }
  };
  each_piece([&](std::uint64_t first, std::uint64_t count) {
    const Input states{call.x + first * hidden, static_cast<std::ptrdiff_t>(hidden), count};
    project(block, ready(states, hidden, columns_), first, tokens);
    place_heads(block, call, first, count);
  });
  give_way();
  auto* attended = grown<std::uint16_t>(attended_, tokens * inner);
  each_piece([&](std::uint64_t first, std::uint64_t count) {
    std::uint16_t* part = attended + first * inner;
    see_keys(block, call, first, count / call.batch, part);
    const PackedMatrix& output = *block.output.weights;
    const Input states{part, static_cast<std::ptrdiff_t>(inner), count};
    product(output, ready(states, inner, columns_), block.output.bias, y + first * output.rows(),
            static_cast<std::ptrdiff_t>(output.rows()));
  });
}

// What some queries of each sequence get from its keys and values.
void Engine::see_keys(const AttentionBlock& block, const AttentionCall& call, std::uint64_t first,
                      std::uint64_t queries, std::uint16_t* attended) {
  const std::uint64_t inner = block.heads * block.width;
  const auto at = [](std::uint64_t n) { return static_cast<std::ptrdiff_t>(n); };
  const auto* heads = reinterpret_cast<const std::uint16_t*>(heads_[0].data());
  const AttentionInput input{
      {call.batch, block.heads, block.kv_heads, queries, block.width, block.width},
      {heads + first * inner, at(call.queries * inner), at(block.width), at(inner)},
      call.cached};
  AttentionRule rule;
  rule.scaling = block.scaling;
  rule.causal = call.causal;
  rule.offset = at(first);
  rule.mask = call.mask.from_row(first);
  attention_.run(input, rule, {attended, at(queries * inner), at(block.width), at(inner)});
}

// Queries, keys and values of some of the new tokens, rounded.
void Engine::project(const AttentionBlock& block, const Columns& x, std::uint64_t first,
                     std::uint64_t tokens) {
  const std::array parts{&block.query, &block.key, &block.value};
  std::array<std::uint16_t*, 3> rooms;
  for (std::size_t m = 0; m < parts.size(); ++m) {
    const std::uint64_t rows = parts[m]->weights->rows();
    rooms[m] = grown<std::uint16_t>(heads_[m], rows * tokens) + rows * first;
  }
  products(std::array{parts[0]->weights, parts[1]->weights, parts[2]->weights}, x,
           [&](std::size_t m, const float* values, std::uint64_t begin, std::uint64_t rows,
               std::uint32_t c) {
             const std::uint16_t* bias = parts[m]->bias;
             dot_.round(values, rows, bias == nullptr ? nullptr : bias + begin,
                        rooms[m] + c * parts[m]->weights->rows() + begin);
           });
}

// Norms and rotations; keys and values go to the cache.
void Engine::place_heads(const AttentionBlock& block, const AttentionCall& call,
                         std::uint64_t begin, std::uint64_t count) {
  const NormRow norm_row_of = norm_row(isa_);
  const std::uint64_t width = block.width;
  const auto at = [](std::uint64_t n) { return static_cast<std::ptrdiff_t>(n); };
  const auto norm_heads = [&](const std::optional<NormRule>& rule, std::uint16_t* row,
                              std::uint64_t words) {
    if (!rule) return;
    for (std::uint64_t k = 0; k < words; k += rule->width) norm_row_of(row + k, *rule, row + k);
  };
  pool_->run(count, kPieceTokens, [&](unsigned, std::uint64_t first, std::uint64_t last) {
    for (std::uint64_t t = begin + first; t < begin + last; ++t) {
      const std::uint64_t b = t / call.queries, q = t % call.queries;
      const CachedTokens& cached = call.cached[b];
      const auto place = [&](std::uint16_t* data, std::ptrdiff_t head, std::ptrdiff_t token,
                             std::uint64_t h) {
        return data + at(h) * head + at(cached.count - call.queries + q) * token;
      };
      const auto row = [&](std::size_t m, std::uint64_t heads) {
        return reinterpret_cast<std::uint16_t*>(heads_[m].data()) + at(t * heads * width);
      };
      const auto rotate = [&](std::uint16_t* words) {
        dot_.rotate(words, call.cos.at(b, 0, q), call.sin.at(b, 0, q), call.rotated / 2);
      };
      std::uint16_t* queries = row(0, block.heads);
      std::uint16_t* keys = row(1, block.kv_heads);
      const std::uint16_t* values = row(2, block.kv_heads);
      norm_heads(block.query_norm, queries, block.heads * width);
      norm_heads(block.key_norm, keys, block.kv_heads * width);
      for (std::uint64_t h = 0; h < block.heads; ++h) rotate(queries + h * width);
      for (std::uint64_t h = 0; h < block.kv_heads; ++h) {
        rotate(keys + h * width);
        std::copy_n(keys + h * width, width,
                    place(cached.keys, cached.key_head, cached.key_row, h));
        std::copy_n(values + h * width, width,
                    place(cached.values, cached.value_head, cached.value_row, h));
      }
    }
  });
}

}  // namespace zipmoe
