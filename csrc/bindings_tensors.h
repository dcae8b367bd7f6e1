// Tensors of attention as Python hands them over: addresses with their strides in elements.
#pragma once
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "attention.h"
#include "bindings_matrix.h"

namespace zipmoe {

using Strides = std::array<std::int64_t, 3>;
using Tensor = std::tuple<Address, Strides>;
// Address, strides of batch, head, query and key, name of the type.
using Mask = std::tuple<Address, std::array<std::int64_t, 4>, std::string>;

template <class Word>
HeadTensor<Word> tensor_of(const Tensor& tensor) {
  const auto& [address, strides] = tensor;
  return {reinterpret_cast<Word*>(address), strides[0], strides[1], strides[2]};
}

inline MaskType mask_type(const std::string& name) {
  if (name == "bool") return MaskType::boolean;
  if (name == "bfloat16") return MaskType::bfloat16;
  if (name == "float32") return MaskType::float32;
  throw std::invalid_argument("a mask of type " + name);
}

inline AttentionMask mask_of(const std::optional<Mask>& mask) {
  if (!mask) return {};
  const auto& [address, strides, type] = *mask;
  return {reinterpret_cast<const void*>(address),
          strides[0],
          strides[1],
          strides[2],
          strides[3],
          mask_type(type)};
}

}  // namespace zipmoe
