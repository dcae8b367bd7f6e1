// Whole layers from packed weights: products, gated blocks, experts. One call at a time.
//
// Which thread computes what changes no bit: every output row belongs to one piece of work, and
// experts are summed in ascending order of their numbers, whatever the order in which they came.
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "cache.h"
#include "layer_blocks.h"
#include "matmul.h"
#include "pool.h"

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
  std::uint64_t busy_ns = 0;  // in calls, waiting for reads included
};

class Engine {
 public:
  // threads = 0: the pool that the process shares.
  Engine(unsigned threads, Isa isa);

  // y[c * stride + r] = the products, `bias` (BF16, may be null) added, rounded to BF16 once.
  void multiply(const PackedMatrix& matrix, const Input& x, const std::uint16_t* bias,
                std::uint16_t* y, std::ptrdiff_t stride);
  // The same without bias, and without rounding to BF16.
  void multiply_wide(const PackedMatrix& matrix, const Input& x, float* y, std::ptrdiff_t stride);
  // y = down (activation(gate x) * up x), what is between the products rounded to BF16 once.
  void gated(const GatedMatrices& matrices, Gate kind, const Input& x, std::uint16_t* y,
             std::ptrdiff_t stride);
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
  // Both, with the norms before and the sums after them: what the layer makes of call.x.
  void run_layer(ExpertCache& cache, std::uint64_t number, const DecoderLayer& layer,
                 const AttentionCall& call, std::uint16_t* y);
  // One product of one expert, rounded to BF16.
  void multiply_expert(ExpertCache& cache, std::uint64_t layer, std::uint64_t expert,
                       std::uint64_t matrix, const Input& x, std::uint16_t* y,
                       std::ptrdiff_t stride);

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
  struct Visit {  // one token at one expert
    std::uint64_t expert, token;
    float weight;
  };
  // A gated block for the columns of some visits.
  struct GatedTask {
    GatedMatrices matrices;
    Gate kind;
    std::span<const Visit> visits{};
    Columns x{};
    bool is_routed = false;
    std::uint64_t place = 0;  // of its first column among all of the call
    // Set by multiply_inner: what the last matrix is multiplied with, and how the work is cut.
    Columns inner{};
    std::uint16_t* out = nullptr;
    std::uint64_t grain = 0, end = 0;

    [[nodiscard]] std::size_t last_matrix() const { return matrices.gate == nullptr ? 1 : 2; }
  };
  // An expert in use, and its matrices.
  struct Held {
    Lease lease;
    std::array<std::optional<PackedMatrix>, 3> matrices;
  };
  class TaskList;
  static constexpr std::size_t kTasksTogether = 16;

  template <std::size_t kMatrices, class Keep>
  void products(const std::array<const PackedMatrix*, kMatrices>& matrices, const Columns& x,
                const Keep& keep);
  template <class Keep>
  void products(const PackedMatrix& matrix, const Columns& x, const Keep& keep);
  void product_wide(const PackedMatrix& matrix, const Columns& x, float* y, std::ptrdiff_t stride);
  void product(const PackedMatrix& matrix, const Columns& x, const std::uint16_t* bias,
               std::uint16_t* y, std::ptrdiff_t stride);
  void list_visits(const Routing& routing, std::uint64_t tokens);
  Routing route(const MoeBlock& block, const Columns& x);
  Routing choose(const RouterRule& rule, const float* logits, std::uint64_t tokens);
  void begin_total(std::uint64_t width, std::uint64_t tokens);
  void round_total(std::uint64_t tokens, std::uint16_t* y, std::ptrdiff_t stride);
  void run_experts(ExpertCache& cache, std::uint64_t layer, Gate kind, const Input& x,
                   std::uint64_t shared);
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
  void multiply_piece(Multiplier& multiplier, const GatedTask& task, std::uint64_t piece,
                      const AtWork& at_work);
  template <class AtWork>
  void multiply_outer(const AtWork& at_work);
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
  void project(const AttentionBlock& block, const Columns& x);
  void place_heads(const AttentionBlock& block, const AttentionCall& call);
  PackedMatrix packed(ExpertCache& cache, Lease& lease, std::uint64_t layer, std::uint64_t expert,
                      std::uint64_t matrix);

  std::shared_ptr<WorkerPool> pool_;
  Isa isa_;
  const DotKernels& dot_;
  std::vector<std::unique_ptr<Multiplier>> multipliers_;  // by thread
  std::mutex mutex_;
  Attention attention_;
  std::vector<Visit> visits_;
  std::vector<std::uint64_t> distinct_;  // experts of the visits
  std::vector<std::uint32_t> tokens_;    // of each of these
  std::vector<std::uint64_t> guesses_;
  std::vector<Router> routers_;  // by thread
  std::vector<std::int64_t> chosen_;
  std::vector<float> weights_;  // of the chosen
  bool records_routing_ = false;
  std::vector<RoutingRecord> routing_;
  std::vector<Visit> shared_visits_;
  std::vector<GatedTask> tasks_;
  std::vector<Held> held_;  // of the tasks: never more than kTasksTogether, which it has room for
  std::vector<std::span<const Visit>> pending_;  // experts of the call that are no tasks yet
  std::uint64_t width_ = 0;                      // of what experts give
  std::uint64_t kept_columns_ = 0;  // whose results are kept; 0: they are added at once
  Buffer columns_, block_columns_, inner_, kept_, total_, decoded_[3], logits_;
  Buffer heads_[3], attended_;      // queries, keys and values of new tokens; what attention gives
  Buffer ahead_, normed_, change_;  // states before and after a half of a layer
  std::atomic<std::uint64_t> calls_ = 0, busy_ns_ = 0;
};

}  // namespace zipmoe
