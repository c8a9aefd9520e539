// The ops over torch tensors of any device: converts tensors to apet_problem and apet_tensors, through the LibTorch
// stable ABI. A binding includes this and defines run(). Schemas and fakes are in apet_kernels/ops.py.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>

#include "problem.h"

// The namespace of the ops: torch.ops.apet, or another for a build that lives beside one of another version. (Two
// macros, so that the name is expanded first.)
#ifndef APET_OPS_NAMESPACE
#define APET_OPS_NAMESPACE apet
#endif
#define APET_IMPLEMENTS_IN(space, key, module) STABLE_TORCH_LIBRARY_IMPL(space, key, module)
#define APET_IMPLEMENTS(key, module) APET_IMPLEMENTS_IN(APET_OPS_NAMESPACE, key, module)

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// Throws the message made of `parts`. (Torch's own check macros prepend a place in this file.)
template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

apet_layout layout_of(const std::string& name) {
  if (name == "inplace") return APET_INPLACE;
  if (name == "overwrite") return APET_OVERWRITE;
  require(name == "append", "layout='", name, "' is none of inplace, overwrite, append");
  return APET_APPEND;
}

apet_select select_of(const std::string& name) {
  if (name == "fps") return APET_FPS;
  require(name == "qr", "select='", name, "' is none of fps, qr");
  return APET_QR;
}

void check(const apet_problem& problem, apet_status status) {
  if (status == APET_OK) return;
  char text[256];
  apet_error_message(&problem, status, text, sizeof text);
  require(false, text);
}

// Returns an uninitialised contiguous tensor on the device of x. torch::stable::new_empty would go through the
// dispatcher, which takes longer than the allocation.
Tensor empty_beside(const Tensor& x, std::initializer_list<int64_t> sizes, int32_t dtype) {
  int64_t strides[3] = {1, 1, 1};
  const int64_t dims = (int64_t)sizes.size();
  for (int64_t d = dims - 1; d > 0; d--) strides[d - 1] = strides[d] * std::max<int64_t>(sizes.begin()[d], 1);
  int32_t device = 0;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes.begin(), strides, dtype, device, x.get_device_index(), &made));
  return Tensor(made);
}

// Returns the number that torch's C functions know the dtype of x by.
int32_t dtype_of(const Tensor& x) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return dtype;
}

// Returns the tensor that the kernels read: x itself, or a copy if its last dimension is not contiguous.
Tensor readable(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return last < 0 || x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

// Sets the members that x alone determines: [B, N, D], or [T, D] if ragged.
apet_problem problem_of(apet_op op, const Tensor& x, bool ragged) {
  require(x.dim() == (ragged ? 2 : 3), "x has ", x.dim(), " dimensions; ",
          ragged ? "[T, D] is needed" : "[B, N, D] is needed");
  apet_problem p = {};
  p.op = op;
  switch (x.scalar_type()) {
    case ScalarType::Float: p.dtype = APET_FLOAT32; break;
    case ScalarType::Half: p.dtype = APET_FLOAT16; break;
    case ScalarType::BFloat16: p.dtype = APET_BFLOAT16; break;
    default:
      require(false, "x has dtype ", torch::headeronly::toString(x.scalar_type()),
              "; Float, Half or BFloat16 is needed");
  }
  const int64_t n = ragged ? 0 : 1;
  p.ragged = ragged;
  p.images = ragged ? 0 : x.size(0);
  p.tokens = x.size(n);
  p.total_tokens = ragged ? x.size(0) : 0;
  p.dim = x.size(n + 1);
  p.stride_xb = ragged ? 0 : x.stride(0);
  p.stride_xn = x.stride(n);
  // An empty tensor of any strides counts as contiguous.
  p.stride_xd = p.tokens == 0 || p.dim == 0 || (!ragged && p.images == 0) ? 1 : x.stride(n + 1);
  p.blend = 1;
  return p;
}

// Sets the options of the basis. keep: the largest basis that may be picked in rounds.
void set_basis(apet_problem& p, std::optional<int64_t> basis, const std::string& select, int64_t start, double ridge,
               int64_t keep) {
  p.select = select_of(select);
  p.basis = APET_BASIS_KEEP;
  if (basis.has_value()) {
    // It is checked here because apet_problem has 32 bits for it, and -1 has a meaning there.
    const int64_t most = p.select == APET_QR && keep > APET_MAX_BASIS ? keep : APET_MAX_BASIS;
    require(*basis >= 1 && *basis <= most, "basis=", *basis, " is outside 1..", most);
    p.basis = (int32_t)(*basis < INT32_MAX ? *basis : INT32_MAX);  // a larger one is beyond any keep
  }
  p.start = start;
  p.ridge = ridge;
}

// Runs a call on the device of x, with workspace from its allocator. Defined by the binding.
void run(const apet_problem& problem, const apet_tensors& tensors, const Tensor& x);

apet_problem compress_problem(const Tensor& x, int64_t keep, std::optional<int64_t> basis, const std::string& layout,
                              const std::string& select, int64_t start, double ridge, double blend, int64_t refine) {
  apet_problem p = problem_of(APET_COMPRESS, x, false);
  set_basis(p, basis, select, start, ridge, keep);
  p.refine = refine;
  p.layout = layout_of(layout);
  p.keep = keep;
  p.blend = blend;
  check(p, apet_check(&p));
  return p;
}

std::string name_of(const torch::stable::Device& device) {
  return device.is_cpu() ? "cpu" : device.is_cuda() ? "cuda:" + std::to_string(device.index()) : "another device";
}

void require_beside(const char* name, const Tensor& tensor, const Tensor& x) {
  require(tensor.device() == x.device(), name, " is on ", name_of(tensor.device()), ", but x is on ",
          name_of(x.device()));
}

// Returns the first `dims` sizes of a tensor, as in "2, 576".
std::string sizes_of(const Tensor& tensor, int64_t dims) {
  std::string text;
  for (int64_t d = 0; d < dims; d++) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text;
}

// Returns the dtype and the sizes of a tensor, as in "Float [2, 576]".
std::string form_of(const Tensor& tensor) {
  return std::string(torch::headeronly::toString(tensor.scalar_type())) + " [" + sizes_of(tensor, tensor.dim()) + "]";
}

// Returns the weights of the tokens of x, which live as long as `contiguous`; null if there are none.
const float* weights_of(const std::optional<Tensor>& weights, const Tensor& x, std::optional<Tensor>& contiguous) {
  if (!weights.has_value()) return nullptr;
  const int64_t dims = x.dim() - 1;
  bool fits = weights->scalar_type() == ScalarType::Float && weights->dim() == dims;
  for (int64_t d = 0; fits && d < dims; d++) fits = weights->size(d) == x.size(d);
  require(fits, "weights must be Float [", sizes_of(x, dims), "], the tokens of x, got ", form_of(*weights));
  require_beside("weights", *weights, x);
  contiguous = torch::stable::contiguous(*weights);
  return static_cast<const float*>(contiguous->const_data_ptr());
}

std::tuple<Tensor, Tensor> compress(const Tensor& given, int64_t keep, std::optional<int64_t> basis, std::string layout,
                                    std::string select, int64_t start, double ridge, double blend, int64_t refine,
                                    std::optional<Tensor> weights) {
  const Tensor x = readable(given);
  const apet_problem p = compress_problem(x, keep, basis, layout, select, start, ridge, blend, refine);
  apet_tensors t = {};
  std::optional<Tensor> contiguous;
  t.weights = weights_of(weights, x, contiguous);
  const int64_t rows = keep + apet::appended(p);
  Tensor tokens = empty_beside(x, {p.images, rows, p.dim}, dtype_of(x));
  Tensor indices = empty_beside(x, {p.images, rows}, aoti_torch_dtype_int64());
  t.x = x.const_data_ptr();
  t.tokens = tokens.mutable_data_ptr();
  t.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  run(p, t, x);
  return {tokens, indices};
}

const int32_t* offsets(const char* name, const Tensor& cu, const Tensor& x, Tensor& contiguous) {
  require_beside(name, cu, x);
  require(cu.dim() == 1 && cu.scalar_type() == ScalarType::Int && cu.size(0) >= 1, name, " must be int32 [S + 1], got ",
          form_of(cu));
  contiguous = torch::stable::contiguous(cu);
  return static_cast<const int32_t*>(contiguous.const_data_ptr());
}

std::tuple<Tensor, Tensor> compress_varlen(const Tensor& given, const Tensor& cu_seqlens, const Tensor& cu_keep,
                                           int64_t total_keep, int64_t max_seqlen, int64_t max_keep,
                                           std::optional<int64_t> basis, std::string layout, std::string select,
                                           int64_t start, double ridge, double blend, int64_t refine,
                                           std::optional<Tensor> weights) {
  const Tensor x = readable(given);
  apet_problem p = problem_of(APET_COMPRESS, x, true);
  set_basis(p, basis, select, start, ridge, INT32_MAX);
  p.refine = refine;
  p.layout = layout_of(layout);
  p.blend = blend;
  Tensor seqlens = cu_seqlens, keeps = cu_keep;
  apet_tensors t = {};
  t.cu_seqlens = offsets("cu_seqlens", cu_seqlens, x, seqlens);
  t.cu_keep = offsets("cu_keep", cu_keep, x, keeps);
  require(seqlens.size(0) == keeps.size(0), "cu_seqlens has ", seqlens.size(0), " entries but cu_keep has ",
          keeps.size(0));
  p.images = seqlens.size(0) - 1;
  p.total_keep = total_keep;
  require(max_seqlen >= 0 && max_keep >= 0, "max_seqlen=", max_seqlen, " and max_keep=", max_keep,
          " must be at least 0");
  // No image is longer, or keeps more, than all images together: larger bounds would only cost workspace.
  p.tokens = max_seqlen < p.total_tokens ? max_seqlen : p.total_tokens;
  p.keep = max_keep < total_keep ? max_keep : total_keep;
  check(p, apet_check(&p));
  std::optional<Tensor> contiguous;
  t.weights = weights_of(weights, x, contiguous);
  const int64_t rows = apet::all_rows(p);
  Tensor tokens = empty_beside(x, {rows, p.dim}, dtype_of(x));
  Tensor indices = empty_beside(x, {rows}, aoti_torch_dtype_int64());
  t.x = x.const_data_ptr();
  t.tokens = tokens.mutable_data_ptr();
  t.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  run(p, t, x);
  return {tokens, indices};
}

std::tuple<Tensor, Tensor> score(const Tensor& given, std::optional<int64_t> basis, std::string select, int64_t start,
                                 double ridge) {
  const Tensor x = readable(given);
  apet_problem p = problem_of(APET_SCORE, x, false);
  set_basis(p, basis, select, start, ridge, 0);
  check(p, apet_check(&p));
  Tensor residual = empty_beside(x, {p.images, p.tokens}, aoti_torch_dtype_float32());
  Tensor basis_indices = empty_beside(x, {p.images, p.basis}, aoti_torch_dtype_int64());
  apet_tensors t = {};
  t.x = x.const_data_ptr();
  t.residual = static_cast<float*>(residual.mutable_data_ptr());
  t.basis_indices = static_cast<int64_t*>(basis_indices.mutable_data_ptr());
  run(p, t, x);
  return {residual, basis_indices};
}

// Runs s5 for the rows that the caller chose. targets: which of them other tokens are merged into; none: all.
Tensor merge(const Tensor& given, const Tensor& indices, std::optional<Tensor> targets) {
  const Tensor x = readable(given);
  apet_problem p = problem_of(APET_MERGE, x, false);
  require(indices.dim() == 2 && indices.scalar_type() == ScalarType::Long && indices.size(0) == p.images,
          "indices must be int64 [", p.images, ", K], got ", form_of(indices));
  require_beside("indices", indices, x);
  p.keep = indices.size(1);
  check(p, apet_check(&p));
  Tensor kept = torch::stable::contiguous(indices), target_flags = kept;
  apet_tensors t = {};
  if (targets.has_value()) {
    require(targets->dim() == 2 && targets->scalar_type() == ScalarType::Bool && targets->size(0) == p.images &&
                targets->size(1) == p.keep,
            "targets must be bool [", p.images, ", ", p.keep, "] as indices are, got ", form_of(*targets));
    require_beside("targets", *targets, x);
    target_flags = torch::stable::contiguous(*targets);
    t.kept_targets = static_cast<const uint8_t*>(target_flags.const_data_ptr());
  }
  Tensor tokens = empty_beside(x, {p.images, p.keep, p.dim}, dtype_of(x));
  t.x = x.const_data_ptr();
  t.kept = static_cast<const int64_t*>(kept.const_data_ptr());
  t.tokens = tokens.mutable_data_ptr();
  run(p, t, x);
  return tokens;
}

}  // namespace
