// s4: an exact cut. The k largest of n keys, ties to the lower index, without sorting: four passes over the keys, one
// byte each from the top, narrow down the k-th largest value and how many equal to it belong above the cut.
//
// Keys are the bits of non-negative floats, which order as the floats do.
#pragma once
#include <cstdint>

namespace apet::cpu {

struct Cut {
  uint32_t key;   // every larger key is in,
  int64_t equal;  // and so are the first `equal` keys that equal it

  // To be asked in ascending order, once for each index.
  bool takes(uint32_t other) { return other > key || (other == key && equal-- > 0); }
};

// 1 <= k <= n.
inline Cut cut_at(const uint32_t* key, int64_t n, int64_t k) {
  uint32_t prefix = 0;
  int64_t wanted = k;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t count[256] = {};
    const uint32_t known = shift == 24 ? 0 : ~0u << (shift + 8);
    for (int64_t i = 0; i < n; i++)
      if ((key[i] & known) == prefix) count[key[i] >> shift & 255]++;
    uint32_t digit = 255;
    while (count[digit] < wanted) wanted -= count[digit--];
    prefix |= digit << shift;
  }
  return {prefix, wanted};
}

}  // namespace apet::cpu
