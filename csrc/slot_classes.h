// Slots for records come in a few sizes, because the experts of one store may be stored with very
// different numbers of bits: a class of experts of about one length has slots of that length. Pure
// arithmetic.
#pragma once
#include <cstdint>
#include <vector>

#include "expert_table.h"

namespace zipmoe {

class SlotClasses {
 public:
  explicit SlotClasses(const ExpertTable& table);

  [[nodiscard]] std::size_t count() const { return classes_.size(); }
  [[nodiscard]] std::uint64_t num_experts() const { return of_.size(); }
  [[nodiscard]] std::uint64_t stride(std::size_t which) const { return classes_[which].stride; }
  // By record.
  [[nodiscard]] std::uint8_t of(std::uint32_t record) const { return of_[record]; }
  // How many slots each class has where so many experts are held: the same share of every class,
  // but at least `least` of each, and no more than it has experts.
  [[nodiscard]] std::vector<std::uint32_t> slots(std::uint64_t num_experts,
                                                 std::uint64_t least) const;

 private:
  struct Class {
    std::uint64_t stride = 0;  // its longest record
    std::uint64_t num_experts = 0;
  };
  std::vector<Class> classes_;  // longest first
  std::vector<std::uint8_t> of_;
};

}  // namespace zipmoe
