// Norms for AVX-512.
#include "norm_pointwise.h"

namespace zipmoe {

const NormRow kAvx512Norm = norm_values;

}  // namespace zipmoe
