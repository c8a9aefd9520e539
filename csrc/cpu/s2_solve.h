// s2: the factor L of S S^T + ridge I = L L^T grows by a row with each basis token. The row is the y that the token
// already has. (The substitutions with L, token by token, are in s1_s3_sweep.h and s3_residual.h.)
#pragma once
#include <cmath>

#include "image.h"

namespace apet::cpu {

// Makes token p, which is up to date, the next basis token. Returns false and does nothing if qr must stop, because p
// cannot be distinguished from a combination of the earlier basis tokens.
static bool add_basis_token(const Input& in, Scores& scores, Basis& basis, int32_t p) {
  const int32_t m = basis.size;
  const double pivot = (double)scores.resid_sq[p] + in.ridge;  // ||p||^2 + ridge - sum_j l_j^2
  const bool dependent = pivot <= 4 * 0x1p-24 * scores.norm_sq[p];
  if (m > 0 && in.select == APET_QR && dependent) return false;
  for (int32_t j = 0; j < m; j++) basis.L[m][j] = scores.y[(int64_t)j * in.tokens + p];
  basis.inv_diag[m] = dependent ? 0 : 1 / std::sqrt(pivot);
  basis.token[m] = p;
  basis.norm_sq[m] = scores.norm_sq[p];
  basis.size = m + 1;
  scores.pick_value[p] = kNeverPicked;
  return true;
}

}  // namespace apet::cpu
