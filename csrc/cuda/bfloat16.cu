#include "kernels.cuh"

namespace apet::cuda {
const Kernels kBFloat16 = kernels_of<__nv_bfloat16>();
}
