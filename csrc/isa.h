// Which instruction sets this machine has. The only place that asks the processor.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace zipmoe {

enum class Isa { portable, avx2, avx512, avx512bf16 };

// The best one of this machine. avx512 means F, BW, VL, VBMI and VBMI2 together, avx512bf16 adds
// BF16 (products only: codecs have no use for it); avx2 includes BMI, BMI2 and FMA.
Isa best_isa();
// All that this machine can run, best first; never empty.
std::vector<Isa> available_isas();

std::string_view name(Isa isa);
// Throws std::invalid_argument for an unknown name or one this machine cannot run.
Isa isa_from_name(std::string_view name);

}  // namespace zipmoe
