// The vector types and operations of one instruction set: V holds W floats, I holds W int32.
//
// Included inside the namespace of its instruction set. Arithmetic is written with operators; sums of products use
// fma(), so that rounding does not depend on the compiler (contraction is off). Everything is static, so that the
// linker cannot use a symbol of one instruction set for another.
#pragma once

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;  // SSE2, NEON, VSX, or four scalars where there is no vector unit
#endif
// Vector registers that the loops count on.
#if defined(__AVX512F__) || defined(APET_NEON)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

typedef float V __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef float VU __attribute__((vector_size(4 * W), aligned(4), may_alias));

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Broadcasts bits, without arithmetic: two bfloat16 read as one float may look like a subnormal, which a processor that
// flushes subnormals would turn into 0.
static inline V splat(float a) {
#if defined(__AVX512F__)
  return (V)_mm512_set1_ps(a);
#elif defined(__AVX2__)
  return (V)_mm256_set1_ps(a);
#else
  return V{a, a, a, a};
#endif
}
// Returns the 32 bits at p in every lane; p need not be aligned.
static inline V splat_at(const char* p) {
  float a;
  __builtin_memcpy(&a, p, 4);
  return splat(a);
}
static inline V load(const float* p) { return *reinterpret_cast<const VU*>(p); }
static inline void store(float* p, V v) { *reinterpret_cast<VU*>(p) = v; }
// Forces v into a register; otherwise GCC reloads it for each product.
static inline V in_register(V v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#endif
  return v;
}
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static inline V fma(V a, V b, V c) {
#if defined(__AVX512F__)
  return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(APET_NEON)
  return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#elif defined(__FP_FAST_FMAF)
  V r;
  for (int i = 0; i < W; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;  // no fused instruction here: two roundings, on every such machine alike
#endif
}
// Adds the lanes of v to W running sums in double, and sums those, rounding once: lane i and lane i + W/2, and so on,
// in one order for every compiler. Total{} is zero.
struct Total {
#if defined(__AVX512F__)
  __m512d low, high;
  void add(V v) {
    low += _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
    high += _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
  }
  double sum() const {
    const __m512d eight = low + high;
    const __m256d four = _mm512_castpd512_pd256(eight) + _mm512_extractf64x4_pd(eight, 1);
    const __m128d two = _mm256_castpd256_pd128(four) + _mm256_extractf128_pd(four, 1);
    return two[0] + two[1];
  }
#elif defined(__AVX2__)
  __m256d low, high;
  void add(V v) {
    low += _mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v));
    high += _mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v, 1));
  }
  double sum() const {
    const __m256d four = low + high;
    const __m128d two = _mm256_castpd256_pd128(four) + _mm256_extractf128_pd(four, 1);
    return two[0] + two[1];
  }
#elif defined(APET_NEON)
  float64x2_t low, high;
  void add(V v) {
    low += vcvt_f64_f32(vget_low_f32((float32x4_t)v));
    high += vcvt_high_f64_f32((float32x4_t)v);
  }
  double sum() const {
    const float64x2_t two = low + high;
    return two[0] + two[1];
  }
#else
  double lane[W];
  void add(V v) {
    for (int i = 0; i < W; i++) lane[i] += v[i];
  }
  double sum() const { return (lane[0] + lane[2]) + (lane[1] + lane[3]); }
#endif
};

// ---- conversions to 16-bit floats, to the nearest (ties to even), and from them
static inline float as_float(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
static inline uint32_t as_bits(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
}
static inline void narrow(float f, Half* h) {
  const uint32_t sign = as_bits(f) >> 16 & 0x8000u;
  uint32_t magnitude = as_bits(f) & 0x7fffffffu;
  if (magnitude > 0x7f800000u) magnitude = 0x7e00u;        // NaN
  else if (magnitude >= 0x477ff000u) magnitude = 0x7c00u;  // 65520 and more round to infinity
  else if (magnitude < 0x38800000u)                        // subnormal: let the adder round at 2^-24
    magnitude = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  else magnitude = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  h->bits = (uint16_t)(sign | magnitude);
}

typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t UH __attribute__((vector_size(2 * W)));
#if !defined(__AVX2__)
static inline U load_bits(const void* p) {
  UH bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return __builtin_convertvector(bits, U);
}
#endif

static inline V load(const Half* p) {
#if defined(__AVX512F__)
  return (V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(APET_NEON)
  return (V)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits)));
#else
  const U h = load_bits(p), magnitude = (h & 0x7fff) << 13;
  const V value = (V)magnitude * 0x1p112f;           // the exponents' biases differ by 112
  const U beyond = (U)(magnitude >= 0x7c00u << 13);  // infinity and NaN
  return (V)((U)value | (beyond & 0x7f800000) | (h & 0x8000) << 16);
#endif
}
static inline V load(const BFloat16* p) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return (V)_mm512_slli_epi32(wide, 16);
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return (V)_mm256_slli_epi32(wide, 16);
#else
  return (V)(load_bits(p) << 16);
#endif
}
static inline void store(Half* p, V v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(APET_NEON)
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
  for (int i = 0; i < W; i++) narrow(v[i], p + i);
#endif
}
static inline void store(BFloat16* p, V v) {  // all lanes at once: the compiler does not vectorise a loop here
  const U bits = (U)v, nan = (U)((bits & 0x7fffffff) > 0x7f800000u);
  const U rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const auto half = __builtin_convertvector((nan & (bits >> 16 | 0x40)) | (~nan & rounded), UH);
  __builtin_memcpy(p, &half, sizeof half);
}

// Load and store the first n < W elements; a load fills up with zeros. Nothing past p[n - 1] is touched.
template <class T>
static inline V load_n(const T* p, int64_t n) {
  T full[W] = {};
  for (int64_t i = 0; i < n; i++) full[i] = p[i];
  return load(full);
}
template <class T>
static inline void store_n(T* p, V v, int64_t n) {
  T full[W];
  store(full, v);
  for (int64_t i = 0; i < n; i++) p[i] = full[i];
}

// Transposes a W x W block of 32-bit units.
#if defined(__AVX512F__)
static inline void transpose(V (&v)[W]) {
  __m512i a[W], b[W];
  for (int i = 0; i < W; i++) a[i] = (__m512i)v[i];
  for (int i = 0; i < 8; i++) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    v[i] = (V)_mm512_shuffle_i32x4(b[i], b[i + 8], 0x88);
    v[i + 8] = (V)_mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd);
    v[i + 4] = (V)_mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88);
    v[i + 12] = (V)_mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd);
  }
}
#elif defined(__AVX2__)
static inline void transpose(V (&v)[W]) {
  __m256 a[W], b[W];
  for (int i = 0; i < 4; i++) {
    a[2 * i] = _mm256_unpacklo_ps((__m256)v[2 * i], (__m256)v[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_ps((__m256)v[2 * i], (__m256)v[2 * i + 1]);
  }
  for (int i = 0; i < 2; i++) {
    b[4 * i] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0x44);
    b[4 * i + 1] = _mm256_shuffle_ps(a[4 * i], a[4 * i + 2], 0xee);
    b[4 * i + 2] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0x44);
    b[4 * i + 3] = _mm256_shuffle_ps(a[4 * i + 1], a[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; i++) {
    v[i] = (V)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    v[i + 4] = (V)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}
#elif defined(APET_NEON)
static inline void transpose(V (&v)[W]) {
  const float32x4x2_t a = vzipq_f32((float32x4_t)v[0], (float32x4_t)v[2]);
  const float32x4x2_t b = vzipq_f32((float32x4_t)v[1], (float32x4_t)v[3]);
  const float32x4x2_t low = vzipq_f32(a.val[0], b.val[0]), high = vzipq_f32(a.val[1], b.val[1]);
  v[0] = (V)low.val[0], v[1] = (V)low.val[1], v[2] = (V)high.val[0], v[3] = (V)high.val[1];
}
#else
static inline void transpose(V (&v)[W]) {
  V t[W] = {};
  for (int i = 0; i < W; i++)
    for (int j = 0; j < W; j++) t[j][i] = v[i][j];
  for (int i = 0; i < W; i++) v[i] = t[i];
}
#endif
