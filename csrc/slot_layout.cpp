#include "slot_layout.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "error.h"
#include "residency.h"

namespace zipmoe {
namespace {

// What is neither slots nor tables: the ring, the stacks of the reader's threads as far as they are
// used, requests under way, messages of errors.
constexpr std::uint64_t kOverheadBytes = std::uint64_t{1} << 20;
constexpr std::uint64_t kPerRecord = sizeof(std::uint32_t) + 2;  // wanted; read ahead; its class
constexpr std::uint64_t kPerSlot = 192;                          // the read under way
constexpr std::uint64_t kDecodedAlignment = 64;

std::uint64_t part_bytes(Part part, std::span<const ExpertMatrix> matrices) {
  if (part == Part::decoded)
    return ceil_to(decoded_offset(matrices, matrices.size()), kReadAlignment);
  std::uint64_t bytes = 0;
  for (const ExpertMatrix& matrix : matrices) {
    if (part != Part::exponents) bytes += matrix.extents[0].padded();
    if (part != Part::sign_mantissa) bytes += matrix.extents[1].padded();
  }
  return bytes;
}

// Of the largest expert: decoding and multiplying read no further.
std::uint64_t stride_of(const ExpertTable& table, Part part) {
  std::uint64_t most = 0;
  for (const ExpertRecord& record : table.records())
    most = std::max(most, part_bytes(part, table.matrices(record)));
  return most;
}

SlotPool pool_of_part(const ExpertTable& table, Part part, std::uint64_t wanted) {
  const std::uint64_t most = table.records().size();
  return {.part = part,
          .num_slots =
              static_cast<std::uint32_t>(std::min(std::max(wanted, SlotLayout::kLeastSlots), most)),
          .stride = stride_of(table, part)};
}

std::uint64_t bytes_without_pools(const ExpertTable& table) {
  return kOverheadBytes + table.bytes() + table.decode_scratch() +
         table.records().size() * kPerRecord;
}

std::uint64_t pool_bytes(const ExpertTable& table, std::uint64_t num_slots, std::uint64_t stride) {
  return Residency::bytes(table.records().size(), table.num_layers(), num_slots) +
         num_slots * (kPerSlot + stride);
}

// What one slot more adds.
std::uint64_t slot_bytes(const ExpertTable& table, Part part) {
  const std::uint64_t stride = stride_of(table, part);
  return pool_bytes(table, 1, stride) - pool_bytes(table, 0, stride);
}

// What a cache of records without a slot takes.
std::uint64_t bytes_without_slots(const ExpertTable& table, const SlotClasses& classes) {
  return bytes_without_pools(table) + classes.count() * pool_bytes(table, 0, 0);
}

std::vector<SlotPool> record_pools(const SlotClasses& classes, std::uint64_t num_experts) {
  std::vector<SlotPool> pools;
  for (const std::uint32_t num_slots : classes.slots(num_experts, SlotLayout::kLeastSlots))
    pools.push_back(
        {.part = Part::record, .num_slots = num_slots, .stride = classes.stride(pools.size())});
  return pools;
}

// What one takes with the least number of slots.
std::uint64_t least_bytes(const ExpertTable& table) {
  const SlotClasses classes(table);
  std::uint64_t bytes = bytes_without_pools(table);
  for (const SlotPool& pool : record_pools(classes, 0))
    bytes += pool_bytes(table, pool.num_slots, pool.stride);
  return bytes;
}

void check_tiers(const ExpertTable& table, const TierCounts& tiers) {
  if (tiers.full == 0 && tiers.sign_mantissa == 0 && tiers.exponents == 0) return;
  if (stride_of(table, Part::exponents) == 0)
    throw std::invalid_argument(
        "the experts are stored raw: they have one plane, and no tier but compressed");
  for (const ExpertRecord& record : table.records())
    for (const ExpertMatrix& matrix : table.matrices(record))
      if (is_integer(matrix.spec.codec))
        throw std::invalid_argument(
            "the experts are stored as integers: they have no tier but compressed");
}

}  // namespace

SlotLayout::SlotLayout(const ExpertTable& table, std::uint64_t capacity_bytes,
                       const std::optional<TierCounts>& tiers)
    : classes_(table), empty_bytes_(bytes_without_slots(table, classes_)) {
  for (std::size_t i = 0; i < classes_.count(); ++i)
    record_bytes_.push_back(pool_bytes(table, 1, classes_.stride(i)) - pool_bytes(table, 0, 0));
  const std::uint64_t floor = least_bytes(table);
  if (capacity_bytes < floor)
    throw BudgetError("the expert cache needs " + std::to_string(floor) + " bytes, " +
                          std::to_string(capacity_bytes) + " are given: two slots of " +
                          std::to_string(table.largest_record_bytes()) +
                          " bytes and its own tables",
                      floor);
  if (!tiers) {
    planes_ = record_pools(classes_, most_experts(capacity_bytes));
  } else {
    check_tiers(table, *tiers);
    if (tiers->sign_mantissa == 0 && tiers->exponents == 0)
      planes_ = record_pools(classes_, tiers->compressed);
    else
      planes_ = {pool_of_part(table, Part::sign_mantissa, tiers->compressed + tiers->sign_mantissa),
                 pool_of_part(table, Part::exponents, tiers->compressed + tiers->exponents)};
    if (tiers->full > 0) {
      full_ = pool_of_part(table, Part::decoded, tiers->full);
      full_.num_slots =
          static_cast<std::uint32_t>(std::min<std::uint64_t>(tiers->full, table.records().size()));
    }
  }
  std::uint64_t begin = 0;
  for (SlotPool& pool : planes_) {
    pool.begin = begin;
    begin += pool.num_slots * pool.stride;
  }
  full_.begin = begin;
  allocated_bytes_ = needed_bytes(table);
  if (allocated_bytes_ > capacity_bytes)
    throw BudgetError("these tiers need an expert cache of " + std::to_string(allocated_bytes_) +
                          " bytes, " + std::to_string(capacity_bytes) + " are given",
                      allocated_bytes_);
}

std::uint64_t SlotLayout::allocated_bytes(std::span<const std::uint32_t> num_slots) const {
  std::uint64_t bytes = empty_bytes_;
  for (std::size_t i = 0; i < num_slots.size(); ++i) bytes += num_slots[i] * record_bytes_[i];
  return bytes;
}

// The most experts whose slots fit: with every one more, no class has fewer.
std::uint64_t SlotLayout::most_experts(std::uint64_t bytes) const {
  std::uint64_t fits = 0, too_many = classes_.num_experts() + 1;
  while (too_many - fits > 1) {
    const std::uint64_t middle = fits + (too_many - fits) / 2;
    (allocated_bytes(classes_.slots(middle, kLeastSlots)) <= bytes ? fits : too_many) = middle;
  }
  return fits;
}

std::vector<std::uint32_t> SlotLayout::slots_within(std::uint64_t bytes) const {
  std::vector<std::uint32_t> slots = classes_.slots(most_experts(bytes), kLeastSlots);
  for (std::size_t i = 0; i < slots.size(); ++i)
    slots[i] = std::min(slots[i], planes_[i].num_slots);
  return slots;
}

std::uint64_t SlotLayout::floor_bytes(const ExpertTable& table) { return least_bytes(table); }

std::array<std::uint64_t, 5> SlotLayout::tier_bytes(const ExpertTable& table) {
  const auto part = [&](Part which) { return slot_bytes(table, which); };
  const std::uint64_t tables = pool_bytes(table, 0, 0);
  return {bytes_without_pools(table) + 3 * tables, part(Part::decoded),
          part(Part::sign_mantissa) + part(Part::exponents), part(Part::sign_mantissa),
          part(Part::exponents)};
}

TierCounts SlotLayout::tiers() const {
  if (has_records()) {
    std::uint64_t slots = 0;
    for (const SlotPool& pool : planes_) slots += pool.num_slots;
    return {.full = full_.num_slots, .compressed = slots};
  }
  const std::uint64_t first = planes_.front().num_slots, last = planes_.back().num_slots;
  const std::uint64_t whole = std::min(first, last);
  return {full_.num_slots, whole, first - whole, last - whole};
}

std::uint64_t SlotLayout::arena_bytes() const {
  return full_.begin + full_.num_slots * full_.stride;
}

std::uint64_t SlotLayout::needed_bytes(const ExpertTable& table) const {
  std::uint64_t bytes = bytes_without_pools(table);
  for (const SlotPool& pool : planes_) bytes += pool_bytes(table, pool.num_slots, pool.stride);
  if (full_.num_slots > 0) bytes += pool_bytes(table, full_.num_slots, full_.stride);
  return bytes;
}

std::uint64_t offset_in_slot(Part part, std::span<const ExpertMatrix> matrices, std::size_t matrix,
                             std::size_t extent) {
  if (part == Part::record)
    return matrices[matrix].extents[extent].offset - matrices.front().extents[0].offset;
  return part_bytes(part, matrices.first(matrix));
}

std::uint64_t decoded_offset(std::span<const ExpertMatrix> matrices, std::size_t matrix) {
  std::uint64_t offset = 0;
  for (const ExpertMatrix& before : matrices.first(matrix))
    offset += ceil_to(decoded_bytes(before.spec), kDecodedAlignment);
  return offset;
}

std::uint64_t decoded_bytes(const MatrixSpec& spec) {
  return spec.rows * spec.columns * spec.element_bytes;
}

}  // namespace zipmoe
