#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

#include "stream.h"

namespace zipmoe {
namespace {

// Weights in one piece of work: long enough that handing it out costs nothing, short enough that no
// thread waits long for another's last one.
constexpr std::uint64_t kPieceWeights = std::uint64_t{1} << 18;
// Rows of a piece are many when they are few columns' only work, and at least so many.
constexpr std::uint64_t kLeastRows = 32;

std::uint64_t piece_rows(std::uint64_t unit, std::uint64_t columns) {
  const std::uint64_t wanted =
      std::max(kLeastRows, kPieceWeights / std::max<std::uint64_t>(columns, 1));
  return ceil_to(wanted, unit);
}

template <class T>
T* grown(Buffer& buffer, std::size_t n) {
  if (buffer.size() < n * sizeof(T)) buffer.resize(n * sizeof(T));
  return reinterpret_cast<T*>(buffer.data());
}

}  // namespace

// A call: alone in the engine, and counted.
class Engine::Turn {
 public:
  explicit Turn(Engine& engine) : engine_(engine), lock_(engine.mutex_) {}
  ~Turn() {
    const auto spent = std::chrono::steady_clock::now() - begin_;
    engine_.busy_ns_ += static_cast<std::uint64_t>(std::chrono::nanoseconds(spent).count());
    ++engine_.calls_;
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  Engine& engine_;
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
  std::lock_guard<std::mutex> lock_;
};

Engine::Engine(unsigned threads, Isa isa)
    : pool_(threads == 0 ? shared_pool() : std::make_shared<WorkerPool>(threads)),
      isa_(isa),
      dot_(dot_kernels(isa)) {
  for (unsigned thread = 0; thread < pool_->num_threads(); ++thread)
    multipliers_.push_back(std::make_unique<Multiplier>(isa));
}

EngineCounters Engine::counters() const { return {calls_, busy_ns_}; }

std::uint64_t Engine::read(std::span<const std::uint8_t> bytes) {
  const Turn turn(*this);
  return read_all(bytes, *pool_);
}

template <class Keep>
void Engine::products(const PackedMatrix& matrix, const Columns& x, const Keep& keep) {
  const std::uint64_t grain = piece_rows(matrix.row_unit(), matrix.columns());
  pool_->run(matrix.rows(), grain, [&](unsigned thread, std::uint64_t begin, std::uint64_t end) {
    Multiplier& multiplier = *multipliers_[thread];
    const std::uint64_t rows = end - begin;
    float* values = multiplier.values(0, rows * x.count);
    multiplier.rows(matrix, begin, end, x, values, static_cast<std::ptrdiff_t>(rows));
    for (std::uint32_t c = 0; c < x.count; ++c) keep(values + c * rows, begin, rows, c);
  });
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

void Engine::experts(ExpertCache& cache, std::uint64_t layer, const Routing& routing, Gate kind,
                     const Input& x, std::uint16_t* y, std::ptrdiff_t stride) {
  const Turn turn(*this);
  list_visits(routing, x.count);
  cache.prefetch(layer, distinct_);
  std::uint64_t hidden = 0;
  if (!visits_.empty()) {
    const std::uint64_t expert = visits_.front().expert;
    hidden = cache.spec(layer, expert, cache.num_matrices(layer, expert) - 1).rows;
    std::memset(grown<float>(total_, hidden * x.count), 0, hidden * x.count * sizeof(float));
  }
  for (auto first = visits_.begin(); first != visits_.end();) {
    const auto last = std::find_if(
        first, visits_.end(), [&](const Visit& visit) { return visit.expert != first->expert; });
    run_expert(cache, layer, kind, x, {first, last}, hidden);
    first = last;
  }
  const auto* total = reinterpret_cast<const float*>(total_.data());
  pool_->run(x.count, 8, [&](unsigned, std::uint64_t begin, std::uint64_t end) {
    for (std::uint64_t t = begin; t < end; ++t) {
      std::uint16_t* out = y + static_cast<std::ptrdiff_t>(t) * stride;
      if (hidden == 0)  // no expert at all
        std::fill_n(out, stride, std::uint16_t{0});
      else
        dot_.round(total + t * hidden, hidden, nullptr, out);
    }
  });
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
