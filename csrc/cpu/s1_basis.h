// s1: finds the next basis token, and the tokens that have to be updated first.
//
// pick_value only decreases (s1_s3_sweep.h), so the value of a token that is not up to date is an upper bound. A step
// updates the few tokens of largest bound first, the leaders; then only the contenders, tokens whose bound is not below
// the best updated value.
#pragma once
#include <algorithm>

#include "kernels.h"

namespace apet::cpu {

// Tokens that a step updates first: two groups of the sweep, so that two threads have work. In simulation, 16 leaders
// cost more reads on every input tried, and 4 did on random ones.
constexpr int kLeaders = 8;
// Up to this many contenders are all updated, since excluding some of them would cost another stage.
constexpr int kFew = 32;

static bool finite(const Scores& scores, int64_t token) { return scores.norm_sq[token] <= __FLT_MAX__; }

// Returns the candidate of larger pick_value; if they are equal, the lower token.
static Candidate better(const Candidate& a, const Candidate& b) {
  return b.pick_value > a.pick_value || (b.pick_value == a.pick_value && b.token < a.token) ? b : a;
}

// Lists the tokens of largest pick_value as candidates. Returns the smallest of these values, or 0 if they are all the
// tokens that may be picked: no other token exceeds it.
static float find_leaders(const Input& in, Scores& scores) {
  Candidate leaders[kLeaders];  // descending
  int32_t count = 0;
  float least = 0;
  for (int32_t block = 0; block < in.tokens; block += kTile) {
    const int32_t end = std::min(in.tokens, block + kTile);
    bool any = false;
    for (int32_t i = block; i < end; i++) any |= scores.pick_value[i] > least;
    for (int32_t i = block; any && i < end; i++) {
      const float value = scores.pick_value[i];
      if (!(value > least)) continue;
      int32_t at = count < kLeaders ? count++ : kLeaders - 1;
      for (; at > 0 && leaders[at - 1].pick_value < value; at--) leaders[at] = leaders[at - 1];
      leaders[at] = {value, i};
      if (count == kLeaders) least = leaders[kLeaders - 1].pick_value;
    }
  }
  for (int32_t i = 0; i < count; i++) scores.candidates[i] = leaders[i].token;
  scores.candidate_count = count;
  return least;
}

// Lists as candidates the tokens that are not up to date and whose bound is not below `best`, the largest up-to-date
// value. If there are more than kFew, only those in the upper half of the bounds' range: they often exclude the rest.
static void find_contenders(const Input& in, const Basis& basis, Scores& scores, float best) {
  const float* bound = scores.pick_value;
  float most = 0;
  int32_t count = 0;
  for (int32_t i = 0; i < in.tokens; i++)
    if (bound[i] >= best && bound[i] > 0 && scores.steps_done[i] < basis.size) {
      scores.candidates[count++] = i;
      most = std::max(most, bound[i]);
    }
  if (count > kFew) {
    const float least = std::max(0.0f, best), half = least + (most - least) / 2;
    int32_t* end =
        std::remove_if(scores.candidates, scores.candidates + count, [&](int32_t i) { return bound[i] < half; });
    count = (int32_t)(end - scores.candidates);
  }
  scores.candidate_count = count;
}

}  // namespace apet::cpu
