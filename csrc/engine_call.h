// What a call of the engine has under way. The engine has that of the call inside; a call that is
// suspended takes its own with it (Engine::give_way).
#pragma once
#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "buffer.h"
#include "cache.h"
#include "layer_blocks.h"
#include "matmul.h"

namespace zipmoe {

class EngineCall {
 public:
  EngineCall() { held_.reserve(kTasksTogether + 1); }

 protected:
  static constexpr std::size_t kTasksTogether = 16;

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
    // Set by multiply_inner: what the last matrix is multiplied with.
    Columns inner{};
    std::uint16_t* out = nullptr;

    [[nodiscard]] std::size_t last_matrix() const { return matrices.gate == nullptr ? 1 : 2; }
  };
  // Rows that are cut into pieces of work. end: of their pieces among those of all that are cut.
  struct Cut {
    std::uint64_t rows, grain, end = 0;
  };
  // An expert in use, and its matrices.
  struct Held {
    Lease lease;
    std::array<std::optional<PackedMatrix>, 3> matrices;
  };

  std::vector<Visit> visits_;
  std::vector<std::uint64_t> distinct_;  // experts of the visits
  std::vector<std::uint32_t> tokens_;    // of each of these
  std::vector<std::uint64_t> guesses_;   // experts that the layer after this one may want
  std::uint64_t guessed_layer_ = 0;
  std::vector<std::int64_t> chosen_;
  std::vector<float> weights_;  // of the chosen
  std::vector<Visit> shared_visits_;
  std::vector<GatedTask> tasks_;
  std::vector<Cut> cuts_;   // of tasks
  std::vector<Held> held_;  // of the tasks: never more than kTasksTogether, which it has room for
  std::vector<std::span<const Visit>> pending_;  // experts of the call that are no tasks yet
  std::uint64_t width_ = 0;                      // of what experts give
  std::uint64_t kept_columns_ = 0;  // whose results are kept; 0: they are added at once
  Buffer columns_, block_columns_, inner_, kept_, total_, logits_;
  Buffer heads_[3], attended_;      // queries, keys and values of new tokens; what attention gives
  Buffer ahead_, normed_, change_;  // states before and after a half of a layer
};

}  // namespace zipmoe
