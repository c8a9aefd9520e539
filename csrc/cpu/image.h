// The state of one image: a struct for what each stage fills. Names and shapes: docs/algorithm.md.
//
// Arrays are in the workspace unless they are outputs; the structs hold pointers to them. A function that takes one of
// these structs as const only reads its arrays.
#pragma once
#include <cstdint>

#include "../apet.h"

namespace apet::cpu {

// The pick_value of a token that must not be picked: it is in the basis, or its norm is not finite.
constexpr float kNeverPicked = -__builtin_inff();

// Constants of a basis that is picked in rounds. They belong to the algorithm: other values give other tokens
// (docs/algorithm.md).
constexpr int64_t kRounds = 4;
constexpr int64_t kPool = 2;       // candidates for each pick of a round
constexpr int64_t kFewPicks = 16;  // up to this many basis tokens are picked one at a time

// A token that may be the next basis token.
struct Candidate {
  float pick_value;
  int32_t token;
};

// The image, and what to do with it.
struct Input {
  const char* x;  // [N, D]
  int64_t stride_xn;
  int32_t tokens, dim, keep, max_basis;  // N, D, K, M
  apet_select select;
  float blend;
  double ridge;
};

// The arrays of s1 to s3 with an entry for each token.
struct Scores {
  const float* weight;  // [N] as the caller gave them (weighted() in weight.h), or null
  float* norm_sq;       // [N] ||x||^2
  float* pick_value;    // [N] the value that s1 maximises: dist_sq (fps) or resid_sq (qr), times the weight
  float* resid_sq;      // [N] ||x||^2 - ||y||^2
  float* e_sq;  // [N] the residual times the weight, by which s4 ranks: the memory of resid_sq, which s3 overwrites
  float* y;     // [M, N] L^-1 S x
  int32_t* steps_done;  // [N] how many basis tokens, from the first on, pick_value, resid_sq and y of a token include
  int32_t* candidates;  // [N] tokens that a step of s1 updates
  int32_t candidate_count;
  bool has_norms;  // false: the sweep for the first basis token forms them
};

// The arrays of s1 and s2 with an entry for each basis token.
struct Basis {
  int32_t size;                             // m
  int32_t token[APET_MAX_BASIS];            // positions, in the order they were picked
  float norm_sq[APET_MAX_BASIS];            // ||p||^2, a copy: the first sweep may still write Scores::norm_sq[p]
  float L[APET_MAX_BASIS][APET_MAX_BASIS];  // lower triangle without its diagonal
  double inv_diag[APET_MAX_BASIS];          // 1 / L_jj; 0 for a dependent basis token
  float* packed;                            // their features, if products with them are in tiles (dot_tiles.h)
};

// s1 in rounds. A round makes at most b picks from a pool of P = kPool b candidates.
struct Rounds {
  int32_t number;       // rounds that have begun
  int32_t begin, size;  // basis tokens of the rounds before, and of this one
  int32_t most, width;  // b; floats of a row of y
  int32_t first;        // the token that is picked first, or -1
  int32_t pool_count;
  int32_t* pool;    // [P] candidates, ascending
  int32_t* token;   // [M] basis tokens, in the order they are picked
  float* y;         // [N, width] L^-1 S x
  float* packed_y;  // y of the pool or of the picks, negated, in panels (product.h)
  float* gram;      // [pool_count, pool_count] residual Gram matrix
  double* diag;     // [P] its diagonal, after the picks so far
  double* column;   // [P] scratch
  float* pool_y;    // [b, pool_count] y of the pool's tokens in this round
  float* L;         // [b, b] lower triangle of this round, without its diagonal
  float* inv_diag;  // [b]
};

// Tokens that others are multiplied with, packed in panels (product.h).
struct Factors {
  int32_t count;
  const int32_t* token;  // [count]
  float* packed;         // panels that do not fit into rows.out
};

// s4 with medoid steps, or after a basis in rounds: all kept tokens, each with a column of products with all tokens.
struct Centres {
  int32_t count, width;    // K; floats of a row of products
  float* product;          // [N, width] x.c
  int32_t* token;          // [K] the centre of each column
  int32_t* position;       // [K rounded up to a vector] as token; INT_MAX if its norm is not finite, and in padding
  float* norm_sq;          // [K rounded up to a vector] ||c||^2; inf where position is INT_MAX
  float* inv_norm;         // [K rounded up to a vector] 1 / ||c||; 0 where position is INT_MAX, and for a zero vector
  float* padding;          // [K rounded up to a vector] added to similarities: 0; -inf where position is INT_MAX
  int32_t* number;         // [N] the number of a centre among the merge targets
  int32_t stale_count;     // columns that are not computed yet
  int32_t* stale;          // [K rounded up to two vectors] the numbers of these columns
  int32_t* stale_token;    // [K rounded up to two vectors] the centres of these columns
  int32_t* target_column;  // [T] the column of each merge target
  int32_t* cluster;        // [N] column of the cluster that a token was in at the last medoid step, or -1
  uint8_t* regrouped;      // [K] by column: the cluster has other tokens than at the last step
  float* cluster_mean;     // [K, D] by row
  float* mean_dist_sq;     // [N] ||x - the mean of its cluster||^2
};

// s4: the rows of the result.
struct Rows {
  int32_t count;        // R
  int32_t* row_token;   // [R] token that the row starts from
  int32_t* row_blend;   // [R] token that it is blended with, or -1
  int64_t* indices;     // [R] output of compress
  int64_t first_token;  // added to positions in `indices`, which for ragged images count in the packed x
  char* out;            // [R, D] output; until the means are written it holds packed factors (product.h)
};

// s4 and s5: which tokens are merged into which rows.
struct Merge {
  int32_t dropped_count, target_count;  // T targets
  int32_t* dropped;                     // [N] tokens to merge, ascending
  int32_t* target_row;                  // [T] rows that tokens may be merged into, ascending
  int32_t* target_token;                // [T] their tokens
  float* inv_norm;                      // [T rounded up to a vector] 1 / ||t||; 0 for a zero vector, and for padding
  float* padding;                       // [T rounded up to a vector] added to similarities: 0, and -inf for padding
  int32_t* target;                      // [N] target[i]: the number of the target of dropped[i]
  int32_t* merged;                      // [N] dropped tokens by row, ascending within a row; scratch in s4
  int32_t* row_begin;                   // [R + 1] row r has merged[row_begin[r] .. row_begin[r + 1])
};

struct Image {
  Input input;
  Scores scores;
  Basis basis;
  Rounds rounds;
  Factors factors;
  Centres centres;
  Rows rows;
  Merge merge;
};

}  // namespace apet::cpu
