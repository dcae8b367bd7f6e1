// Routed experts of a layer, and the expert that all tokens visit.
//
// An expert is a task: gate, up and down on the columns of its visits. With few columns, tasks
// whose weights are in memory run first and together, all their inner products, then all their
// outer ones: a thread waits twice for another, not twice for each expert, and meanwhile others are
// read. What they give is kept and added up at the end, in the order of experts. With many columns
// a task is work enough, and what it gives takes memory: one after the other, in that order.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "engine_work.h"
#include "norm.h"
#include "scalar.h"

namespace zipmoe {
namespace {

constexpr std::uint64_t kFewColumns = 128;
}  // namespace

// Forgets tasks and their leases, whatever happens.
class Engine::TaskList {
 public:
  explicit TaskList(Engine& engine) : engine_(engine) {}
  ~TaskList() { engine_.forget_tasks(); }
  TaskList(const TaskList&) = delete;
  TaskList& operator=(const TaskList&) = delete;

 private:
  Engine& engine_;
};

void Engine::forget_tasks() {
  tasks_.clear();
  held_.clear();
}

// Sorted by expert, a token's own in the order of its slots.
void Engine::list_visits(const Routing& routing, std::uint64_t tokens) {
  visits_.clear();
  guesses_.clear();
  for (std::uint64_t i = 0; i < tokens * routing.k; ++i) {
    const std::int64_t expert = routing.experts[i];
    if (expert < 0) throw std::invalid_argument("an expert's number is negative");
    if (static_cast<std::uint64_t>(expert) < routing.num_experts)
      visits_.push_back({static_cast<std::uint64_t>(expert), i / routing.k, routing.weights[i]});
  }
  std::stable_sort(visits_.begin(), visits_.end(),
                   [](const Visit& a, const Visit& b) { return a.expert < b.expert; });
  distinct_.clear();
  tokens_.clear();
  for (const Visit& visit : visits_) {
    if (distinct_.empty() || distinct_.back() != visit.expert) {
      distinct_.push_back(visit.expert);
      tokens_.push_back(0);
    }
    ++tokens_.back();
  }
}

void Engine::record_routing(bool is_on) {
  const std::lock_guard lock(routing_mutex_);
  records_routing_ = is_on;
  if (!is_on) routing_.clear();
}

void Engine::note_routing(std::uint64_t layer, std::uint64_t k) {
  const std::lock_guard lock(routing_mutex_);
  if (records_routing_) routing_.push_back({layer, k, chosen_});
}

std::vector<RoutingRecord> Engine::take_routing() {
  const std::lock_guard lock(routing_mutex_);
  return std::exchange(routing_, {});
}

void Engine::begin_total(std::uint64_t width, std::uint64_t tokens) {
  width_ = width;
  std::memset(grown<float>(total_, width * tokens), 0, width * tokens * sizeof(float));
}

void Engine::round_total(std::uint64_t tokens, std::uint16_t* y, std::ptrdiff_t stride) {
  const auto* total = reinterpret_cast<const float*>(total_.data());
  pool_->run(tokens, kPieceTokens, [&](unsigned, std::uint64_t begin, std::uint64_t end) {
    for (std::uint64_t t = begin; t < end; ++t)
      dot_.round(total + t * width_, width_, nullptr, y + static_cast<std::ptrdiff_t>(t) * stride);
  });
}

void Engine::experts(ExpertCache& cache, std::uint64_t layer, const Routing& routing, Gate kind,
                     const Input& x, std::uint16_t* y, std::ptrdiff_t stride) {
  const Turn turn(*this);
  list_visits(routing, x.count);
  cache.prefetch(layer, distinct_, tokens_, x.count);
  if (visits_.empty()) {
    for (std::uint64_t t = 0; t < x.count; ++t)
      std::fill_n(y + static_cast<std::ptrdiff_t>(t) * stride, stride, std::uint16_t{0});
    return;
  }
  const std::uint64_t expert = distinct_.front();
  begin_total(cache.spec(layer, expert, cache.num_matrices(layer, expert) - 1).rows, x.count);
  const TaskList tasks(*this);
  run_experts(cache, layer, kind, x, 0);
  round_total(x.count, y, stride);
}

void Engine::moe(ExpertCache& cache, std::uint64_t layer, const MoeBlock& block, const Input& x,
                 std::uint16_t* y, std::ptrdiff_t stride) {
  const Turn turn(*this);
  const Columns columns = ask_for_experts(cache, layer, block, x);
  finish_moe(cache, layer, block, x, columns, y, stride);
}

// From the router on to reads under way; the columns are those of `x`, ready.
Columns Engine::ask_for_experts(ExpertCache& cache, std::uint64_t layer, const MoeBlock& block,
                                const Input& x) {
  const Columns columns = ready(x, block.router->columns(), block_columns_);
  const Routing routing = route(block, columns);
  note_routing(layer, routing.k);
  list_visits(routing, x.count);
  cache.prefetch(layer, distinct_, tokens_, x.count);
  return columns;
}

void Engine::finish_moe(ExpertCache& cache, std::uint64_t layer, const MoeBlock& block,
                        const Input& x, const Columns& columns, std::uint16_t* y,
                        std::ptrdiff_t stride) {
  begin_total(block.router->columns(), x.count);
  const TaskList tasks(*this);
  if (block.shared) {
    // It comes first: while it is multiplied, others are read.
    tasks_.push_back({block.shared->matrices, block.shared->gate});
    tasks_.back().x = columns;
    tasks_.back().visits = shared_visits_;
  }
  run_experts(cache, layer, block.gate, x, block.shared ? x.count : 0);
  round_total(x.count, y, stride);
}

// Logits of all tokens, what they choose, and how much the shared expert weighs for each.
Routing Engine::route(const MoeBlock& block, const Columns& x) {
  const RouterRule& rule = block.rule;
  const std::uint64_t experts = rule.num_experts;
  auto* logits = grown<float>(logits_, experts * x.count);
  shared_visits_.resize(x.count);
  for (std::uint64_t t = 0; t < x.count; ++t) shared_visits_[t] = {0, t, 1.0F};
  const auto keep = [&](std::size_t m, const float* values, std::uint64_t begin, std::uint64_t rows,
                        std::uint32_t c) {
    if (m == 0)
      std::copy_n(values, rows, logits + c * experts + begin);
    else
      shared_visits_[c].weight = 1.0F / (1.0F + exp_of(-values[0]));
  };
  if (block.shared_gate != nullptr)
    products(std::array{block.router, block.shared_gate}, x, keep);
  else
    products(std::array{block.router}, x, keep);
  return choose(rule, logits, x.count);
}

Routing Engine::choose(const RouterRule& rule, const float* logits, std::uint64_t tokens) {
  chosen_.resize(tokens * rule.k);
  weights_.resize(tokens * rule.k);
  pool_->run(tokens, kPieceTokens, [&](unsigned thread, std::uint64_t begin, std::uint64_t end) {
    for (std::uint64_t t = begin; t < end; ++t)
      routers_[thread].choose(rule, logits + t * rule.num_experts, &chosen_[t * rule.k],
                              &weights_[t * rule.k]);
  });
  return {chosen_.data(), weights_.data(), rule.k, rule.num_experts};
}

// States change little from layer to layer: what the next router makes of these is most of what it
// will choose. Nothing of this layer's own visits is touched.
void Engine::look_ahead(ExpertCache& cache, const DecoderLayer& layer, const std::uint16_t* x,
                        std::uint64_t tokens) {
  if (layer.next == nullptr || cache.holds_all()) return;
  const PackedMatrix& router = *layer.next->moe->router;
  const std::uint64_t hidden = router.columns(), experts = router.rows();
  auto* normed = grown<std::uint16_t>(ahead_, tokens * hidden);
  rms_norm(x, tokens, layer.next->before_mlp, normed, isa_, *pool_);
  auto* logits = grown<float>(logits_, experts * tokens);
  const Input states{normed, static_cast<std::ptrdiff_t>(hidden), tokens};
  product_wide(router, ready(states, hidden, columns_), logits,
               static_cast<std::ptrdiff_t>(experts));
  const Routing routing = choose(layer.next->moe->rule, logits, tokens);
  guesses_.assign(routing.experts, routing.experts + tokens * routing.k);
  std::sort(guesses_.begin(), guesses_.end());
  guesses_.erase(std::unique(guesses_.begin(), guesses_.end()), guesses_.end());
  guessed_layer_ = layer.next_number;
  cache.look_ahead(guessed_layer_, guesses_);
}

// Runs all visits, and what tasks_ holds already: the shared expert, for `shared` tokens.
void Engine::run_experts(ExpertCache& cache, std::uint64_t layer, Gate kind, const Input& x,
                         std::uint64_t shared) {
  pending_.clear();
  for (auto first = visits_.begin(); first != visits_.end();) {
    const auto last = std::find_if(
        first, visits_.end(), [&](const Visit& visit) { return visit.expert != first->expert; });
    pending_.emplace_back(first, last);
    first = last;
  }
  const std::uint64_t columns = shared + visits_.size();
  kept_columns_ = columns <= kFewColumns ? columns : 0;
  if (kept_columns_ != 0) grown<float>(kept_, columns * width_);
  if (!tasks_.empty()) run_long_task(cache, layer);
  do {
    if (kept_columns_ != 0) join_resident(cache, layer, kind, shared);
    if (tasks_.empty()) {
      take_expert(cache, layer, kind, pending_.front(), true);
      tasks_.back().place = place_of(pending_.front(), shared);
      pending_.erase(pending_.begin());
    }
    gather_columns(x);
    run_tasks(cache, layer);
    forget_tasks();
    ++groups_;
    give_way(cache, layer);
  } while (!pending_.empty());
  if (kept_columns_ != 0) add_kept(shared);
}

// All but the last columns of the only task, in the turns in which they are multiplied anyway:
// nobody who is urgent waits until a shared expert has seen a whole long prompt.
void Engine::run_long_task(ExpertCache& cache, std::uint64_t layer) {
  GatedTask& task = tasks_.front();
  const Columns x = task.x;
  const std::span<const Visit> visits = task.visits;
  std::uint32_t first = 0;
  const auto take = [&](std::uint32_t count) {
    task.x = {x.data + first * x.stride, x.stride, count};
    task.visits = visits.subspan(first, count);
  };
  for (; x.count - first > kMostColumns; first += kMostColumns) {
    take(kMostColumns);
    run_tasks(cache, layer);
    ++groups_;
    give_way(cache, layer);
  }
  take(x.count - first);
}

// Experts that are in memory become tasks, and are pending no more.
void Engine::join_resident(ExpertCache& cache, std::uint64_t layer, Gate kind,
                           std::uint64_t shared) {
  std::size_t left = 0;
  for (const std::span<const Visit> visits : pending_) {
    if (tasks_.size() < kTasksTogether && take_expert(cache, layer, kind, visits, false))
      tasks_.back().place = place_of(visits, shared);
    else
      pending_[left++] = visits;
  }
  pending_.resize(left);
}

std::uint64_t Engine::place_of(std::span<const Visit> visits, std::uint64_t shared) const {
  return shared + static_cast<std::uint64_t>(visits.data() - visits_.data());
}

// Makes a task of an expert, if it is in memory or may be waited for.
bool Engine::take_expert(ExpertCache& cache, std::uint64_t layer, Gate kind,
                         std::span<const Visit> visits, bool waits) {
  const std::uint64_t expert = visits.front().expert;
  const std::size_t n = cache.num_matrices(layer, expert);
  bool decodes = false;  // before it multiplies, to where there is room for one expert
  for (std::size_t matrix = 0; matrix < n; ++matrix)
    decodes =
        decodes || !PackedMatrix::is_multiplied_packed(cache.spec(layer, expert, matrix).codec);
  if (waits)
    held_.push_back({cache.acquire(layer, expert), {}});
  else if (std::optional<Lease> lease = cache.try_acquire(layer, expert, decodes))
    held_.push_back({std::move(*lease), {}});
  else
    return false;
  Held& held = held_.back();
  const auto take = [&](std::size_t matrix) {
    try {
      return &held.matrices[matrix % 3].emplace(packed(cache, held.lease, layer, expert, matrix));
    } catch (const CorruptError& error) {
      throw error.layer ? error : cache.located(error, layer, expert, matrix);
    }
  };
  const PackedMatrix* gate = n == 3 ? take(0) : nullptr;
  const PackedMatrix* up = take(n - 2);
  tasks_.push_back({{gate, up, take(n - 1)}, kind});
  tasks_.back().visits = visits;
  tasks_.back().is_routed = true;
  return true;
}

// The columns of each task, side by side.
void Engine::gather_columns(const Input& x) {
  std::uint64_t size = 0;
  for (const GatedTask& task : tasks_)
    size += task.visits.size() * column_stride(task.matrices.up->columns());
  auto* to = aligned_room<std::uint16_t>(columns_, size);
  for (GatedTask& task : tasks_) {
    if (!task.is_routed) continue;  // has its columns
    const std::uint64_t weights = task.matrices.up->columns(), count = task.visits.size();
    task.x =
        copy_columns(x, weights, count, to, [&](std::uint64_t c) { return task.visits[c].token; });
    to += count * column_stride(weights);
  }
}

void Engine::run_tasks(const ExpertCache& cache, std::uint64_t layer) {
  const auto at_work = [&](const GatedTask& task, std::size_t matrix, const auto& work) {
    try {
      work();
    } catch (const CorruptError& error) {
      if (!task.is_routed) throw;
      throw cache.located(error, layer, task.visits.front().expert, matrix);
    }
  };
  multiply_inner(tasks_, at_work);
  multiply_outer(at_work);
}

// The last products of the tasks.
template <class AtWork>
void Engine::multiply_outer(const AtWork& at_work) {
  if (kept_columns_ != 0)
    keep_outer(at_work);
  else
    add_outer(at_work);
}

// Kept: a piece is of one task, long enough that its first reads, which nobody has asked memory for
// beforehand, do not count.
template <class AtWork>
void Engine::keep_outer(const AtWork& at_work) {
  cuts_.clear();
  for (const GatedTask& task : tasks_) {
    const PackedMatrix& down = *task.matrices.down;
    cuts_.push_back({width_, piece_rows(down.row_unit(), down.columns(), task.inner.count)});
  }
  auto* kept = reinterpret_cast<float*>(kept_.data());
  run_pieces(cuts_, [&](unsigned thread, std::size_t t, std::uint64_t begin, std::uint64_t end) {
    const GatedTask& task = tasks_[t];
    at_work(task, task.last_matrix(), [&] {
      multipliers_[thread]->rows(*task.matrices.down, begin, end, task.inner,
                                 kept + task.place * width_ + begin,
                                 static_cast<std::ptrdiff_t>(width_));
    });
  });
}

// Weighed and added to the totals of the tokens at once.
template <class AtWork>
void Engine::add_outer(const AtWork& at_work) {
  std::uint64_t unit = 1, weights = 0;
  for (const GatedTask& task : tasks_) {
    unit = std::lcm(unit, task.matrices.down->row_unit());
    weights += task.matrices.down->columns();
  }
  auto* total = reinterpret_cast<float*>(total_.data());
  pool_->run(width_, piece_rows(unit, weights, 1),
             [&](unsigned thread, std::uint64_t begin, std::uint64_t end) {
               Multiplier& multiplier = *multipliers_[thread];
               const std::uint64_t rows = end - begin;
               for (const GatedTask& task : tasks_) {
                 float* values = multiplier.values(0, rows * task.inner.count);
                 at_work(task, task.last_matrix(), [&] {
                   multiplier.rows(*task.matrices.down, begin, end, task.inner, values,
                                   static_cast<std::ptrdiff_t>(rows));
                 });
                 for (std::uint32_t c = 0; c < task.inner.count; ++c) {
                   const Visit& visit = task.visits[c];
                   dot_.weigh(values + c * rows, rows, visit.weight,
                              total + visit.token * width_ + begin);
                 }
               }
             });
}

// What was kept, in the order of the sum: the shared expert, then the others.
void Engine::add_kept(std::uint64_t shared) {
  const auto* kept = reinterpret_cast<const float*>(kept_.data());
  auto* total = reinterpret_cast<float*>(total_.data());
  for (std::uint64_t place = 0; place < kept_columns_; ++place) {
    const Visit& visit = place < shared ? shared_visits_[place] : visits_[place - shared];
    dot_.weigh(kept + place * width_, width_, visit.weight, total + visit.token * width_);
  }
}

}  // namespace zipmoe
