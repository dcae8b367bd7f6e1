// Attention for Python. As in bindings_engine.cpp, tensors come as addresses with their strides in
// elements: whoever calls has checked dtypes and shapes (zipmoe.attention).
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "attention.h"
#include "bindings.h"
#include "bindings_tensors.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace zipmoe {
namespace {

AttentionSinks sinks_of(const std::optional<Tensor>& sinks) {
  if (!sinks) return {};
  const auto& [address, strides] = *sinks;
  return {reinterpret_cast<const float*>(address), strides[0], strides[1], strides[2]};
}

}  // namespace

void bind_attention(nb::module_& m) {
  nb::class_<Attention>(m, "Attention")
      .def(
          "__init__",
          [](Attention* self, unsigned threads, const std::string& isa) {
            new (self) Attention(threads, isa.empty() ? best_isa() : isa_from_name(isa));
          },
          nb::kw_only(), "threads"_a = 0, "isa"_a = "")
      .def_prop_ro("isa", [](const Attention& self) { return std::string(name(self.isa())); })
      .def(
          "run",
          [](Attention& self, const std::array<std::uint64_t, 5>& shape,
             const std::array<std::uint32_t, 2>& widths, const Tensor& queries, const Tensor& keys,
             const Tensor& values, const Tensor& out, float scaling, float softcap, bool causal,
             std::int64_t offset, std::uint64_t window, const std::optional<Mask>& mask,
             const std::optional<Mask>& bias, const std::optional<Tensor>& sinks) {
            const AttentionInput input{
                {shape[0], shape[1], shape[2], shape[3], shape[4], widths[0], widths[1]},
                tensor_of<const std::uint16_t>(queries),
                tensor_of<const std::uint16_t>(keys),
                tensor_of<const std::uint16_t>(values)};
            const AttentionRule rule{scaling, softcap,       causal,        offset,
                                     window,  mask_of(mask), mask_of(bias), sinks_of(sinks)};
            nb::gil_scoped_release release;
            self.run(input, rule, tensor_of<std::uint16_t>(out));
          },
          "shape"_a, "widths"_a, "queries"_a, "keys"_a, "values"_a, "out"_a, nb::kw_only(),
          "scaling"_a, "softcap"_a = 0.0F, "causal"_a = false, "offset"_a = 0, "window"_a = 0,
          "mask"_a = nb::none(), "bias"_a = nb::none(), "sinks"_a = nb::none());
}

}  // namespace zipmoe
