// s1 in rounds: the candidates of a round, and the picks among them.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "s4_topk.h"

namespace apet::cpu {

#include "weight.h"

// Starts the rounds, from the norms.
static void begin_rounds(const Input& in, Scores& scores, Rounds& rounds) {
  rounds.number = rounds.begin = rounds.size = 0;
  for (int32_t i = 0; i < in.tokens; i++)
    scores.pick_value[i] = finite(scores, i) ? weighted(scores.weight, i, scores.norm_sq[i]) : kNeverPicked;
}

// Lists the candidates of the next round, ascending: the tokens of largest pick_value above 0, kPool for each pick. In
// the first round they include the token `start`, if one is given.
static void list_pool(const Input& in, const Scores& scores, int64_t start, Rounds& rounds, uint32_t* rank) {
  const int64_t t = rounds.number++, basis = in.max_basis;
  rounds.begin += rounds.size;
  rounds.size = (int32_t)((t + 1) * basis / kRounds - t * basis / kRounds);
  rounds.first = t == 0 && start >= 0 && finite(scores, start) ? (int32_t)start : -1;
  int64_t open_count = 0;
  for (int32_t i = 0; i < in.tokens; i++) {
    const float value = scores.pick_value[i] > 0 ? scores.pick_value[i] : 0;
    std::memcpy(rank + i, &value, sizeof value);
    if (i == rounds.first) rank[i] = UINT32_MAX;
    open_count += rank[i] > 0;
  }
  rounds.pool_count = 0;
  const int64_t wanted = std::min(kPool * rounds.size, open_count);
  if (wanted == 0) {
    rounds.size = 0;
    return;
  }
  Cut cut = cut_at(rank, in.tokens, wanted);
  for (int32_t i = 0; i < in.tokens; i++)
    if (cut.takes(rank[i])) rounds.pool[rounds.pool_count++] = i;
}

// Pivoted Cholesky factorisation of the pool's residual Gram matrix. It gives the picks of the round, `size` of them or
// fewer if the next one is dependent, and the L of the round.
static void pick_round(const Input& in, Scores& scores, Rounds& rounds) {
  const int64_t count = rounds.pool_count, most = rounds.size;
  double *diag = rounds.diag, *column = rounds.column;
  for (int64_t i = 0; i < count; i++) diag[i] = rounds.gram[i * count + i];
  for (int64_t i = 0; i < count; i++)  // the lower triangle is not computed
    for (int64_t j = 0; j < i; j++) rounds.gram[i * count + j] = rounds.gram[j * count + i];
  rounds.size = 0;
  for (; rounds.size < most; rounds.size++) {
    const int32_t k = rounds.size;
    int64_t best = -1;
    double best_value = 0;
    for (int64_t i = 0; i < count; i++) {
      if (scores.pick_value[rounds.pool[i]] == kNeverPicked) continue;
      if (k == 0 && rounds.pool[i] == rounds.first) {
        best = i;
        break;
      }
      const double value = std::min(diag[i] * weighted(scores.weight, rounds.pool[i], 1.0f), (double)__FLT_MAX__);
      if (best < 0 || value > best_value) best = i, best_value = value;
    }
    if (best < 0) return;
    const int32_t token = rounds.pool[best];
    const double pivot = diag[best] + in.ridge;
    const bool dependent = pivot <= 4 * 0x1p-24 * std::max(rounds.begin, 1) * scores.norm_sq[token];
    if ((dependent || !(diag[best] > 0)) && !(k == 0 && token == rounds.first)) return;
    const double inv_diag = dependent ? 0 : 1 / std::sqrt(pivot);
    const float* row = rounds.gram + best * count;
    for (int64_t i = 0; i < count; i++) column[i] = row[i];
    for (int32_t j = 0; j < k; j++) {
      const float* y_j = rounds.pool_y + j * count;
      const double l_j = y_j[best];
      for (int64_t i = 0; i < count; i++) column[i] -= l_j * y_j[i];
      rounds.L[(int64_t)k * rounds.most + j] = y_j[best];
    }
    float* y_k = rounds.pool_y + k * count;
    for (int64_t i = 0; i < count; i++) {
      const double y = column[i] * inv_diag;
      y_k[i] = (float)y;
      diag[i] -= y * y;
    }
    rounds.inv_diag[k] = (float)inv_diag;
    rounds.token[rounds.begin + k] = token;
    scores.pick_value[token] = kNeverPicked;
  }
}

// s3 of a basis that was picked in rounds: computes e_sq from resid_sq, without the ridge penalty.
static void rank_by_residual(const Input& in, Scores& scores) {
  const float rounding = 4.0f * (float)in.max_basis * 0x1p-24f;
  for (int32_t i = 0; i < in.tokens; i++) {
    const float value = scores.resid_sq[i] > rounding * scores.norm_sq[i] ? scores.resid_sq[i] : 0.0f;
    scores.e_sq[i] = finite(scores, i) ? weighted(scores.weight, i, value) : __builtin_inff();
  }
}

}  // namespace apet::cpu
