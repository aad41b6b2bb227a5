/* Runs the library's linears on buffers of exactly their size, made to be compiled with sanitizers. What they compute is
 * compared elsewhere; here only that a linear has the same bits in one call with others. Exit code 1: it has not. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void (*parallel_function)(void (*)(void *), void *, unsigned, unsigned);
int armor_initialize(void);
struct integers {
    int core, blocks;
    const void *core_scales, *left_scales, *right_scales;
    int64_t group;
};
struct part {
    const void *values, *mask, *left, *right, *bias;
    void *y;
    const struct integers *integers;
    int64_t out, kept, group, left_size, right_size, y_stride;
};
int armor_linears(int level, int type, const void *x, int64_t rows, int64_t in, const struct part *parts, int count,
                  parallel_function parallel, int threads);
struct product {
    const void *x;
    const struct part *parts;
    int64_t rows, in, count;
};
int armor_products(int level, int type, const struct product *all, int count, parallel_function parallel, int threads);
void armor_unpack(int level, int type, const void *values, const void *mask, void *dense, int64_t rows, int64_t in,
                  int64_t kept, parallel_function parallel, int threads);

struct start {
    void (*function)(void *);
    void *argument;
};

static void *begin(void *start) {
    ((struct start *)start)->function(((struct start *)start)->argument);
    return NULL;
}

static void parallel(void (*function)(void *), void *argument, unsigned threads, unsigned flags) {
    pthread_t others[8];
    struct start start = {function, argument};
    (void)flags;
    for (unsigned t = 1; t < threads; t++) pthread_create(&others[t], NULL, begin, &start);
    function(argument);
    for (unsigned t = 1; t < threads; t++) pthread_join(others[t], NULL);
}

static float number(void) { return (float)rand() / (float)RAND_MAX * 2 - 1; }

static void *random_array(int type, int64_t n) {
    void *array = malloc((size_t)n * (type ? 2 : 4));
    for (int64_t i = 0; i < n; i++) {
        float f = number();
        uint32_t bits;
        memcpy(&bits, &f, sizeof bits);
        if (type)
            ((uint16_t *)array)[i] = (uint16_t)(bits >> 16);
        else
            ((float *)array)[i] = f;
    }
    return array;
}

enum { FLOATS, INT8, INT4, FP8 };

/* `n` numbers: floats of `type`, or bytes of integers. */
static void *random_numbers(int core, int type, int64_t n) {
    if (core == FLOATS) return random_array(type, n);
    uint8_t *array = malloc((size_t)n);
    for (int64_t i = 0; i < n; i++) array[i] = (uint8_t)rand();
    return array;
}

/* A linear of out x in with an n:m core and blocks of left and right; `columns` of a core of integers share a scale. */
struct shape {
    int64_t in, out, n, m, left, right;
    int core;
    int64_t columns;
};

/* `part` twice in one call, side by side and with B shared, and eight times, a thread each time: the bits of `y`. */
static int repeats(int level, int type, const void *x, int64_t rows, int64_t in, struct part part, const char *y,
                   int threads) {
    size_t bytes = (size_t)part.out * (type ? 2 : 4);
    char *places = malloc(8 * bytes * (size_t)rows);
    struct part parts[] = {part, part}, own[8];
    struct product products[8];
    int off = 0;
    parts[0].y = places, parts[1].y = places + bytes;
    parts[0].y_stride = parts[1].y_stride = 2 * part.out;
    armor_linears(level, type, x, rows, in, parts, 2, parallel, threads);
    for (int64_t r = 0; r < 2 * rows; r++)
        off |= memcmp(places + (size_t)r * bytes, y + (size_t)(r / 2) * bytes, bytes) != 0;
    for (int i = 0; i < 8; i++) {
        products[i] = (struct product){x, &own[i], rows, in, 1};
        own[i] = part;
        own[i].y = places + (size_t)(i * rows) * bytes;
    }
    armor_products(level, type, products, 8, parallel, threads);
    for (int i = 0; i < 8; i++) off |= memcmp(own[i].y, y, bytes * (size_t)rows) != 0;
    free(places);
    return off;
}

static int check(int level, int type, int64_t rows, struct shape s, int threads) {
    int64_t in = s.in, out = s.out, kept = in / s.m * s.n, stride = (in + 7) / 8,
            groups = s.core ? (in + s.columns - 1) / s.columns : 0;
    void *x = random_array(type, rows * in), *y = random_array(type, rows * out),
         *values = random_numbers(s.core, type, out * (s.core == INT4 ? (kept + 1) / 2 : kept)),
         *left = s.left ? random_numbers(s.core, type, out * s.left) : NULL,
         *right = s.right ? random_numbers(s.core, type, in * s.right) : NULL,
         *bias = rows % 3 != 2 ? random_array(type, out) : NULL, *dense = random_array(type, out * in),
         *core_scales = s.core ? random_array(type, out * groups) : NULL,
         *left_scales = s.core && left ? random_array(type, out) : NULL,
         *right_scales = s.core && right ? random_array(type, in) : NULL;
    uint8_t *mask = calloc((size_t)out, (size_t)stride);
    for (int64_t i = 0; i < out; i++)
        for (int64_t g = 0; g < in; g += s.m)
            for (int64_t left_to_keep = s.n; left_to_keep;) {
                int64_t c = g + rand() % s.m;
                if (mask[i * stride + c / 8] >> c % 8 & 1) continue;
                mask[i * stride + c / 8] |= (uint8_t)(1 << c % 8);
                left_to_keep--;
            }
    struct integers own = {s.core, left || right, core_scales, left_scales, right_scales, s.columns};
    struct part one = {values, mask, left, right, bias, y, s.core ? &own : NULL, out, kept, s.m, s.left, s.right, out};
    int off = 0;
    /* At last a mask that sets too many bits: it gives nonsense, but nothing is read beyond the values. */
    for (int is_broken = 0; is_broken < 2; is_broken++) {
        if (is_broken) memset(mask, 0xff, (size_t)(out * stride));
        armor_linears(level, type, x, rows, in, &one, 1, parallel, threads);
        if (!s.core) armor_unpack(level, type, values, mask, dense, out, in, kept, parallel, threads);
        if (threads > 1 && !is_broken) off = repeats(level, type, x, rows, in, one, y, threads);
    }
    void *all[] = {x, y, values, left, right, bias, dense, core_scales, left_scales, right_scales, mask};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) free(all[i]);
    if (off) printf("level %d type %d: %ld rows, %ld x %ld: other bits\n", level, type, (long)rows, (long)out, (long)in);
    return off;
}

/* With an argument only what runs in several threads: what one thread does cannot race. */
int main(int count, char **arguments) {
    static const struct shape SHAPES[] = {
        {60, 100, 2, 4, 20, 12, FLOATS, 0}, {36, 30, 1, 3, 5, 9, FLOATS, 0}, {100, 33, 50, 100, 11, 20, FLOATS, 0},
        {332, 7, 2, 4, 0, 0, FLOATS, 0},    {4, 1, 2, 4, 0, 4, FLOATS, 0},   {48, 70, 4, 8, 35, 0, FLOATS, 0},
        {100, 36, 2, 4, 4, 20, INT8, 32},   {1156, 7, 2, 4, 0, 0, INT4, 512}, {260, 66, 2, 4, 33, 0, FP8, 64},
        {20, 4, 2, 4, 4, 4, INT4, 20},
    };
    /* Enough work for threads, more rows than are multiplied at once, and an x that the L1 cache does not hold. */
    static const struct shape LARGE = {1024, 512, 2, 4, 64, 128, FLOATS, 0}, BOTH = {132, 140, 2, 4, 28, 12, FLOATS, 0},
                              SMALL = {20, 36, 2, 4, 4, 4, FLOATS, 0}, WIDE = {10284, 15, 2, 4, 0, 0, FLOATS, 0};
    static const int64_t ROWS[] = {1, 3, 37};
    int best = armor_initialize(), failures = 0;
    (void)arguments;
    for (int level = 0; level <= best && count == 1; level++)
        for (int type = 0; type < 2; type++) {
            for (size_t s = 0; s < sizeof SHAPES / sizeof *SHAPES; s++)
                for (size_t r = 0; r < sizeof ROWS / sizeof *ROWS; r++)
                    failures += check(level, type, ROWS[r], SHAPES[s], 1);
            failures += check(level, type, 3, WIDE, 1);
        }
    for (int type = 0; type < 2; type++) { /* by the best level: all share their tasks in the same way */
        failures += check(best, type, 1, LARGE, 3);
        failures += check(best, type, 300, BOTH, 4);
        failures += check(best, type, 772, SMALL, 3); /* as many waves as threads, and 4 rows more */
    }
    printf("%d of the linears are off, best level %d\n", failures, best);
    return failures != 0;
}
