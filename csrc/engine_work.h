// What the files of the engine share: a call's turn, and products cut into pieces of work.
#pragma once
#include <algorithm>
#include <numeric>

#include "engine.h"

namespace zipmoe {

// A call: alone in the engine while it is not suspended, and counted.
class Engine::Turn {
 public:
  explicit Turn(Engine& engine) : engine_(engine) {
    engine_.turnstile_.enter();
    engine_.begin_turn();
  }
  ~Turn() {
    ++engine_.calls_;
    engine_.end_turn();
    engine_.turnstile_.leave();
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  Engine& engine_;
};

// Weights in one piece of work, times a few columns: long enough that handing it out costs nothing,
// short enough that no thread waits long for another's last one.
inline constexpr std::uint64_t kPieceWeights = std::uint64_t{1} << 18;
// Rows of a piece are many when they are few columns' only work, and at least so many.
inline constexpr std::uint64_t kLeastRows = 32;
// Tokens of one piece of what is done to each by itself.
inline constexpr std::uint64_t kPieceTokens = 8;

// weights: of a row. count: columns to multiply it with.
inline std::uint64_t piece_rows(std::uint64_t unit, std::uint64_t weights, std::uint64_t count) {
  const std::uint64_t work =
      std::max<std::uint64_t>(weights, 1) * std::max<std::uint64_t>(count / kPanelColumns, 1);
  return ceil_to(std::max(kLeastRows, kPieceWeights / work), unit);
}

// Calls work(thread, which, begin, end) for the pieces of all that is cut, on all threads.
template <class Work>
void Engine::run_pieces(std::span<Cut> cuts, const Work& work) {
  std::uint64_t pieces = 0;
  for (Cut& cut : cuts) cut.end = pieces += (cut.rows + cut.grain - 1) / cut.grain;
  pool_->run(pieces, 1, [&](unsigned thread, std::uint64_t piece, std::uint64_t) {
    std::size_t which = 0;
    while (piece >= cuts[which].end) ++which;
    const Cut& cut = cuts[which];
    const std::uint64_t begin = (piece - (which == 0 ? 0 : cuts[which - 1].end)) * cut.grain;
    work(thread, which, begin, std::min(begin + cut.grain, cut.rows));
  });
}

// Copies for Multiplier::rows, side by side from `to` on: the c-th is x's column of token_of(c).
// All threads copy, since what one of them has written may be far from the others.
template <class TokenOf>
Columns Engine::copy_columns(const Input& x, std::uint64_t weights, std::uint64_t count,
                             std::uint16_t* to, const TokenOf& token_of) {
  const std::uint64_t stride = column_stride(weights);
  pool_->run(count, kPieceTokens, [&](unsigned, std::uint64_t begin, std::uint64_t end) {
    for (std::uint64_t c = begin; c < end; ++c)
      copy_column(x.data + static_cast<std::ptrdiff_t>(token_of(c)) * x.stride, weights,
                  to + c * stride);
  });
  return {to, static_cast<std::ptrdiff_t>(stride), static_cast<std::uint32_t>(count)};
}

// Calls keep(which, values, begin, rows, column) for the products of each piece of rows of one of
// the matrices, which share the columns.
template <std::size_t kMatrices, class Keep>
void Engine::products(const std::array<const PackedMatrix*, kMatrices>& matrices, const Columns& x,
                      const Keep& keep) {
  std::array<Cut, kMatrices> cuts;
  for (std::size_t m = 0; m < kMatrices; ++m) {
    const PackedMatrix& matrix = *matrices[m];
    // A small matrix is shared by all threads too.
    const std::uint64_t share = (matrix.rows() + num_threads() - 1) / num_threads();
    cuts[m] = {matrix.rows(), std::min(piece_rows(matrix.row_unit(), matrix.columns(), x.count),
                                       ceil_to(std::max(share, kLeastRows), matrix.row_unit()))};
  }
  run_pieces(cuts, [&](unsigned thread, std::size_t m, std::uint64_t begin, std::uint64_t end) {
    Multiplier& multiplier = *multipliers_[thread];
    const std::uint64_t rows = end - begin;
    float* values = multiplier.values(0, rows * x.count);
    multiplier.rows(*matrices[m], begin, end, x, values, static_cast<std::ptrdiff_t>(rows));
    for (std::uint32_t c = 0; c < x.count; ++c) keep(m, values + c * rows, begin, rows, c);
  });
}

// Calls keep(values, begin, rows, column).
template <class Keep>
void Engine::products(const PackedMatrix& matrix, const Columns& x, const Keep& keep) {
  products(std::array{&matrix}, x,
           [&](std::size_t, const float* values, std::uint64_t begin, std::uint64_t rows,
               std::uint32_t c) { keep(values, begin, rows, c); });
}

// The inner products of tasks and what is between: activation(gate x) * up x, rounded. Calls
// at_work(task, matrix, work) for each piece of work.
template <class AtWork>
void Engine::multiply_inner(std::span<GatedTask> tasks, const AtWork& at_work) {
  std::uint64_t size = 0;
  cuts_.clear();
  for (const GatedTask& task : tasks) {
    const PackedMatrix& up = *task.matrices.up;
    const PackedMatrix* gate = task.matrices.gate;
    const std::uint64_t unit =
        gate == nullptr ? up.row_unit() : std::lcm(up.row_unit(), gate->row_unit());
    cuts_.push_back({up.rows(), piece_rows(unit, 2 * up.columns(), task.x.count)});
    size += column_stride(up.rows()) * task.x.count;
  }
  auto* room = aligned_room<std::uint16_t>(inner_, size);
  for (GatedTask& task : tasks) {
    const std::uint64_t rows = task.matrices.up->rows(), padded = column_stride(rows);
    task.inner = {room, static_cast<std::ptrdiff_t>(padded), task.x.count};
    task.out = room;
    for (std::uint32_t c = 0; c < task.x.count; ++c, room += padded)
      std::fill(room + rows, room + padded, std::uint16_t{0});
  }
  run_pieces(cuts_, [&](unsigned thread, std::size_t t, std::uint64_t begin, std::uint64_t end) {
    multiply_piece(*multipliers_[thread], tasks[t], begin, end, at_work);
  });
}

template <class AtWork>
void Engine::multiply_piece(Multiplier& multiplier, const GatedTask& task, std::uint64_t begin,
                            std::uint64_t end, const AtWork& at_work) {
  const PackedMatrix* gate = task.matrices.gate;
  const std::uint64_t n = end - begin, count = task.x.count;
  const auto multiply = [&](unsigned which, const PackedMatrix& matrix) {
    float* values = multiplier.values(which, n * count);
    at_work(task, which, [&] {
      multiplier.rows(matrix, begin, end, task.x, values, static_cast<std::ptrdiff_t>(n));
    });
    return values;
  };
  const float* gates = gate == nullptr ? nullptr : multiply(0, *gate);
  const float* ups = multiply(gate == nullptr ? 0 : 1, *task.matrices.up);
  for (std::uint32_t c = 0; c < count; ++c) {
    std::uint16_t* out = task.out + c * task.inner.stride + begin;
    if (gates == nullptr)
      dot_.gate(task.kind, ups + c * n, nullptr, n, out);
    else
      dot_.gate(task.kind, gates + c * n, ups + c * n, n, out);
  }
}

}  // namespace zipmoe
