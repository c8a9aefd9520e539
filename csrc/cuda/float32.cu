#include "kernels.cuh"

namespace apet::cuda {
const Kernels kFloat32 = kernels_of<float>();
}
