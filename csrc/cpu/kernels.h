// The loops over features and tokens that are compiled once per instruction set, as a table of functions.
//
// Each instruction set has its own namespace (loops.h), so that the linker cannot use a symbol of one for another. For
// the same reason nothing inline may be defined here or in image.h: the linker keeps one copy of an inline function,
// perhaps one that this processor cannot run.
#pragma once
#include <cstddef>

#include "image.h"

namespace apet::cpu {

// Tokens per tile: their dot products are buffered on the stack before pick_value, resid_sq and y are updated.
constexpr int kTile = 64;
// Features per piece of pack() and mean(), so that threads can share wide rows too. 1 KB of bfloat16 is long enough to
// stream.
constexpr int kColumns = 512;

// Ranges are half-open. Any cut of the work gives the same bits.
struct Kernels {
  // Work is divided at multiples of these.
  int32_t token_group;      // tokens of a pass over all of them that are updated together
  int32_t candidate_group;  // candidates that share each load of a basis token
  int32_t dropped_group;    // dropped tokens that share each load of a target
  int32_t vector;           // float lanes of a vector: arrays over targets are padded to a multiple
  int32_t panel;            // factors of a packed panel
  // packed_floats: the floats of Factors::packed for up to `factors` factors. scratch_bytes: the scratch that a thread
  // needs for products with up to `factors` factors. round_scratch_bytes: what round() needs in addition, by its number
  // of picks.
  size_t (*packed_floats)(int64_t factors, int64_t dim);
  size_t (*scratch_bytes)(int64_t factors, int64_t dim);
  size_t (*round_scratch_bytes)(int64_t picks);
  // Rows that share each reading of so many packed factors, at most.
  int64_t (*block_rows)(int64_t factors, int64_t dim);
  // The floats of Basis::packed, for up to so many basis tokens.
  size_t (*packed_basis_floats)(int64_t basis, int64_t dim);

  // s1: computes norm_sq and the initial pick_value and resid_sq of tokens [begin, end). Returns the token of largest
  // finite norm, with norm_sq as its pick_value.
  Candidate (*norms)(const Input&, Scores&, int64_t begin, int64_t end);
  // s1 to s3: updates tokens [begin, end) with the basis tokens that they do not include yet; if !has_norms, it also
  // computes the norms. Returns the token of largest pick_value.
  Candidate (*sweep)(const Input&, const Basis&, Scores&, int64_t begin, int64_t end);
  // The same for candidates[begin .. end).
  Candidate (*sweep_candidates)(const Input&, const Basis&, Scores&, int64_t begin, int64_t end);
  // s3: packs the basis, which is complete.
  void (*pack_basis)(const Input&, Basis&);
  // s3: updates tokens [begin, end) with all basis tokens, then computes e_sq.
  void (*residual)(const Input&, const Basis&, Scores&, int64_t begin, int64_t end);
  // Packs features [d0, d1) of one panel of factors.
  void (*pack)(const Input&, const Rows&, const Factors&, int64_t panel, int64_t d0, int64_t d1);
  // s1 in rounds.
  // pack_y: packs y of one panel of factors.
  void (*pack_y)(const Factors&, Rounds&, int64_t panel);
  // pool_gram: computes rows [begin, end) of the residual Gram matrix; the factors are the pool.
  void (*pool_gram)(const Input&, const Rows&, const Factors&, Rounds&, int64_t begin, int64_t end, void* scratch);
  // round: updates tokens [begin, end); the factors are the picks.
  void (*round)(const Input&, const Rows&, const Factors&, Scores&, Rounds&, Centres&, int64_t begin, int64_t end,
                void* scratch);
  // s4.
  // add_all_products: computes the products of tokens [begin, end) with the stale centres, which are the factors.
  void (*add_all_products)(const Input&, const Rows&, const Factors&, Centres&, int64_t begin, int64_t end,
                           void* scratch);
  // add_last_products: the same for dropped[begin .. end).
  void (*add_last_products)(const Input&, const Rows&, const Factors&, Centres&, const Merge&, int64_t begin,
                            int64_t end, void* scratch);
  // nearest_centre: finds the nearest centre of dropped[begin .. end).
  void (*nearest_centre)(const Scores&, const Centres&, Merge&, int64_t begin, int64_t end);
  // cluster_mean: computes features [d0, d1) of the means of clusters [begin, end).
  void (*cluster_mean)(const Input&, const Rows&, const Merge&, Centres&, int64_t begin, int64_t end, int64_t d0,
                       int64_t d1);
  // mean_distance: computes the distances of merged[begin .. end) from these means.
  void (*mean_distance)(const Input&, const Rows&, const Merge&, Centres&, int64_t begin, int64_t end);
  // s5.
  // assign, similar: find the target of dropped[begin .. end), from products with the factors, or from stored products.
  void (*assign)(const Input&, const Rows&, const Factors&, Merge&, int64_t begin, int64_t end, void* scratch);
  void (*similar)(const Centres&, Merge&, int64_t begin, int64_t end);
  // mean: computes features [d0, d1) of rows [begin, end) of the result.
  void (*mean)(const Input&, const Rows&, const Merge&, int64_t begin, int64_t end, int64_t d0, int64_t d1);
};

// Tables by dtype, defined by the isa_*.cpp that the build has.
const Kernels* generic_kernels(apet_dtype);
const Kernels* avx2_kernels(apet_dtype);
const Kernels* avx512_kernels(apet_dtype);
const Kernels* avx512_bf16_kernels(apet_dtype);  // for dtypes other than bfloat16 it is avx512's table
const Kernels* amx_kernels(apet_dtype);          // for dtypes other than bfloat16 it is avx512's table
const Kernels* amx_fp16_kernels(apet_dtype);     // for dtypes other than float16 it is amx's table
// Return whether one product in tiles is correct on this processor. Call only if it and the OS permit AMX.
bool amx_is_right() noexcept;
bool amx_fp16_is_right() noexcept;
const Kernels* neon_kernels(apet_dtype);
const Kernels* neon_bf16_kernels(apet_dtype);  // for dtypes other than bfloat16 it is neon's table

// isa.cpp: the instruction set in use, and its table for a dtype.
apet_isa isa_in_use();
const Kernels* kernels_for(apet_dtype, apet_isa);

}  // namespace apet::cpu
