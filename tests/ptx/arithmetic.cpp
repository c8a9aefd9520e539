// Instructions on single lanes: integers, floats, comparisons, bits, in the order of the PTX manual's chapters.
#include <cmath>
#include <limits>

#include "machine.h"

namespace ptx {
namespace {

template <class T, auto F>
void unary(Warp& w, const Instruction& in, uint32_t active) {
  auto *d = w.lanes<T>(in.operands[0]), *a = w.lanes<T>(in.operands[1]);
  each(active, [&](int l) { d[l] = F(a[l]); });
}

template <class T, auto F>
void binary(Warp& w, const Instruction& in, uint32_t active) {
  auto *d = w.lanes<T>(in.operands[0]), *a = w.lanes<T>(in.operands[1]), *b = w.lanes<T>(in.operands[2]);
  each(active, [&](int l) { d[l] = F(a[l], b[l]); });
}

template <class T, auto F>
void ternary(Warp& w, const Instruction& in, uint32_t active) {
  auto *d = w.lanes<T>(in.operands[0]), *a = w.lanes<T>(in.operands[1]), *b = w.lanes<T>(in.operands[2]),
       *c = w.lanes<T>(in.operands[3]);
  each(active, [&](int l) { d[l] = F(a[l], b[l], c[l]); });
}

// The product has twice the width of its factors.
template <class T, class Wide>
void multiply_wide(Warp& w, const Instruction& in, uint32_t active) {
  auto* d = w.lanes<Wide>(in.operands[0]);
  auto *a = w.lanes<T>(in.operands[1]), *b = w.lanes<T>(in.operands[2]);
  each(active, [&](int l) { d[l] = (Wide)a[l] * (Wide)b[l]; });
}

// Shift amounts have 32 bits; those that are not below the width shift all bits out.
template <class T, auto F>
void shift(Warp& w, const Instruction& in, uint32_t active) {
  auto *d = w.lanes<T>(in.operands[0]), *a = w.lanes<T>(in.operands[1]);
  auto* amount = w.lanes<uint32_t>(in.operands[2]);
  each(active, [&](int l) { d[l] = F(a[l], amount[l], sizeof(T) * 8); });
}

template <class T, auto F>
void compare(Warp& w, const Instruction& in, uint32_t active) {
  auto *a = w.lanes<T>(in.operands[1]), *b = w.lanes<T>(in.operands[2]);
  uint32_t result = 0;
  each(active, [&](int l) { result |= (uint32_t)(F(a[l], b[l]) ? 1 : 0) << l; });
  uint32_t& d = w.predicate(in.operands[0]);
  d = (d & ~active) | result;
}

template <auto F>
void logic(Warp& w, const Instruction& in, uint32_t active) {
  const uint32_t a = w.predicate(in.operands[1]), b = in.count > 2 ? w.predicate(in.operands[2]) : 0;
  uint32_t& d = w.predicate(in.operands[0]);
  d = (d & ~active) | (F(a, b) & active);
}

// The value that is not selected may be undefined.
template <class T>
void select(Warp& w, const Instruction& in, uint32_t active) {
  auto *d = w.lanes<T>(in.operands[0]), *a = w.lanes<T>(in.operands[1]), *b = w.lanes<T>(in.operands[2]);
  const auto known = [&](int operand) { return w.defined[in.operands[operand].number]; };
  const uint32_t p = w.predicate(in.operands[3]);
  if (active & ~known(3)) w.fail(__builtin_ctz(active & ~known(3)), "an undefined predicate");
  each(active, [&](int l) { d[l] = p >> l & 1 ? a[l] : b[l]; });
  const uint32_t chosen = (p & known(1)) | (~p & known(2));
  w.defined[in.operands[0].number] = (known(0) & ~active) | (chosen & active);
}

// The low `count` bits of a, inserted into b from bit `from` on.
template <class T>
void insert_bits(Warp& w, const Instruction& in, uint32_t active) {
  auto *d = w.lanes<T>(in.operands[0]), *a = w.lanes<T>(in.operands[1]), *b = w.lanes<T>(in.operands[2]);
  auto *from = w.lanes<uint32_t>(in.operands[3]), *count = w.lanes<uint32_t>(in.operands[4]);
  constexpr uint32_t kBits = sizeof(T) * 8;
  each(active, [&](int l) {
    const uint32_t first = from[l] & 255, bits = count[l] & 255;
    T mask = bits >= kBits ? ~T(0) : (T(1) << bits) - 1;
    mask = first >= kBits ? 0 : mask << first;
    d[l] = first >= kBits ? b[l] : ((a[l] << first) & mask) | (b[l] & ~mask);
  });
}

void population(Warp& w, const Instruction& in, uint32_t active) {
  auto *d = w.lanes<uint32_t>(in.operands[0]), *a = w.lanes<uint32_t>(in.operands[1]);
  each(active, [&](int l) { d[l] = (uint32_t)__builtin_popcount(a[l]); });
}

uint32_t reverse(uint32_t a) {
  uint32_t r = 0;
  for (int i = 0; i < 32; i++) r |= (a >> i & 1) << (31 - i);
  return r;
}

// Division by zero gives an unspecified value: all ones here. The least integer by -1 overflows to itself.
template <class T>
T quotient(T a, T b) {
  if (b == 0) return (T)~T(0);
  if (std::is_signed_v<T> && b == (T)-1) return (T)(0 - (std::make_unsigned_t<T>)a);
  return a / b;
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return (T)~T(0);
  if (std::is_signed_v<T> && b == (T)-1) return 0;
  return a % b;
}

// Of a NaN and a number, the number is returned; -0 is below +0.
template <class T>
T larger(T a, T b) {
  if (std::isnan(a)) return b;
  if (std::isnan(b)) return a;
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}
template <class T>
T smaller(T a, T b) {
  if (std::isnan(a)) return b;
  if (std::isnan(b)) return a;
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}

#define BINARY(type, f) binary<type, [](type a, type b) -> type { return (type)(f); }>
#define SHIFT(type, f) shift<type, [](type a, uint32_t n, uint32_t bits) -> type { return (type)(f); }>

// All types of a name whose result is the same for signed and unsigned.
void add_integers(Opcodes& t) {
#define WRAPPING(name, f)                                 \
  t.insert({name ".s16", {"2=22", BINARY(uint16_t, f)}}); \
  t.insert({name ".s32", {"4=44", BINARY(uint32_t, f)}}); \
  t.insert({name ".s64", {"8=88", BINARY(uint64_t, f)}});
  WRAPPING("add", a + b)
  WRAPPING("sub", a - b)
  WRAPPING("mul.lo", (uint64_t)a * b)
#undef WRAPPING
#define EITHER(name, f)                                   \
  t.insert({name ".s32", {"4=44", BINARY(int32_t, f)}});  \
  t.insert({name ".u32", {"4=44", BINARY(uint32_t, f)}}); \
  t.insert({name ".s64", {"8=88", BINARY(int64_t, f)}});  \
  t.insert({name ".u64", {"8=88", BINARY(uint64_t, f)}});
  EITHER("max", a > b ? a : b)
  EITHER("min", a < b ? a : b)
  EITHER("div", quotient(a, b))
  EITHER("rem", remainder(a, b))
#undef EITHER
#define BITS(name, f)                                     \
  t.insert({name ".b16", {"2=22", BINARY(uint16_t, f)}}); \
  t.insert({name ".b32", {"4=44", BINARY(uint32_t, f)}}); \
  t.insert({name ".b64", {"8=88", BINARY(uint64_t, f)}});
  BITS("and", a & b)
  BITS("or", a | b)
  BITS("xor", a ^ b)
#undef BITS
  t.insert({"mul.hi.u64", {"8=88", BINARY(uint64_t, (unsigned __int128)a* b >> 64)}});
  t.insert({"mul.hi.s32", {"4=44", BINARY(int32_t, (int64_t)a* b >> 32)}});
  t.insert({"mul.wide.s32", {"8=44", multiply_wide<int32_t, int64_t>}});
  t.insert({"mul.wide.u32", {"8=44", multiply_wide<uint32_t, uint64_t>}});
  t.insert({"mul.wide.u16", {"4=22", multiply_wide<uint16_t, uint32_t>}});
  t.insert({"mad.lo.s32", {"4=444", ternary<uint32_t, [](uint32_t a, uint32_t b, uint32_t c) { return a * b + c; }>}});
  t.insert({"neg.s32", {"4=4", unary<uint32_t, [](uint32_t a) { return 0 - a; }>}});
  t.insert({"not.b32", {"4=4", unary<uint32_t, [](uint32_t a) { return ~a; }>}});
  t.insert({"not.b64", {"8=8", unary<uint64_t, [](uint64_t a) { return ~a; }>}});
  t.insert({"shl.b32", {"4=44", SHIFT(uint32_t, n >= bits ? 0 : a << n)}});
  t.insert({"shl.b64", {"8=84", SHIFT(uint64_t, n >= bits ? 0 : a << n)}});
  t.insert({"shr.u32", {"4=44", SHIFT(uint32_t, n >= bits ? 0 : a >> n)}});
  t.insert({"shr.u64", {"8=84", SHIFT(uint64_t, n >= bits ? 0 : a >> n)}});
  t.insert({"shr.s32", {"4=44", SHIFT(int32_t, a >> (n >= bits ? bits - 1 : n))}});
  t.insert({"shr.s64", {"8=84", SHIFT(int64_t, a >> (n >= bits ? bits - 1 : n))}});
  t.insert({"bfi.b32", {"4=4444", insert_bits<uint32_t>}});
  t.insert({"bfi.b64", {"8=8844", insert_bits<uint64_t>}});
  t.insert({"popc.b32", {"4=4", population}});
  t.insert({"brev.b32", {"4=4", unary<uint32_t, reverse>}});
  // The distance of the highest set bit from the top; all ones if there is none.
  t.insert({"bfind.shiftamt.u32",
            {"4=4", unary<uint32_t, [](uint32_t a) { return a ? (uint32_t)__builtin_clz(a) : ~0u; }>}});
}

void add_floats(Opcodes& t) {
  t.insert(
      {"fma.rn.f32", {"4=444", ternary<float, [](float a, float b, float c) { return __builtin_fmaf(a, b, c); }>}});
  t.insert(
      {"fma.rn.f64", {"8=888", ternary<double, [](double a, double b, double c) { return __builtin_fma(a, b, c); }>}});
  t.insert({"add.rn.f32", {"4=44", BINARY(float, a + b)}});
  t.insert({"add.rn.f64", {"8=88", BINARY(double, a + b)}});
  t.insert({"sub.rn.f32", {"4=44", BINARY(float, a - b)}});
  t.insert({"mul.rn.f32", {"4=44", BINARY(float, a* b)}});
  t.insert({"mul.rn.f64", {"8=88", BINARY(double, a* b)}});
  t.insert({"div.rn.f32", {"4=44", BINARY(float, a / b)}});
  t.insert({"max.f32", {"4=44", binary<float, larger<float>>}});
  t.insert({"min.f32", {"4=44", binary<float, smaller<float>>}});
  t.insert({"neg.f32", {"4=4", unary<float, [](float a) { return -a; }>}});
  t.insert({"neg.f64", {"8=8", unary<double, [](double a) { return -a; }>}});
  t.insert({"sqrt.rn.f32", {"4=4", unary<float, [](float a) { return std::sqrt(a); }>}});
  t.insert({"sqrt.rn.f64", {"8=8", unary<double, [](double a) { return std::sqrt(a); }>}});
  t.insert({"rcp.rn.f64", {"8=8", unary<double, [](double a) { return 1 / a; }>}});
}

// Floats: eq, lt, le, gt, ge are false for a NaN, and with the suffix u (unordered) true.
void add_comparisons(Opcodes& t) {
#define COMPARE(name, width, type, f) \
  t.insert({"setp." name, {"p=" width width, compare<type, [](type a, type b) { return (f); }>}});
#define ORDERED(suffix, width, type)         \
  COMPARE("eq." suffix, width, type, a == b) \
  COMPARE("lt." suffix, width, type, a < b)  \
  COMPARE("le." suffix, width, type, a <= b) \
  COMPARE("gt." suffix, width, type, a > b)  \
  COMPARE("ge." suffix, width, type, a >= b)
#define INTEGER(suffix, width, type) \
  ORDERED(suffix, width, type)       \
  COMPARE("ne." suffix, width, type, a != b)
#define FLOAT(suffix, width, type)               \
  ORDERED(suffix, width, type)                   \
  COMPARE("ltu." suffix, width, type, !(a >= b)) \
  COMPARE("leu." suffix, width, type, !(a > b))  \
  COMPARE("gtu." suffix, width, type, !(a <= b)) \
  COMPARE("geu." suffix, width, type, !(a < b))  \
  COMPARE("neu." suffix, width, type, !(a == b)) \
  COMPARE("nan." suffix, width, type, std::isnan(a) || std::isnan(b))
  INTEGER("s16", "2", int16_t)
  INTEGER("u16", "2", uint16_t)
  INTEGER("s32", "4", int32_t)
  INTEGER("u32", "4", uint32_t)
  INTEGER("b32", "4", uint32_t)
  INTEGER("s64", "8", int64_t)
  INTEGER("u64", "8", uint64_t)
  FLOAT("f32", "4", float)
  FLOAT("f64", "8", double)
#undef FLOAT
#undef INTEGER
#undef ORDERED
#undef COMPARE
  t.insert({"and.pred", {"p=pp", logic<[](uint32_t a, uint32_t b) { return a & b; }>}});
  t.insert({"or.pred", {"p=pp", logic<[](uint32_t a, uint32_t b) { return a | b; }>}});
  t.insert({"xor.pred", {"p=pp", logic<[](uint32_t a, uint32_t b) { return a ^ b; }>}});
  t.insert({"not.pred", {"p=p", logic<[](uint32_t a, uint32_t) { return ~a; }>}});
  t.insert({"mov.pred", {"p=p", logic<[](uint32_t a, uint32_t) { return a; }>}});
  for (const char* type : {"b32", "u32", "f32"})
    t.insert({std::string("selp.") + type, {"4=44p", select<uint32_t>, Flow::kPlain, Undefined::kOwn}});
  for (const char* type : {"b64", "s64", "u64"})
    t.insert({std::string("selp.") + type, {"8=88p", select<uint64_t>, Flow::kPlain, Undefined::kOwn}});
  t.insert({"selp.u16", {"2=22p", select<uint16_t>, Flow::kPlain, Undefined::kOwn}});
}

}  // namespace

void add_arithmetic(Opcodes& t) {
  add_integers(t);
  add_floats(t);
  add_comparisons(t);
}

}  // namespace ptx
