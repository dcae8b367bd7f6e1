// Replacement policies and replay of recorded routing for Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "policy.h"
#include "replay.h"

namespace nb = nanobind;
using nb::literals::operator""_a;

namespace zipmoe {
namespace {

template <class T>
using Numbers = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;

template <class T>
std::span<const T> numbers_of(const Numbers<T>& array) {
  return {array.data(), array.size()};
}

nb::object as_array(std::vector<std::uint32_t> numbers, std::size_t num_layers) {
  auto* kept = new std::vector<std::uint32_t>(std::move(numbers));
  const nb::capsule owner(
      kept, [](void* p) noexcept { delete static_cast<std::vector<std::uint32_t>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, std::uint32_t, nb::ndim<2>>(
      kept->data(), {kept->size() / num_layers, num_layers}, owner));
}

nb::dict replay_for(const Numbers<std::uint32_t>& experts, const Numbers<std::uint32_t>& tokens,
                    const Numbers<double>& begins, std::uint32_t num_experts,
                    const std::string& policy, std::uint32_t slots,
                    const Numbers<double>& popularity) {
  if (experts.ndim() != 3) throw std::invalid_argument("experts: there must be three dimensions");
  const RecordedRouting routing{numbers_of(experts),
                                num_experts,
                                static_cast<std::uint32_t>(experts.shape(1)),
                                static_cast<std::uint32_t>(experts.shape(2)),
                                numbers_of(tokens),
                                numbers_of(begins)};
  ReplayCounts counts;
  {
    nb::gil_scoped_release release;
    counts = replay(routing, policy, slots, numbers_of(popularity));
  }
  nb::dict named;
  named["hits"] = as_array(std::move(counts.hits), routing.num_layers);
  named["misses"] = as_array(std::move(counts.misses), routing.num_layers);
  named["evictions"] = counts.evictions;
  return named;
}

}  // namespace

void bind_policy(nb::module_& m) {
  m.def("policies", &policy_names);
  m.def("replay", &replay_for, "experts"_a, "tokens"_a, "begins"_a, nb::kw_only(), "num_experts"_a,
        "policy"_a, "slots"_a, "popularity"_a);
}

}  // namespace zipmoe
