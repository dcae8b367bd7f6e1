#include "norm.h"

#include <algorithm>
#include <stdexcept>

namespace zipmoe {
namespace {

// Words in one piece of work: less is done sooner than a second thread hears of it.
constexpr std::uint64_t kPieceWords = std::uint64_t{1} << 15;

}  // namespace

void rms_norm(const std::uint16_t* x, std::uint64_t rows, const NormRule& rule, std::uint16_t* out,
              Isa isa, WorkerPool& pool) {
  const bool weighted = rule.weight != nullptr || rule.wide_weight != nullptr;
  if (rule.width == 0 || weighted == (rule.kind == NormKind::plain))
    throw std::invalid_argument("a norm of no width, or whose weights do not fit its kind");
  const NormRow row = norm_row(isa);
  const std::uint64_t grain = std::max<std::uint64_t>(1, kPieceWords / rule.width);
  const auto work = [&](unsigned, std::uint64_t begin, std::uint64_t end) {
    for (std::uint64_t r = begin; r < end; ++r) row(x + r * rule.width, rule, out + r * rule.width);
  };
  if (rows <= grain) return work(0, 0, rows);
  pool.run(rows, grain, work);
}

}  // namespace zipmoe
