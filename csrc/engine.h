// Whole layers from packed weights: products, gated blocks, experts. One call at a time; one that
// is under way is suspended after a group of experts or a piece of attention if others are urgent.
//
// Which thread computes what changes no bit: every output row belongs to one piece of work, and
// experts are summed in ascending order of their numbers, whatever the order in which they came.
#pragma once
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "cache.h"
#include "engine_call.h"
#include "layer_blocks.h"
#include "matmul.h"
#include "pool.h"
#include "turnstile.h"

namespace zipmoe {

// Which experts `count` tokens go to: `k` each, with their weights. Numbers from num_experts on
// count nothing.
struct Routing {
  const std::int64_t* experts;
  const float* weights;
  std::uint64_t k;
  std::uint64_t num_experts;
};

// What the tokens of one call chose in a layer, [tokens, k].
struct RoutingRecord {
  std::uint64_t layer, k;
  std::vector<std::int64_t> experts;
};

struct EngineCounters {
  std::uint64_t calls = 0;
  std::uint64_t busy_ns = 0;      // in calls, waiting for reads included, but not for other calls
  std::uint64_t groups = 0;       // experts multiplied together, or one
  std::uint64_t suspensions = 0;  // of calls under way
};

class Engine : private EngineCall {
 public:
  // threads = 0: the pool that the process shares.
  Engine(unsigned threads, Isa isa);

  // y[c * stride + r] = the products, `bias` (BF16, may be null) added, rounded to BF16 once.
  void multiply(const PackedMatrix& matrix, const Input& x, const std::uint16_t* bias,
                std::uint16_t* y, std::ptrdiff_t stride);
  // The same without bias, and without rounding to BF16.
  void multiply_wide(const PackedMatrix& matrix, const Input& x, float* y, std::ptrdiff_t stride);
  // y = down (activation(gate x) * up x), what is between the products rounded to BF16 once.
  void gated(const DenseBlock& block, const Input& x, std::uint16_t* y, std::ptrdiff_t stride);
  // Rows of an embedding.
  void decode_rows(const PackedMatrix& matrix, std::span<const std::int64_t> rows,
                   std::uint16_t* out, std::ptrdiff_t stride);
  // y[t] = the sum over a token's experts of weight * gated(x[t]), rounded once.
  void experts(ExpertCache& cache, std::uint64_t layer, const Routing& routing, Gate kind,
               const Input& x, std::uint16_t* y, std::ptrdiff_t stride);
  // The whole block: router, shared expert, routed experts. The shared expert is the first in the
  // sum, the others follow as in `experts`. `y` may not be `x`.
  void moe(ExpertCache& cache, std::uint64_t layer, const MoeBlock& block, const Input& x,
           std::uint16_t* y, std::ptrdiff_t stride);
  // Self-attention of new tokens, from their states to what the layer adds to them:
  // y[batch, queries, output rows].
  void attend(const AttentionBlock& block, const AttentionCall& call, std::uint16_t* y);
  // Both, with the norms before and the sums after them: what the layer makes of call.x, which may
  // be y.
  void run_layer(ExpertCache& cache, std::uint64_t number, const DecoderLayer& layer,
                 const AttentionCall& call, std::uint16_t* y);
  // One product of one expert, rounded to BF16.
  void multiply_expert(ExpertCache& cache, std::uint64_t layer, std::uint64_t expert,
                       std::uint64_t matrix, const Input& x, std::uint16_t* y,
                       std::ptrdiff_t stride);

  // What a thread does while it holds one of these goes before all that others do.
  using Urgent = Turnstile::Urgent;
  [[nodiscard]] std::unique_ptr<Urgent> urgent() { return std::make_unique<Urgent>(turnstile_); }

  // From now on, notes what the routers of MoE blocks choose, or stops to.
  void record_routing(bool is_on);
  // What was noted since it was last asked for.
  std::vector<RoutingRecord> take_routing();

  // The exclusive or of all whole words: for measuring how fast memory is read.
  std::uint64_t read(std::span<const std::uint8_t> bytes);

  [[nodiscard]] Isa isa() const { return isa_; }
  [[nodiscard]] unsigned num_threads() const { return pool_->num_threads(); }
  [[nodiscard]] EngineCounters counters() const;

 private:
  class Turn;
  class TaskList;
  void begin_turn();
  void end_turn();
  void give_way();
  void give_way(ExpertCache& cache, std::uint64_t layer);

  template <class Work>
  void run_pieces(std::span<Cut> cuts, const Work& work);
  template <std::size_t kMatrices, class Keep>
  void products(const std::array<const PackedMatrix*, kMatrices>& matrices, const Columns& x,
                const Keep& keep);
  template <class Keep>
  void products(const PackedMatrix& matrix, const Columns& x, const Keep& keep);
  template <class TokenOf>
  Columns copy_columns(const Input& x, std::uint64_t weights, std::uint64_t count,
                       std::uint16_t* to, const TokenOf& token_of);
  Columns ready(const Input& x, std::uint64_t weights, Buffer& room);
  void product_wide(const PackedMatrix& matrix, const Columns& x, float* y, std::ptrdiff_t stride);
  void product(const PackedMatrix& matrix, const Columns& x, const std::uint16_t* bias,
               std::uint16_t* y, std::ptrdiff_t stride);
  void list_visits(const Routing& routing, std::uint64_t tokens);
  Routing route(const MoeBlock& block, const Columns& x);
  Routing choose(const RouterRule& rule, const float* logits, std::uint64_t tokens);
  void note_routing(std::uint64_t layer, std::uint64_t k);
  void begin_total(std::uint64_t width, std::uint64_t tokens);
  void round_total(std::uint64_t tokens, std::uint16_t* y, std::ptrdiff_t stride);
  void run_experts(ExpertCache& cache, std::uint64_t layer, Gate kind, const Input& x,
                   std::uint64_t shared);
  void run_long_task(ExpertCache& cache, std::uint64_t layer);
  void join_resident(ExpertCache& cache, std::uint64_t layer, Gate kind, std::uint64_t shared);
  [[nodiscard]] std::uint64_t place_of(std::span<const Visit> visits, std::uint64_t shared) const;
  bool take_expert(ExpertCache& cache, std::uint64_t layer, Gate kind,
                   std::span<const Visit> visits, bool waits);
  void forget_tasks();
  void gather_columns(const Input& x);
  void run_tasks(const ExpertCache& cache, std::uint64_t layer);
  template <class AtWork>
  void multiply_inner(std::span<GatedTask> tasks, const AtWork& at_work);
  template <class AtWork>
  void multiply_piece(Multiplier& multiplier, const GatedTask& task, std::uint64_t begin,
                      std::uint64_t end, const AtWork& at_work);
  template <class AtWork>
  void multiply_outer(const AtWork& at_work);
  template <class AtWork>
  void keep_outer(const AtWork& at_work);
  template <class AtWork>
  void add_outer(const AtWork& at_work);
  void add_kept(std::uint64_t shared);
  Columns ask_for_experts(ExpertCache& cache, std::uint64_t layer, const MoeBlock& block,
                          const Input& x);
  void finish_moe(ExpertCache& cache, std::uint64_t layer, const MoeBlock& block, const Input& x,
                  const Columns& columns, std::uint16_t* y, std::ptrdiff_t stride);
  void look_ahead(ExpertCache& cache, const DecoderLayer& layer, const std::uint16_t* x,
                  std::uint64_t tokens);
  void run_attention(const AttentionBlock& block, const AttentionCall& call, std::uint16_t* y);
  void add(const std::uint16_t* x, const std::uint16_t* more, std::uint64_t rows,
           std::uint64_t width, std::uint16_t* out);
  void project(const AttentionBlock& block, const Columns& x, std::uint64_t first,
               std::uint64_t tokens);
  void place_heads(const AttentionBlock& block, const AttentionCall& call, std::uint64_t begin,
                   std::uint64_t count);
  void see_keys(const AttentionBlock& block, const AttentionCall& call, std::uint64_t first,
                std::uint64_t queries, std::uint16_t* attended);
  void run_gated(const DenseBlock& block, const Input& x, std::uint16_t* y, std::ptrdiff_t stride);
  PackedMatrix packed(ExpertCache& cache, Lease& lease, std::uint64_t layer, std::uint64_t expert,
                      std::uint64_t matrix);

  std::shared_ptr<WorkerPool> pool_;
  Isa isa_;
  const DotKernels& dot_;
  std::vector<std::unique_ptr<Multiplier>> multipliers_;  // by thread
  Turnstile turnstile_;
  Attention attention_;
  std::vector<Router> routers_;  // by thread
  Buffer decoded_[3];            // matrices of an expert of a task
  EngineCall aside_;             // that of the call suspended, or room for the next
  std::mutex routing_mutex_;
  bool records_routing_ = false;
  std::vector<RoutingRecord> routing_;
  std::chrono::steady_clock::time_point begin_;  // of the turn
  std::atomic<std::uint64_t> calls_ = 0, busy_ns_ = 0, groups_ = 0, suspensions_ = 0;
};

}  // namespace zipmoe
