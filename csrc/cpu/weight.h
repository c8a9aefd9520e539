// Weights of tokens. Included inside a namespace: that of an instruction set (loops.h), or apet::cpu.
#pragma once

// Returns the value of token i times its weight, at most FLT_MAX; an infinite value, such as a distance beyond float32,
// counts as FLT_MAX. weight: null: 1. A negative weight and NaN count as 0, inf as FLT_MAX.
static inline float weighted(const float* weight, int64_t i, float value) {
  if (!weight) return value;
  const float w = weight[i] > 0 ? weight[i] : 0;
  const float product = (value < __FLT_MAX__ ? value : __FLT_MAX__) * (w < __FLT_MAX__ ? w : __FLT_MAX__);
  return product < __FLT_MAX__ ? product : __FLT_MAX__;
}
