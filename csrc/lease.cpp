#include <utility>

#include "cache.h"

namespace zipmoe {

Lease::Lease(Lease&& other) noexcept
    : cache_(std::exchange(other.cache_, nullptr)),
      expert_(other.expert_),
      holding_(other.holding_),
      ends_visit_(other.ends_visit_) {}

Lease::~Lease() {
  if (cache_ != nullptr) cache_->release(expert_, holding_, ends_visit_);
}

std::size_t Lease::num_matrices() const { return matrices().size(); }

std::span<const ExpertMatrix> Lease::matrices() const {
  return cache_->table_.matrices(cache_->table_.records()[expert_]);
}

MatrixSpec Lease::spec(std::size_t which) const {
  MatrixSpec spec = matrices()[which].spec;
  if (holding_.is_decoded) spec.codec = Codec::raw;
  return spec;
}

Extents Lease::extents(std::size_t which) const {
  const ExpertMatrix& matrix = matrices()[which];
  const auto bytes = [](const std::byte* data, std::uint64_t length) {
    return std::span(reinterpret_cast<const std::uint8_t*>(data), length);
  };
  if (holding_.is_decoded)
    return {.sign_mantissa = bytes(decoded(which), decoded_bytes(matrix.spec)), .exponent = {}};
  const SlotLayout& layout = cache_->layout_;
  const auto part = [&](std::size_t extent) {
    const std::size_t pool = layout.pool_of(extent);
    const SlotPool& slots = layout.planes()[layout.pools_of(expert_).first + pool];
    return bytes(cache_->in_slot(slots, holding_.planes[pool],
                                 offset_in_slot(slots.part, matrices(), which, extent)),
                 matrix.extents[extent].length);
  };
  return {.sign_mantissa = part(0), .exponent = part(1)};
}

std::byte* Lease::decoded(std::size_t which) const {
  return cache_->in_slot(cache_->layout_.full(), *holding_.full, decoded_offset(matrices(), which));
}

void Lease::decode_if_promoted(unsigned threads) {
  if (holding_.is_decoded || !holding_.full) return;
  const ExpertRecord& record = cache_->table_.records()[expert_];
  for (std::size_t which = 0; which < matrices().size(); ++which) {
    const MatrixSpec& spec = matrices()[which].spec;
    try {
      decode(spec, extents(which), {decoded(which), static_cast<std::ptrdiff_t>(spec.columns)},
             cache_->isa_, threads);
    } catch (const CorruptError& error) {
      throw cache_->located(error, record.layer, record.expert, which);
    }
  }
  cache_->end_promotion(expert_, holding_);
}

}  // namespace zipmoe
