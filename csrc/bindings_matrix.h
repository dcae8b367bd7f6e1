// Packed matrices as the bindings hold them, and tensors that come as addresses.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <span>
#include <utility>

#include "matmul.h"

namespace zipmoe {

using Extent = nanobind::ndarray<const std::uint8_t, nanobind::ndim<1>, nanobind::c_contig,
                                 nanobind::device::cpu>;
using Address = std::uintptr_t;

// A matrix with the arrays that it lies in.
struct HeldMatrix {
  std::pair<Extent, Extent> arrays;
  PackedMatrix matrix;
};

inline std::span<const std::uint8_t> bytes_of(const Extent& extent) {
  return {extent.data(), extent.size()};
}

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace zipmoe
