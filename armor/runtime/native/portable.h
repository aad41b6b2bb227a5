/* Primitives in plain C over 8 fp32 lanes, which any compiler with vector extensions turns into what its target has
 * (NEON, SSE2). bf16 weights become fp32 on the way in. */
#include <stdint.h>
#include <string.h>

#include "linear.h"

#define LANES 8
#define UNIT 1
#define TILE 4
#define DOT_ROWS 4
typedef float vec __attribute__((vector_size(32)));
typedef float element;

static inline vec zero(void) { return (vec){0}; }
static inline vec add(vec a, vec b) { return a + b; }
static inline float sum(vec v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }
static inline void sum_four(float to[4], vec a, vec b, vec c, vec d) {
    to[0] = sum(a), to[1] = sum(b), to[2] = sum(c), to[3] = sum(d);
}
static inline vec load_vec(const void *p) {
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
static inline void store_vec(void *p, vec v) { memcpy(p, &v, sizeof v); }
static inline vec multiply_add(vec s, vec w, vec x) { return s + w * x; }
static inline vec broadcast(const void *unit) {
    float f;
    memcpy(&f, unit, sizeof f);
    return (vec){f, f, f, f, f, f, f, f};
}
static inline vec to_units(vec even, vec odd) { return (void)odd, even; }

static inline vec load_f32(const float *p, int64_t n) {
    vec v = {0};
    memcpy(&v, p, n >= 8 ? sizeof v : (size_t)n * sizeof *p);
    return v;
}
static inline void store_f32(float *p, vec v, int64_t n) { memcpy(p, &v, n >= 8 ? sizeof v : (size_t)n * sizeof *p); }
static inline vec load_element(const element *p, int64_t n) { return load_f32(p, n); }
static inline void store_elements(element *p, vec v, int64_t n) { store_f32(p, v, n); }

typedef uint16_t halves __attribute__((vector_size(16)));
static inline vec widen(halves bf16) {
    typedef uint32_t words __attribute__((vector_size(32)));
    return (vec)(__builtin_convertvector(bf16, words) << 16);
}
static inline vec load_bf16(const uint16_t *p, int64_t n) {
    halves packed = {0};
    memcpy(&packed, p, n >= 8 ? sizeof packed : (size_t)n * sizeof *p);
    return widen(packed);
}
/* To the nearest, ties to even; NaN stays NaN. */
static inline void store_bf16(uint16_t *p, vec v, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float f = v[i];
        uint32_t bits;
        memcpy(&bits, &f, sizeof bits);
        p[i] = f != f ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

static inline vec fused(vec s, vec a, vec b) { return s + a * b; }
static inline vec load_int8(const void *p, int64_t n) {
    const int8_t *bytes = p;
    vec v = {0};
    for (int i = 0; i < 8 && i < n; i++) v[i] = bytes[i];
    return v;
}
static inline vec load_half_int8(const void *p) { return load_int8(p, 4); }
static inline vec load_int4(const void *p, int64_t n) {
    const uint8_t *bytes = p;
    vec v = {0};
    for (int i = 0; i < 8 && i < n; i++) v[i] = (float)(((bytes[i / 2] >> i % 2 * 4 & 15) ^ 8) - 8);
    return v;
}
static inline vec load_half_int4(const void *p) { return load_int4(p, 4); }
/* A float of e4m3. Where its exponent is 0 its size counts in units of 2^-9. */
static inline float of_fp8(uint8_t byte) {
    const uint32_t size = byte & 127, bits = (size << 20) + (120u << 23);
    float f = (float)size * 0x1p-9f;
    if (size >= 8) memcpy(&f, &bits, sizeof f);
    return byte > 127 ? -f : f;
}
static inline vec load_fp8(const void *p, int64_t n) {
    const uint8_t *bytes = p;
    vec v = {0};
    for (int i = 0; i < 8 && i < n; i++) v[i] = of_fp8(bytes[i]);
    return v;
}
static inline vec load_half_fp8(const void *p) { return load_fp8(p, 4); }

static inline vec spread(vec packed, uint32_t bits) {
    const uint8_t *index = armor_spread_index[bits];
    float v[128 + 1];
    memcpy(v, &packed, sizeof packed);
    v[128] = 0; /* what a column without a value takes */
    return (vec){v[index[0]], v[index[1]], v[index[2]], v[index[3]],
                 v[index[4]], v[index[5]], v[index[6]], v[index[7]]};
}

static inline void transpose(vec v[8]) {
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < i; j++) {
            float f = v[i][j];
            v[i][j] = v[j][i];
            v[j][i] = f;
        }
}

#ifdef BF16
#define NAME(f) f##_portable_bf16
typedef uint16_t weight;
static inline vec load(const weight *p, int64_t n) { return load_bf16(p, n); }
static inline vec load_half(const weight *p) {
    typedef uint64_t pair __attribute__((vector_size(16)));
    uint64_t four; /* not straight into half a vector: reading that back would wait for the store */
    memcpy(&four, p, sizeof four);
    return widen((halves)(pair){four});
}
static inline void store_floats(weight *p, vec v, int64_t n) { store_bf16(p, v, n); }
#else
#define NAME(f) f##_portable_f32
typedef float weight;
static inline vec load(const weight *p, int64_t n) { return load_f32(p, n); }
static inline vec load_half(const weight *p) { return (vec){p[0], p[1], p[2], p[3]}; }
static inline void store_floats(weight *p, vec v, int64_t n) { store_f32(p, v, n); }
#endif
static inline vec load_packed(const weight *p, int64_t n) { return load(p, n); }
static inline vec load_floats(const weight *p, int64_t n) { return load(p, n); }
static inline void store_weights(weight *p, vec v, int64_t n) { store_floats(p, v, n); }

#include "loops.h"
