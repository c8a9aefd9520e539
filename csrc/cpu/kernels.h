// The loops over features and tokens that are compiled once per instruction set, as a table of functions.
//
// Each instruction set has them in a namespace of its own (loops.h), so that no symbol of one can serve another. For
// the same reason nothing inline may be defined here or in image.h: the linker keeps one copy of an inline function,
// perhaps one that this processor cannot run.
#pragma once
#include <cstddef>

#include "image.h"

namespace apet::cpu {

// Tokens per tile: their dot products are buffered on the stack before pick_value, resid_sq and y are updated.
constexpr int kTile = 64;
// Dropped tokens per chunk of similarities: one pass over the packed targets (in L2 or L3) serves this many.
constexpr int kChunkRows = 96;
// Features per piece of pack() and mean(), so that threads can share wide rows too. 1 KB of bfloat16 is long enough to
// stream.
constexpr int kColumns = 512;

// Ranges are half-open. Any cut of the work gives the same bits.
struct Kernels {
  // Where work is cut: at multiples of these.
  int32_t token_group;    // tokens that share each load of a basis token
  int32_t dropped_group;  // dropped tokens that share each load of a target
  int32_t vector;         // float lanes of a vector: arrays over targets are padded to a multiple
  int32_t panel;          // factors of a packed panel
  // Floats of Factors::packed for up to so many factors, and bytes of scratch that a thread needs in a product; in
  // round() also those for so many picks.
  size_t (*packed_floats)(int64_t factors, int64_t dim);
  size_t (*scratch_bytes)(int64_t dim);
  size_t (*round_scratch_bytes)(int64_t picks);

  // s1: norm_sq, and the start of pick_value and resid_sq, of tokens [begin, end). Returns the one of largest finite
  // norm, with norm_sq as its pick_value.
  Candidate (*norms)(const Input&, Scores&, int64_t begin, int64_t end);
  // s1 to s3: updates tokens [begin, end) with the basis tokens that they do not include yet; forms the norms as well
  // if !has_norms. Returns the one of largest pick_value.
  Candidate (*sweep)(const Input&, const Basis&, Scores&, int64_t begin, int64_t end);
  // The same for candidates[begin .. end).
  Candidate (*sweep_candidates)(const Input&, const Basis&, Scores&, int64_t begin, int64_t end);
  // s3: sweep(), then resid_sq becomes e_sq.
  void (*residual)(const Input&, const Basis&, Scores&, int64_t begin, int64_t end);
  // Packs features [d0, d1) of one panel of factors.
  void (*pack)(const Input&, const Rows&, const Factors&, int64_t panel, int64_t d0, int64_t d1);
  // s1, in rounds: packs y of one panel of factors; rows [begin, end) of the pool's residual Gram matrix, whose factors
  // are the pool; and brings the picks of a round, the factors, into tokens [begin, end).
  void (*pack_y)(const Factors&, Rounds&, int64_t panel);
  void (*pool_gram)(const Input&, const Rows&, const Factors&, Rounds&, int64_t begin, int64_t end, void* scratch);
  void (*round)(const Input&, const Rows&, const Factors&, Scores&, Rounds&, Centres&, int64_t begin, int64_t end,
                void* scratch);
  // s4: products of tokens [begin, end), or of dropped[begin .. end), with stale centres, the factors; the nearest centre
  // of dropped[begin .. end); the means of clusters [begin, end), and the distances from them of merged[begin .. end).
  void (*add_all_products)(const Input&, const Rows&, const Factors&, Centres&, int64_t begin, int64_t end,
                           void* scratch);
  void (*add_last_products)(const Input&, const Rows&, const Factors&, Centres&, const Merge&, int64_t begin,
                            int64_t end, void* scratch);
  void (*nearest_centre)(const Scores&, const Centres&, Merge&, int64_t begin, int64_t end);
  void (*cluster_mean)(const Input&, const Rows&, const Merge&, Centres&, int64_t begin, int64_t end, int64_t d0,
                       int64_t d1);
  void (*mean_distance)(const Input&, const Rows&, const Merge&, Centres&, int64_t begin, int64_t end);
  // s5: target of dropped[begin .. end), from products with the factors, or from those that are stored.
  void (*assign)(const Input&, const Rows&, const Factors&, Merge&, int64_t begin, int64_t end, void* scratch);
  void (*similar)(const Centres&, Merge&, int64_t begin, int64_t end);
  // s5: features [d0, d1) of rows [begin, end) of the result.
  void (*mean)(const Input&, const Rows&, const Merge&, int64_t begin, int64_t end, int64_t d0, int64_t d1);
};

// Tables by dtype, defined by the isa_*.cpp that the build has.
const Kernels* generic_kernels(apet_dtype);
const Kernels* avx2_kernels(apet_dtype);
const Kernels* avx512_kernels(apet_dtype);
const Kernels* avx512_bf16_kernels(apet_dtype);  // its own for bfloat16; avx512's for other dtypes

// isa.cpp: the instruction set in use, and its table for a dtype.
apet_isa isa_in_use();
const Kernels* kernels_for(apet_dtype, apet_isa);

}  // namespace apet::cpu
