// The checks that hold for every backend, and the error messages.
#include "problem.h"

#include <cmath>
#include <cstdint>
#include <cstdio>

namespace {
// A product of any two sizes must fit int64.
constexpr int64_t kMaxExtent = INT32_MAX;
// Token positions are held as int32, also those of a block of tokens, or of a basis, behind the last one.
constexpr int64_t kMaxTokens = INT32_MAX - (1 << 16);

// Returns the largest basis that may be given as a number.
int64_t most_basis(const apet_problem& p) {
  const int64_t keep = p.ragged ? INT32_MAX : p.keep;  // a ragged image has at most as many as it keeps
  return p.op == APET_COMPRESS && p.select == APET_QR && keep > APET_MAX_BASIS ? keep : APET_MAX_BASIS;
}

const char* name(apet_layout layout) {
  return layout == APET_INPLACE ? "inplace" : layout == APET_OVERWRITE ? "overwrite" : "append";
}
long long ll(int64_t value) { return value; }
}  // namespace

#define APET_TEXT(number) #number
#define APET_DOTTED(major, minor, patch) APET_TEXT(major) "." APET_TEXT(minor) "." APET_TEXT(patch)
const char* apet_version(void) { return APET_DOTTED(APET_VERSION_MAJOR, APET_VERSION_MINOR, APET_VERSION_PATCH); }

apet_status apet_check(const apet_problem* p) {
  if (!p) return APET_NULL_POINTER;
  if (p->op < APET_COMPRESS || p->op > APET_MERGE) return APET_BAD_OP;
  if (p->dtype < APET_FLOAT32 || p->dtype > APET_BFLOAT16) return APET_BAD_DTYPE;
  if (p->layout < APET_INPLACE || p->layout > APET_APPEND) return APET_BAD_LAYOUT;
  if (p->select < APET_FPS || p->select > APET_QR) return APET_BAD_SELECT;
  if (p->ragged && p->op != APET_COMPRESS) return APET_RAGGED_NEEDS_COMPRESS;
  if (p->images < 0) return APET_BAD_IMAGES;
  if (p->dim < 1) return APET_BAD_DIM;
  if (p->tokens < (p->ragged ? 0 : 1)) return p->ragged ? APET_BAD_MAX : APET_BAD_TOKENS;
  if (p->tokens > kMaxExtent || p->dim > kMaxExtent || p->images > kMaxExtent) return APET_TOO_LARGE;
  if ((p->ragged ? p->total_tokens : p->tokens) > kMaxTokens) return APET_TOO_LARGE;
  if (p->dim > 1 && p->stride_xd != 1) return APET_BAD_STRIDE;
  if (p->op != APET_MERGE) {
    if (p->basis == APET_BASIS_KEEP) {
      if (p->select != APET_QR) return APET_BASIS_NEEDS_QR;
      if (p->op == APET_SCORE) return APET_BASIS_NEEDS_KEEP;
    } else if (p->basis < 1 || p->basis > most_basis(*p)) {
      return APET_BAD_BASIS;
    }
    if (p->op == APET_COMPRESS && apet::in_rounds(*p) && p->layout != APET_INPLACE) return APET_BASIS_NEEDS_INPLACE;
    const int64_t starts = p->ragged ? p->total_tokens : p->tokens;
    if (p->start < -1 || (p->start >= starts && p->start != 0)) return APET_BAD_START;
    if (!(p->ridge >= 0) || !std::isfinite(p->ridge)) return APET_BAD_RIDGE;
  }
  if (p->op != APET_SCORE) {
    if (p->ragged) {
      if (p->total_keep < 0 || p->total_keep > p->total_tokens) return APET_BAD_TOTAL_KEEP;
      if (p->keep < 0) return APET_BAD_MAX;
    } else if (p->keep < 1 || p->keep > p->tokens) {
      return APET_BAD_KEEP;
    }
  }
  if (p->op == APET_COMPRESS) {
    if (!(p->blend >= 0 && p->blend <= 1)) return APET_BAD_BLEND;
    if (p->blend != 1 && p->layout != APET_OVERWRITE) return APET_BLEND_WITHOUT_OVERWRITE;
    if (!p->ragged && p->layout == APET_OVERWRITE && p->keep <= p->basis && p->keep != p->tokens)
      return APET_OVERWRITE_NEEDS_MORE;
    if (p->refine < 0 || p->refine > APET_MAX_REFINE) return APET_BAD_REFINE;
    if (p->refine > 0 && p->layout != APET_INPLACE) return APET_REFINE_NEEDS_INPLACE;
    if (p->refine > 0 && p->basis != APET_BASIS_KEEP && (p->ragged || p->basis != p->keep))
      return APET_REFINE_NEEDS_BASIS_KEEP;
  }
  return APET_OK;
}

// The messages for the arguments of an op are those of apet_kernels/ops.py and options.py, word for word.
size_t apet_error_message(const apet_problem* problem, apet_status status, char* text, size_t capacity) {
  static const apet_problem kNone = {};
  const apet_problem& p = problem ? *problem : kNone;
  const int64_t starts = p.ragged ? p.total_tokens : p.tokens;
  int n = 0;
#define WRITE(...) n = std::snprintf(text, capacity, __VA_ARGS__)
  switch (status) {
    case APET_OK: WRITE("no error"); break;
    case APET_BAD_OP: WRITE("op=%d is none of compress, score, merge", (int)p.op); break;
    case APET_BAD_DTYPE: WRITE("dtype=%d is none of float32, float16, bfloat16", (int)p.dtype); break;
    case APET_BAD_LAYOUT: WRITE("layout=%d is none of inplace, overwrite, append", (int)p.layout); break;
    case APET_BAD_SELECT: WRITE("select=%d is none of fps, qr", (int)p.select); break;
    case APET_BAD_IMAGES: WRITE("images=%lld must be at least 0", ll(p.images)); break;
    case APET_BAD_DIM: WRITE("x has %lld features per token; at least 1 is needed", ll(p.dim)); break;
    case APET_BAD_TOKENS: WRITE("x has %lld tokens per image; at least 1 is needed", ll(p.tokens)); break;
    case APET_BAD_STRIDE:
      WRITE("the last dimension of x has stride %lld; it must be contiguous (stride 1)", ll(p.stride_xd));
      break;
    case APET_BAD_KEEP:
      WRITE("%s=%lld is outside 1..%lld, the tokens of an image", p.op == APET_MERGE ? "K" : "keep", ll(p.keep),
            ll(p.tokens));
      break;
    case APET_BAD_BASIS: WRITE("basis=%d is outside 1..%lld", (int)p.basis, ll(most_basis(p))); break;
    case APET_BAD_START: WRITE("start=%lld is outside -1..%lld", ll(p.start), ll(starts > 0 ? starts - 1 : 0)); break;
    case APET_BAD_RIDGE: WRITE("ridge=%g must be finite and at least 0", p.ridge); break;
    case APET_BAD_BLEND: WRITE("blend=%g is outside 0..1", p.blend); break;
    case APET_BLEND_WITHOUT_OVERWRITE:
      WRITE("blend=%g needs layout='overwrite', got layout='%s'", p.blend, name(p.layout));
      break;
    case APET_OVERWRITE_NEEDS_MORE:
      WRITE("layout='overwrite' needs keep > basis, got keep=%lld and basis=%d", ll(p.keep), (int)p.basis);
      break;
    case APET_BAD_TOTAL_KEEP:
      WRITE("total_keep=%lld is outside 0..%lld, the tokens of x", ll(p.total_keep), ll(p.total_tokens));
      break;
    case APET_BAD_MAX: WRITE("max_seqlen=%lld and max_keep=%lld must be at least 0", ll(p.tokens), ll(p.keep)); break;
    case APET_TOO_LARGE:
      WRITE(
          "images=%lld, tokens=%lld, dim=%lld, total_tokens=%lld: each must be at most %lld, the rows of x %lld, and "
          "what is computed of them addressable",
          ll(p.images), ll(p.tokens), ll(p.dim), ll(p.total_tokens), ll(kMaxExtent), ll(kMaxTokens));
      break;
    case APET_NULL_POINTER: WRITE("a pointer that this call needs is null"); break;
    case APET_SMALL_WORKSPACE: WRITE("the workspace is smaller than the plan asks for, or not 64-byte aligned"); break;
    case APET_NO_ISA: WRITE("this build or this processor lacks the instruction set asked for"); break;
    case APET_CUDA_FAILED: WRITE("a call of the CUDA runtime failed; apet_cuda_error() has its message"); break;
    case APET_NO_CUDA_PATH: WRITE("no CUDA path can run this call on this device; the plan gives the reason"); break;
    case APET_RAGGED_NEEDS_COMPRESS:
      WRITE("ragged images need op=compress, got op=%s", p.op == APET_SCORE ? "score" : "merge");
      break;
    case APET_BASIS_NEEDS_QR:
      WRITE("basis=None needs select='qr', got select='fps'; give basis in 1..%d", APET_MAX_BASIS);
      break;
    case APET_BASIS_NEEDS_KEEP:
      WRITE("basis=None means basis=keep, but score has no keep; give basis in 1..%d", APET_MAX_BASIS);
      break;
    case APET_BASIS_NEEDS_INPLACE: {
      char number[16] = "None";
      if (p.basis != APET_BASIS_KEEP) std::snprintf(number, sizeof number, "%d", (int)p.basis);
      WRITE("basis=%s needs layout='inplace', got layout='%s'; give basis in 1..%d", number, name(p.layout),
            APET_MAX_BASIS);
      break;
    }
    case APET_BAD_REFINE: WRITE("refine=%lld is outside 0..%d", ll(p.refine), APET_MAX_REFINE); break;
    case APET_REFINE_NEEDS_INPLACE:
      WRITE("refine=%lld needs layout='inplace', got layout='%s'", ll(p.refine), name(p.layout));
      break;
    case APET_REFINE_NEEDS_BASIS_KEEP:
      if (p.ragged) WRITE("refine=%lld of ragged images needs basis=None, got %d", ll(p.refine), (int)p.basis);
      else
        WRITE("refine=%lld needs basis=None or basis=keep, got basis=%d and keep=%lld", ll(p.refine), (int)p.basis,
              ll(p.keep));
      break;
    default: WRITE("status %d is unknown", (int)status); break;
  }
#undef WRITE
  return n < 0 ? 0 : (size_t)n;
}
