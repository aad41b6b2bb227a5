/* AVX2 and FMA primitives: 8 fp32 lanes; bf16 weights become fp32 on the way in. There is no expand instruction: the
 * columns of a packed vector come from a table by the byte of the mask. Processors: Haswell, Zen and later. */
#define TARGET "avx2,fma,popcnt,bmi,bmi2"
#include "target.h"

#include "linear.h"

#define LANES 8
#define UNIT 1
#define TILE 4
#define DOT_ROWS 4
typedef __m256 vec;
typedef float element;

static inline vec zero(void) { return _mm256_setzero_ps(); }
static inline vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
static inline float sum(vec v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
static inline void sum_four(float to[4], vec a, vec b, vec c, vec d) {
    const vec v = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)));
}
static inline vec load_vec(const void *p) { return _mm256_loadu_ps(p); }
static inline void store_vec(void *p, vec v) { _mm256_storeu_ps(p, v); }
static inline vec multiply_add(vec s, vec w, vec x) { return _mm256_fmadd_ps(w, x, s); }
static inline vec broadcast(const void *unit) {
    float f;
    memcpy(&f, unit, sizeof f);
    return _mm256_set1_ps(f);
}
static inline vec to_units(vec even, vec odd) { return (void)odd, even; }

static inline __m256i first(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline vec load_f32(const float *p, int64_t n) {
    return n >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, first(n));
}
static inline void store_f32(float *p, vec v, int64_t n) {
    if (n >= 8)
        _mm256_storeu_ps(p, v);
    else
        _mm256_maskstore_ps(p, first(n), v);
}
static inline vec load_element(const element *p, int64_t n) { return load_f32(p, n); }
static inline void store_elements(element *p, vec v, int64_t n) { store_f32(p, v, n); }

static inline vec widen(__m128i bf16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
}
static inline vec load_bf16(const uint16_t *p, int64_t n) {
    if (n >= 8) return widen(_mm_loadu_si128((const void *)p));
    uint16_t some[8] = {0};
    for (int64_t i = 0; i < n; i++) some[i] = p[i];
    return widen(_mm_loadu_si128((const void *)some));
}
/* To the nearest, ties to even; NaN stays NaN. */
static inline void store_bf16(uint16_t *p, vec v, int64_t n) {
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
    __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
    if (n >= 8) {
        _mm_storeu_si128((void *)p, packed);
    } else {
        uint16_t some[8];
        _mm_storeu_si128((void *)some, packed);
        memcpy(p, some, (size_t)n * sizeof *p);
    }
}

static inline vec fused(vec s, vec a, vec b) { return _mm256_fmadd_ps(a, b, s); }
static inline vec bytes_to_floats(uint64_t bytes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128((int64_t)bytes)));
}
/* The first n <= 8 bytes, zeros after them. */
static inline uint64_t load_bytes(const void *p, int64_t n) {
    uint64_t bytes = 0;
    memcpy(&bytes, p, n >= 8 ? 8 : (size_t)n);
    return bytes;
}
static inline vec load_int8(const void *p, int64_t n) { return bytes_to_floats(load_bytes(p, n)); }
static inline vec load_half_int8(const void *p) { return load_int8(p, 4); }
/* Eight int4, the first in the lowest four bits, as bytes. */
static inline uint64_t nibbles(uint32_t packed) {
    uint64_t bytes = _pdep_u64(packed, 0x0f0f0f0f0f0f0f0f);
    return (((bytes ^ 0x0808080808080808) | 0x8080808080808080) - 0x0808080808080808) ^ 0x8080808080808080;
}
static inline vec load_int4(const void *p, int64_t n) {
    uint32_t packed = 0;
    memcpy(&packed, p, n >= 8 ? 4 : (size_t)(n + 1) / 2);
    return bytes_to_floats(nibbles(packed));
}
static inline vec load_half_int4(const void *p) {
    uint16_t packed;
    memcpy(&packed, p, sizeof packed);
    return bytes_to_floats(nibbles(packed));
}
/* Eight floats of e4m3. Where the exponent is 0 the size counts in units of 2^-9. */
static inline vec fp8_to_floats(uint64_t bytes) {
    const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((int64_t)bytes));
    const __m256i size = _mm256_and_si256(wide, _mm256_set1_epi32(127));
    const __m256i bits = _mm256_add_epi32(_mm256_slli_epi32(size, 20), _mm256_set1_epi32(120 << 23));
    const vec small = _mm256_mul_ps(_mm256_cvtepi32_ps(size), _mm256_set1_ps(0x1p-9f));
    const __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), size);
    const vec number = _mm256_blendv_ps(_mm256_castsi256_ps(bits), small, _mm256_castsi256_ps(is_small));
    return _mm256_or_ps(number, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_srli_epi32(wide, 7), 31)));
}
static inline vec load_fp8(const void *p, int64_t n) { return fp8_to_floats(load_bytes(p, n)); }
static inline vec load_half_fp8(const void *p) { return load_fp8(p, 4); }

static inline vec spread(vec packed, uint32_t bits) {
    __m256i index = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)armor_spread_index[bits]));
    vec columns = _mm256_permutevar8x32_ps(packed, index);
    return _mm256_blendv_ps(columns, zero(), _mm256_castsi256_ps(index)); /* an index of 128 is negative here */
}

static inline void transpose(vec v[8]) {
    vec t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        v[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        v[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        v[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        v[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
    }
    memcpy(v, t, sizeof t);
}

#ifdef BF16
#define NAME(f) f##_avx2_bf16
typedef uint16_t weight;
static inline vec load(const weight *p, int64_t n) { return load_bf16(p, n); }
static inline vec load_half(const weight *p) { return widen(_mm_loadl_epi64((const void *)p)); }
static inline void store_floats(weight *p, vec v, int64_t n) { store_bf16(p, v, n); }
#else
#define NAME(f) f##_avx2_f32
typedef float weight;
static inline vec load(const weight *p, int64_t n) { return load_f32(p, n); }
static inline vec load_half(const weight *p) { return _mm256_castps128_ps256(_mm_loadu_ps(p)); }
static inline void store_floats(weight *p, vec v, int64_t n) { store_f32(p, v, n); }
#endif
static inline vec load_packed(const weight *p, int64_t n) { return load(p, n); }
static inline vec load_floats(const weight *p, int64_t n) { return load(p, n); }
static inline void store_weights(weight *p, vec v, int64_t n) { store_floats(p, v, n); }

#include "loops.h"

END_TARGET
