#include "kernels.cuh"

namespace apet::cuda {
const Kernels kFloat16 = kernels_of<__half>();
}
