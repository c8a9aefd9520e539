// Exchanges among the lanes of a warp: ballots, reductions, and matrix instructions with PTX's fragment maps.
#include <cstring>

#include "include/simt_ptx.h"

namespace simt {

void combine_nothing(void* const*, uint32_t) {}

void combine_ballot(void* const* operands, uint32_t lanes) {
  uint64_t ballot = 0;
  for (unsigned l = 0; l < 32; l++)
    if (lanes >> l & 1) ballot |= *static_cast<uint64_t*>(operands[l]) << l;
  for (unsigned l = 0; l < 32; l++)
    if (lanes >> l & 1) *static_cast<uint64_t*>(operands[l]) = ballot;
}

void combine_match(void* const* operands, uint32_t lanes) {
  uint64_t values[32] = {};
  for (unsigned l = 0; l < 32; l++)
    if (lanes >> l & 1) values[l] = *static_cast<uint64_t*>(operands[l]);
  for (unsigned l = 0; l < 32; l++) {
    if (!(lanes >> l & 1)) continue;
    uint64_t same = 0;
    for (unsigned k = 0; k < 32; k++)
      if (lanes >> k & 1 && values[k] == values[l]) same |= uint64_t(1) << k;
    *static_cast<uint64_t*>(operands[l]) = same;
  }
}

template <Reduction kind, class T>
void combine_reduce(void* const* operands, uint32_t lanes) {
  bool first = true;
  T result = 0;
  for (unsigned l = 0; l < 32; l++) {
    if (!(lanes >> l & 1)) continue;
    const T value = *static_cast<T*>(operands[l]);
    if (first) {
      result = value;
    } else {
      switch (kind) {
        case Reduction::kAdd: result = (T)((unsigned)result + (unsigned)value); break;
        case Reduction::kMin: result = std::min(result, value); break;
        case Reduction::kMax: result = std::max(result, value); break;
        case Reduction::kAnd: result &= value; break;
        case Reduction::kOr: result |= value; break;
        case Reduction::kXor: result ^= value; break;
      }
    }
    first = false;
  }
  for (unsigned l = 0; l < 32; l++)
    if (lanes >> l & 1) *static_cast<T*>(operands[l]) = result;
}
#define SIMT_BOTH(kind)                                                                           \
  template void combine_reduce<Reduction::kind, unsigned>(void* const* operands, uint32_t lanes); \
  template void combine_reduce<Reduction::kind, int>(void* const* operands, uint32_t lanes);
SIMT_BOTH(kAdd)
SIMT_BOTH(kMin)
SIMT_BOTH(kMax)
SIMT_BOTH(kAnd)
SIMT_BOTH(kOr)
SIMT_BOTH(kXor)
#undef SIMT_BOTH

namespace {
void whole_warp(const char* instruction, uint32_t lanes) {
  if (~lanes) fault("%s needs all 32 lanes of the warp; those of 0x%08x are there", instruction, lanes);
}
}  // namespace

void combine_ldmatrix_x4(void* const* operands, uint32_t lanes) {
  whole_warp("ldmatrix", lanes);
  for (unsigned l = 0; l < 32; l++)
    for (unsigned i = 0; i < 4; i++)
      static_cast<Ldmatrix*>(operands[l])->result[i] = static_cast<Ldmatrix*>(operands[8 * i + l / 4])->row[l % 4];
}

namespace {

// d [16, 8] += a [16, 16] b [16, 8]. Lane l = 4 g + q holds, of
//   a: rows g, g + 8, g, g + 8 and columns 2q, 2q, 2q + 8, 2q + 8 (and the next one each) in registers 0 to 3
//   b: rows 2q and 2q + 8 (and the next one each) of column g in registers 0 and 1
//   d: row g, columns 2q, 2q + 1, then row g + 8, the same columns
// The manual does not specify the order of the sum over k; here it ascends, fma by fma.
template <float (*kWiden)(uint16_t)>
void combine_mma(void* const* operands, uint32_t lanes) {
  whole_warp("mma", lanes);
  float a[16][16], b[16][8], d[16][8];
  for (unsigned l = 0; l < 32; l++) {
    const Mma& lane = *static_cast<const Mma*>(operands[l]);
    const unsigned g = l / 4, q = l % 4;
    for (unsigned i = 0; i < 4; i++)
      for (unsigned half = 0; half < 2; half++)
        a[g + 8 * (i % 2)][2 * q + 8 * (i / 2) + half] = kWiden((uint16_t)(lane.a[i] >> 16 * half));
    for (unsigned i = 0; i < 2; i++)
      for (unsigned half = 0; half < 2; half++) b[2 * q + 8 * i + half][g] = kWiden((uint16_t)(lane.b[i] >> 16 * half));
    for (unsigned i = 0; i < 4; i++) d[g + 8 * (i / 2)][2 * q + i % 2] = lane.d[i];
  }
  for (unsigned r = 0; r < 16; r++)
    for (unsigned k = 0; k < 16; k++)
      for (unsigned c = 0; c < 8; c++) d[r][c] = __builtin_fmaf(a[r][k], b[k][c], d[r][c]);
  for (unsigned l = 0; l < 32; l++) {
    float* result = static_cast<const Mma*>(operands[l])->d;
    for (unsigned i = 0; i < 4; i++) result[i] = d[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2];
  }
}

}  // namespace

void combine_mma_half(void* const* operands, uint32_t lanes) { combine_mma<half_to_float>(operands, lanes); }
void combine_mma_bfloat16(void* const* operands, uint32_t lanes) { combine_mma<bfloat16_to_float>(operands, lanes); }

}  // namespace simt
