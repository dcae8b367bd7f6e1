#include "engine.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

#include "engine_work.h"
#include "stream.h"

namespace zipmoe {
Engine::Engine(unsigned threads, Isa isa)
    : pool_(threads == 0 ? shared_pool() : std::make_shared<WorkerPool>(threads)),
      isa_(isa),
      dot_(dot_kernels(isa)),
      attention_(pool_, isa),
      routers_(pool_->num_threads()) {
  for (unsigned thread = 0; thread < pool_->num_threads(); ++thread)
    multipliers_.push_back(std::make_unique<Multiplier>(isa));
}

EngineCounters Engine::counters() const { return {calls_, busy_ns_}; }

std::uint64_t Engine::read(std::span<const std::uint8_t> bytes) {
  const Turn turn(*this);
  return read_all(bytes, *pool_);
}

void Engine::product(const PackedMatrix& matrix, const Columns& x, const std::uint16_t* bias,
                     std::uint16_t* y, std::ptrdiff_t stride) {
  products(matrix, x,
           [&](const float* values, std::uint64_t begin, std::uint64_t rows, std::uint32_t c) {
             dot_.round(values, rows, bias == nullptr ? nullptr : bias + begin,
                        y + c * stride + begin);
           });
}

void Engine::multiply_wide(const PackedMatrix& matrix, const Input& x, float* y,
                           std::ptrdiff_t stride) {
  const Turn turn(*this);
  products(matrix, ready_columns(x, matrix.columns(), columns_),
           [&](const float* values, std::uint64_t begin, std::uint64_t rows, std::uint32_t c) {
             std::copy_n(values, rows, y + c * stride + begin);
           });
}

void Engine::multiply(const PackedMatrix& matrix, const Input& x, const std::uint16_t* bias,
                      std::uint16_t* y, std::ptrdiff_t stride) {
  const Turn turn(*this);
  product(matrix, ready_columns(x, matrix.columns(), columns_), bias, y, stride);
}

// The columns that `down` is multiplied with.
Columns Engine::inner(const GatedMatrices& matrices, Gate kind, const Columns& x) {
  const PackedMatrix& up = *matrices.up;
  const std::uint64_t rows = up.rows(), padded = column_stride(rows);
  auto* h = grown<std::uint16_t>(inner_, padded * x.count);
  for (std::uint32_t c = 0; c < x.count; ++c)
    std::fill(h + c * padded + rows, h + (c + 1) * padded, std::uint16_t{0});
  const std::uint64_t unit =
      matrices.gate == nullptr ? up.row_unit() : std::lcm(up.row_unit(), matrices.gate->row_unit());
  pool_->run(rows, piece_rows(unit, 2 * up.columns()),
             [&](unsigned thread, std::uint64_t begin, std::uint64_t end) {
               Multiplier& multiplier = *multipliers_[thread];
               const std::uint64_t n = end - begin;
               const auto stride = static_cast<std::ptrdiff_t>(n);
               float* first = multiplier.values(0, n * x.count);
               multiplier.rows(up, begin, end, x, first, stride);
               float* second = nullptr;
               if (matrices.gate != nullptr) {
                 second = multiplier.values(1, n * x.count);
                 multiplier.rows(*matrices.gate, begin, end, x, second, stride);
               }
               for (std::uint32_t c = 0; c < x.count; ++c) {
                 std::uint16_t* out = h + c * padded + begin;
                 if (second != nullptr)
                   dot_.gate(kind, second + c * n, first + c * n, n, out);
                 else
                   dot_.gate(kind, first + c * n, nullptr, n, out);
               }
             });
  return {h, static_cast<std::ptrdiff_t>(padded), x.count};
}

void Engine::gated(const GatedMatrices& matrices, Gate kind, const Input& x, std::uint16_t* y,
                   std::ptrdiff_t stride) {
  const Turn turn(*this);
  const Columns h = inner(matrices, kind, ready_columns(x, matrices.up->columns(), columns_));
  product(*matrices.down, h, nullptr, y, stride);
}

void Engine::decode_rows(const PackedMatrix& matrix, std::span<const std::int64_t> rows,
                         std::uint16_t* out, std::ptrdiff_t stride) {
  for (const std::int64_t row : rows)
    if (row < 0 || static_cast<std::uint64_t>(row) >= matrix.rows())
      throw std::invalid_argument("row " + std::to_string(row) + " of a matrix of " +
                                  std::to_string(matrix.rows()) + " rows");
  const Turn turn(*this);
  pool_->run(rows.size(), 16, [&](unsigned thread, std::uint64_t begin, std::uint64_t end) {
    for (std::uint64_t i = begin; i < end; ++i)
      multipliers_[thread]->decode_row(matrix, static_cast<std::uint64_t>(rows[i]),
                                       out + static_cast<std::ptrdiff_t>(i) * stride);
  });
}

// Sorted by expert, a token's own in the order of its slots.
void Engine::list_visits(const Routing& routing, std::uint64_t tokens) {
  visits_.clear();
  for (std::uint64_t i = 0; i < tokens * routing.k; ++i) {
    const std::int64_t expert = routing.experts[i];
    if (expert < 0) throw std::invalid_argument("an expert's number is negative");
    if (static_cast<std::uint64_t>(expert) < routing.num_experts)
      visits_.push_back({static_cast<std::uint64_t>(expert), i / routing.k, routing.weights[i]});
  }
  std::stable_sort(visits_.begin(), visits_.end(),
                   [](const Visit& a, const Visit& b) { return a.expert < b.expert; });
  distinct_.clear();
  for (const Visit& visit : visits_)
    if (distinct_.empty() || distinct_.back() != visit.expert) distinct_.push_back(visit.expert);
}

void Engine::begin_total(std::uint64_t hidden, std::uint64_t tokens) {
  std::memset(grown<float>(total_, hidden * tokens), 0, hidden * tokens * sizeof(float));
}

void Engine::round_total(std::uint64_t hidden, std::uint64_t tokens, std::uint16_t* y,
                         std::ptrdiff_t stride) {
  const auto* total = reinterpret_cast<const float*>(total_.data());
  pool_->run(tokens, 8, [&](unsigned, std::uint64_t begin, std::uint64_t end) {
    for (std::uint64_t t = begin; t < end; ++t)
      dot_.round(total + t * hidden, hidden, nullptr, y + static_cast<std::ptrdiff_t>(t) * stride);
  });
}

void Engine::experts(ExpertCache& cache, std::uint64_t layer, const Routing& routing, Gate kind,
                     const Input& x, std::uint16_t* y, std::ptrdiff_t stride) {
  const Turn turn(*this);
  list_visits(routing, x.count);
  cache.prefetch(layer, distinct_);
  if (visits_.empty()) {
    for (std::uint64_t t = 0; t < x.count; ++t)
      std::fill_n(y + static_cast<std::ptrdiff_t>(t) * stride, stride, std::uint16_t{0});
    return;
  }
  const std::uint64_t expert = distinct_.front();
  const std::uint64_t hidden =
      cache.spec(layer, expert, cache.num_matrices(layer, expert) - 1).rows;
  begin_total(hidden, x.count);
  run_experts(cache, layer, kind, x, hidden);
  round_total(hidden, x.count, y, stride);
}

void Engine::run_experts(ExpertCache& cache, std::uint64_t layer, Gate kind, const Input& x,
                         std::uint64_t hidden) {
  for (auto first = visits_.begin(); first != visits_.end();) {
    const auto last = std::find_if(
        first, visits_.end(), [&](const Visit& visit) { return visit.expert != first->expert; });
    run_expert(cache, layer, kind, x, {first, last}, hidden);
    first = last;
  }
}

Columns Engine::gather(const Input& x, std::span<const Visit> visits, std::uint64_t weights) {
  const std::uint64_t padded = column_stride(weights);
  const auto at = [&](const Visit& visit) {
    return x.data + static_cast<std::ptrdiff_t>(visit.token) * x.stride;
  };
  if (visits.size() == 1) return ready_columns({at(visits[0]), x.stride, 1}, weights, columns_);
  auto* copy = grown<std::uint16_t>(columns_, padded * visits.size());
  std::uint16_t* to = copy;
  for (const Visit& visit : visits) {
    std::memcpy(to, at(visit), weights * sizeof *to);
    std::fill(to + weights, to + padded, std::uint16_t{0});
    to += padded;
  }
  return {copy, static_cast<std::ptrdiff_t>(padded), static_cast<std::uint32_t>(visits.size())};
}

void Engine::run_expert(ExpertCache& cache, std::uint64_t layer, Gate kind, const Input& x,
                        std::span<const Visit> visits, std::uint64_t hidden) {
  const std::uint64_t expert = visits.front().expert;
  const Lease lease = cache.acquire(layer, expert);
  const std::size_t n = lease.num_matrices();
  std::uint64_t at_work = 0;  // the matrix, for errors
  try {
    const auto take = [&](std::uint64_t matrix) {
      return packed(cache, lease, layer, expert, at_work = matrix);
    };
    const PackedMatrix first = take(0), second = take(n - 2), down = take(n - 1);
    at_work = 0;
    const GatedMatrices matrices{n == 3 ? &first : nullptr, &second, &down};
    const Columns h = inner(matrices, kind, gather(x, visits, second.columns()));
    at_work = n - 1;
    auto* total = reinterpret_cast<float*>(total_.data());
    products(down, h,
             [&](const float* values, std::uint64_t begin, std::uint64_t rows, std::uint32_t c) {
               dot_.weigh(values, rows, visits[c].weight, total + visits[c].token * hidden + begin);
             });
  } catch (const CorruptError& error) {
    throw cache.located(error, layer, expert, at_work);
  }
}

// A matrix of an expert ready to multiply: where it lies, or decoded if its codec asks for that.
PackedMatrix Engine::packed(ExpertCache& cache, const Lease& lease, std::uint64_t layer,
                            std::uint64_t expert, std::uint64_t matrix) {
  const MatrixSpec& spec = lease.spec(matrix);
  if (PackedMatrix::is_multiplied_packed(spec.codec)) return {spec, lease.extents(matrix)};
  const std::size_t bytes = spec.rows * spec.columns * spec.element_bytes;
  auto* room = grown<std::uint8_t>(decoded_[matrix % 3], bytes);
  try {
    decode(spec, lease.extents(matrix), {room, static_cast<std::ptrdiff_t>(spec.columns)}, isa_,
           pool_->num_threads());
  } catch (const CorruptError& error) {
    throw cache.located(error, layer, expert, matrix);
  }
  MatrixSpec plain = spec;
  plain.codec = Codec::raw;
  return {plain, {{room, bytes}, {}}};
}

void Engine::multiply_expert(ExpertCache& cache, std::uint64_t layer, std::uint64_t expert,
                             std::uint64_t matrix, const Input& x, std::uint16_t* y,
                             std::ptrdiff_t stride) {
  const Turn turn(*this);
  Lease lease = cache.acquire(layer, expert);
  if (matrix >= lease.num_matrices())
    throw std::invalid_argument("the expert has no matrix " + std::to_string(matrix));
  if (matrix + 1 < lease.num_matrices()) lease.keep_visit();
  try {
    const PackedMatrix weights = packed(cache, lease, layer, expert, matrix);
    product(weights, ready_columns(x, weights.columns(), columns_), nullptr, y, stride);
  } catch (const CorruptError& error) {
    throw error.layer ? error : cache.located(error, layer, expert, matrix);
  }
}

}  // namespace zipmoe
