// The module _host: the functions of apet.h that Python calls besides the ops: build information, plans, instruction
// sets.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "apet_testing.h"
#include "build_info.h"

namespace py = pybind11;

namespace {

// The dtypes, by the names that Python uses.
const std::pair<const char*, apet_dtype> kDtypes[] = {
    {"float32", APET_FLOAT32}, {"float16", APET_FLOAT16}, {"bfloat16", APET_BFLOAT16}};
const std::pair<const char*, apet_layout> kLayouts[] = {
    {"inplace", APET_INPLACE}, {"overwrite", APET_OVERWRITE}, {"append", APET_APPEND}};
const std::pair<const char*, apet_select> kSelects[] = {{"fps", APET_FPS}, {"qr", APET_QR}};

template <class T, size_t N>
T named(const char* what, const std::string& name, const std::pair<const char*, T> (&values)[N]) {
  std::string all;
  for (const auto& [key, value] : values) {
    if (name == key) return value;
    all += (all.empty() ? "" : ", ") + std::string(key);
  }
  throw py::value_error(std::string(what) + "='" + name + "' is none of " + all);
}

void check(const apet_problem& problem, apet_status status) {
  if (status == APET_OK) return;
  char text[256];
  apet_error_message(&problem, status, text, sizeof text);
  throw py::value_error(text);
}

py::dict plan(int64_t images, int64_t tokens, int64_t dim, int64_t keep, std::optional<int32_t> basis,
              const std::string& dtype, const std::string& layout, const std::string& select, int64_t start,
              double ridge, double blend, int64_t refine, int32_t threads) {
  apet_problem p = {};
  p.op = APET_COMPRESS;
  p.dtype = named("dtype", dtype, kDtypes);
  p.layout = named("layout", layout, kLayouts);
  p.select = named("select", select, kSelects);
  p.images = images, p.tokens = tokens, p.dim = dim, p.keep = keep;
  p.basis = basis.value_or(APET_BASIS_KEEP), p.refine = refine;
  p.stride_xb = tokens * dim, p.stride_xn = dim, p.stride_xd = 1;
  p.start = start, p.ridge = ridge, p.blend = blend;
  apet_cpu_plan_t plan;
  check(p, apet_cpu_plan(&p, threads, &plan));
  py::dict d;
  d["isa"] = apet_isa_name(plan.isa);
  d["images_in_flight"] = plan.images_in_flight;
  d["threads_per_image"] = plan.threads_per_image;
  d["workspace_bytes"] = plan.workspace_bytes;
  d["serial_us"] = plan.estimated_ns[0] / 1e3;
  d["planned_us"] = plan.estimated_ns[1] / 1e3;
  return d;
}

// The instruction sets, those of each architecture in ascending order.
const apet_isa kIsas[] = {APET_ISA_GENERIC, APET_ISA_AVX2,     APET_ISA_AVX512, APET_ISA_AVX512_BF16,
                          APET_ISA_AMX,     APET_ISA_AMX_FP16, APET_ISA_NEON,   APET_ISA_NEON_BF16};

py::list cpu_isa() {
  py::list names;
  for (apet_isa isa : kIsas)
    if (apet_cpu_has_isa(isa)) names.append(apet_isa_name(isa));
  return names;
}

void use_cpu_isa(const py::object& name) {
  apet_isa wanted = APET_ISA_BEST;
  if (!name.is_none()) {
    const std::string text = py::str(name);
    for (apet_isa isa : kIsas)
      if (text == apet_isa_name(isa)) wanted = isa;
    if (wanted == APET_ISA_BEST || apet_cpu_use_isa(wanted) != APET_OK)
      throw py::value_error("isa='" + text + "' is none of those usable here: " +
                            std::string(py::str(py::str(", ").attr("join")(cpu_isa()))));
    return;
  }
  apet_cpu_use_isa(wanted);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Build information and plans of the apet library";
  m.def("build_info", [] {
    py::dict d;
    d["version"] = apet_version();
    d["commit"] = APET_BUILD_COMMIT;
    d["compiler"] = APET_BUILD_COMPILER;
    d["flags"] = APET_BUILD_FLAGS;
    d["build_type"] = APET_BUILD_TYPE;
    d["cpu_isas"] = APET_BUILD_ISAS;
    d["cuda_archs"] = APET_BUILD_CUDA_ARCHS;
    d["cuda_compiler"] = APET_BUILD_CUDA_COMPILER;
    d["torch_headers"] = APET_BUILD_TORCH;
    return d;
  });
  m.def("plan", &plan, py::kw_only(), py::arg("images"), py::arg("tokens"), py::arg("dim"), py::arg("keep"),
        py::arg("basis"), py::arg("dtype"), py::arg("layout"), py::arg("select"), py::arg("start"), py::arg("ridge"),
        py::arg("blend"), py::arg("refine"), py::arg("threads"));
  m.def("cpu_isa", &cpu_isa);
  m.def("use_cpu_isa", &use_cpu_isa, py::arg("name"));
}
