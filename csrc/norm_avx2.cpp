// Norms for AVX2.
#include "norm_pointwise.h"

namespace zipmoe {

const NormRow kAvx2Norm = norm_values;

}  // namespace zipmoe
