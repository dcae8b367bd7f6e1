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

EngineCounters Engine::counters() const { return {calls_, busy_ns_, groups_, suspensions_}; }

void Engine::begin_turn() { begin_ = std::chrono::steady_clock::now(); }

void Engine::end_turn() {
  const auto spent = std::chrono::steady_clock::now() - begin_;
  busy_ns_ += static_cast<std::uint64_t>(std::chrono::nanoseconds(spent).count());
}

// Lets urgent calls pass, if there are any. What this one has under way is as it was afterwards.
void Engine::give_way() {
  if (!turnstile_.is_wanted()) return;
  ++suspensions_;
  end_turn();
  std::swap<EngineCall>(*this, aside_);
  turnstile_.give_way();
  std::swap<EngineCall>(*this, aside_);
  begin_turn();
}

// The same between two groups of a layer's experts. Others ask the cache for theirs meanwhile.
void Engine::give_way(ExpertCache& cache, std::uint64_t layer) {
  if (!turnstile_.is_wanted()) return;
  std::vector<std::uint64_t> experts;
  for (const std::span<const Visit> visits : pending_) experts.push_back(visits.front().expert);
  cache.pause(layer, experts);
  give_way();
  cache.resume(layer, experts);
  if (!guesses_.empty()) cache.look_ahead(guessed_layer_, guesses_);
}

std::uint64_t Engine::read(std::span<const std::uint8_t> bytes) {
  const Turn turn(*this);
  return read_all(bytes, *pool_);
}

// The columns of x for Multiplier::rows, if need be copied to `room`.
Columns Engine::ready(const Input& x, std::uint64_t weights, Buffer& room) {
  if (are_ready(x, weights)) return {x.data, x.stride, static_cast<std::uint32_t>(x.count)};
  auto* copies = aligned_room<std::uint16_t>(room, column_stride(weights) * x.count);
  return copy_columns(x, weights, x.count, copies, [](std::uint64_t c) { return c; });
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
  product_wide(matrix, ready(x, matrix.columns(), columns_), y, stride);
}

void Engine::product_wide(const PackedMatrix& matrix, const Columns& x, float* y,
                          std::ptrdiff_t stride) {
  products(matrix, x,
           [&](const float* values, std::uint64_t begin, std::uint64_t rows, std::uint32_t c) {
             std::copy_n(values, rows, y + c * stride + begin);
           });
}

void Engine::multiply(const PackedMatrix& matrix, const Input& x, const std::uint16_t* bias,
                      std::uint16_t* y, std::ptrdiff_t stride) {
  const Turn turn(*this);
  product(matrix, ready(x, matrix.columns(), columns_), bias, y, stride);
}

void Engine::gated(const DenseBlock& block, const Input& x, std::uint16_t* y,
                   std::ptrdiff_t stride) {
  const Turn turn(*this);
  run_gated(block, x, y, stride);
}

void Engine::run_gated(const DenseBlock& block, const Input& x, std::uint16_t* y,
                       std::ptrdiff_t stride) {
  GatedTask task{block.matrices, block.gate};
  task.x = ready(x, block.matrices.up->columns(), columns_);
  multiply_inner({&task, 1}, [](const GatedTask&, std::size_t, const auto& work) { work(); });
  product(*block.matrices.down, task.inner, nullptr, y, stride);
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

// A matrix of an expert ready to multiply: where it lies, or decoded if its codec asks for that.
PackedMatrix Engine::packed(ExpertCache& cache, Lease& lease, std::uint64_t layer,
                            std::uint64_t expert, std::uint64_t matrix) {
  lease.decode_if_promoted(pool_->num_threads());
  const MatrixSpec spec = lease.spec(matrix);
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
    product(weights, ready(x, weights.columns(), columns_), nullptr, y, stride);
  } catch (const CorruptError& error) {
    throw error.layer ? error : cache.located(error, layer, expert, matrix);
  }
}

}  // namespace zipmoe
