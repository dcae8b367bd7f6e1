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
#include <vector>

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

// Those of a batch that lie in one tensor.
std::vector<CachedTokens> sequences(const HeadTensor<std::uint16_t>& keys,
                                    const HeadTensor<std::uint16_t>& values, std::uint64_t batch,
                                    std::uint64_t count) {
  std::vector<CachedTokens> cached;
  for (std::uint64_t b = 0; b < batch; ++b)
    cached.push_back({keys.at(b, 0, 0), values.at(b, 0, 0), keys.head, keys.row, values.head,
                      values.row, count});
  return cached;
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
            const std::vector<CachedTokens> cached =
                sequences(tensor_of<std::uint16_t>(keys), tensor_of<std::uint16_t>(values),
                          shape[0], shape[4]);
            const AttentionInput input{
                {shape[0], shape[1], shape[2], shape[3], widths[0], widths[1]},
                tensor_of<const std::uint16_t>(queries),
                cached};
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
