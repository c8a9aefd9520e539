// mov, with packing and unpacking, and cvt.
#include <cstring>

#include "machine.h"

namespace ptx {

// ---- 16-bit floats, exact to float32 and rounded to nearest, ties to even, from it

float half_to_float(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, sizeof bits);
  return (float)value;
}

float bfloat16_to_float(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  std::memcpy(&value, &wide, sizeof wide);
  return value;
}

namespace {

constexpr uint16_t kNaN16 = 0x7fff;  // the hardware converts any NaN to this

uint16_t float_to_half(float value) {
  if (value != value) return kNaN16;
  const _Float16 half = (_Float16)value;
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

uint16_t float_to_bfloat16(float value) {
  if (value != value) return kNaN16;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T>
void move(Warp& w, const Instruction& in, uint32_t active) {
  auto *d = w.lanes<T>(in.operands[0]), *a = w.lanes<T>(in.operands[1]);
  each(active, [&](int l) { d[l] = a[l]; });
}

// Two halves make a word, the first one its low bits.
template <class Half, class Word>
void pack(Warp& w, const Instruction& in, uint32_t active) {
  auto* d = w.lanes<Word>(in.operands[0]);
  auto *low = w.lanes<Half>(in.operands[1]), *high = w.lanes<Half>(in.operands[2]);
  each(active, [&](int l) { d[l] = (Word)low[l] | (Word)high[l] << sizeof(Half) * 8; });
}

template <class Half, class Word>
void unpack(Warp& w, const Instruction& in, uint32_t active) {
  auto *low = w.lanes<Half>(in.operands[0]), *high = w.lanes<Half>(in.operands[1]);
  auto* a = w.lanes<Word>(in.operands[2]);
  each(active, [&](int l) {
    const Word word = a[l];
    low[l] = (Half)word;
    high[l] = (Half)(word >> sizeof(Half) * 8);
  });
}

template <class To, class From, auto F>
void convert(Warp& w, const Instruction& in, uint32_t active) {
  auto* d = w.lanes<To>(in.operands[0]);
  auto* a = w.lanes<From>(in.operands[1]);
  each(active, [&](int l) { d[l] = F(a[l]); });
}

// Integers: a source register may be wider than its type, of which the low bits count.
template <class To, class From>
void convert_integer(Warp& w, const Instruction& in, uint32_t active) {
  each(active, [&](int l) { w.set(in.operands[0], l, (uint64_t)(To)(From)w.integer(in.operands[1], l)); });
}

#define CONVERT(to, from, f) convert<to, from, [](from a) -> to { return (to)(f); }>

}  // namespace

void add_conversions(Opcodes& t) {
  for (const char* type : {"u16", "b16"})
    t.insert({std::string("mov.") + type, {"2=2", move<uint16_t>, Flow::kPlain, Undefined::kPasses}});
  for (const char* type : {"u32", "b32", "f32"})
    t.insert({std::string("mov.") + type, {"4=4", move<uint32_t>, Flow::kPlain, Undefined::kPasses}});
  for (const char* type : {"u64", "b64", "f64"})
    t.insert({std::string("mov.") + type, {"8=8", move<uint64_t>, Flow::kPlain, Undefined::kPasses}});
  t.insert({"mov.b32", {"4=22", pack<uint16_t, uint32_t>, Flow::kPlain, Undefined::kPasses}});
  t.insert({"mov.b32", {"22=4", unpack<uint16_t, uint32_t>, Flow::kPlain, Undefined::kPasses}});
  t.insert({"mov.b64", {"8=44", pack<uint32_t, uint64_t>, Flow::kPlain, Undefined::kPasses}});
  t.insert({"mov.b64", {"44=8", unpack<uint32_t, uint64_t>, Flow::kPlain, Undefined::kPasses}});

  t.insert({"cvt.u64.u32", {"8=>4", convert_integer<uint64_t, uint32_t>}});
  t.insert({"cvt.s64.s32", {"8=>4", convert_integer<int64_t, int32_t>}});
  t.insert({"cvt.u32.u64", {"4=8", convert_integer<uint32_t, uint64_t>}});
  t.insert({"cvt.u16.u32", {"2=>4", convert_integer<uint16_t, uint32_t>}});
  t.insert({"cvt.u32.u16", {"4=>2", convert_integer<uint32_t, uint16_t>}});
  t.insert({"cvt.f64.f32", {"8=4", CONVERT(double, float, a)}});
  t.insert({"cvt.rn.f32.f64", {"4=8", CONVERT(float, double, a)}});
  t.insert({"cvt.rn.f32.s32", {"4=4", CONVERT(float, int32_t, a)}});
  t.insert({"cvt.f32.f16", {"4=2", CONVERT(float, uint16_t, half_to_float(a))}});
  t.insert({"cvt.rn.f16.f32", {"2=4", CONVERT(uint16_t, float, float_to_half(a))}});
  t.insert({"cvt.f32.bf16", {"4=2", CONVERT(float, uint16_t, bfloat16_to_float(a))}});
  t.insert({"cvt.rn.bf16.f32", {"2=4", CONVERT(uint16_t, float, float_to_bfloat16(a))}});
}

}  // namespace ptx
