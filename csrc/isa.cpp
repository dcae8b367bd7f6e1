#include "isa.h"

#include <stdexcept>

namespace zipmoe {
namespace {

bool runs(Isa isa) {
  if (isa == Isa::portable) return true;
#if defined(__x86_64__)
  if (isa == Isa::avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx512bf16 && !__builtin_cpu_supports("avx512bf16")) return false;
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2");
#else
  return false;
#endif
}

}  // namespace

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (Isa isa : {Isa::avx512bf16, Isa::avx512, Isa::avx2, Isa::portable})
    if (runs(isa)) isas.push_back(isa);
  return isas;
}

Isa best_isa() { return available_isas().front(); }

std::string_view name(Isa isa) {
  switch (isa) {
    case Isa::avx512bf16:
      return "avx512bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    case Isa::portable:
      return "portable";
  }
  return "?";
}

Isa isa_from_name(std::string_view wanted) {
  for (Isa isa : available_isas())
    if (name(isa) == wanted) return isa;
  throw std::invalid_argument("instruction set '" + std::string(wanted) +
                              "' is unknown or not on this machine");
}

}  // namespace zipmoe
