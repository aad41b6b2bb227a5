/* The door of the library: choose the kernel, cut the layer into tasks, let the caller's OpenMP threads take them.
 *
 * Nothing here links to OpenMP. The library that called us (torch) brings its own, and its GOMP_parallel, which GNU's,
 * LLVM's and Intel's runtimes all have, is handed in: so both share one set of threads, and no second set spins beside
 * it. Every thread goes through the steps in order: pack, right, core, left. It takes tasks of a step until none is
 * left, then waits for what the next step needs. All that is waited for is being done by a thread that runs, so any
 * number of threads gets to the end, one included.
 */
#include <errno.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

#ifdef __x86_64__
#include <cpuid.h>
#endif

#include "layer.h"

typedef void (*parallel_function)(void (*)(void *), void *, unsigned threads, unsigned flags);

uint8_t armor_spread_index[256][8];

enum level { PORTABLE, AVX2, AVX512, AVX512_BF16, LEVELS };
enum type { F32, BF16 };

static const struct kernel *const KERNELS[LEVELS][2] = {
    [PORTABLE] = {&armor_portable_f32, &armor_portable_bf16},
#ifdef __x86_64__
    [AVX2] = {&armor_avx2_f32, &armor_avx2_bf16},
    [AVX512] = {&armor_avx512_f32, &armor_avx512_bf16},
    [AVX512_BF16] = {&armor_avx512_f32, &armor_avx512bf16_bf16},
#endif
};

/* Prepare the tables and return the best level of this processor. Call it once, before anything else. */
int armor_initialize(void) {
    for (int bits = 0; bits < 256; bits++)
        for (int column = 0, rank = 0; column < 8; column++)
            armor_spread_index[bits][column] = bits >> column & 1 ? rank++ : 128;
#ifdef __x86_64__
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2"))
        return PORTABLE;
    if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
        !__builtin_cpu_supports("avx512dq"))
        return AVX2;
    int bf16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
               __builtin_cpu_supports("avx512vbmi2");
    return bf16 ? AVX512_BF16 : AVX512;
#else
    return PORTABLE;
#endif
}

static struct cut cut_of(int64_t dimension, int64_t size) {
    struct cut cut = {.size = size, .count = dimension / size, .per_block = 1, .blocks = 1};
    if (size >= CHUNK) {
        cut.per_block = (size + CHUNK - 1) / CHUNK;
        cut.tasks = cut.count * cut.per_block;
    } else {
        cut.blocks = CHUNK / size;
        cut.tasks = (cut.count + cut.blocks - 1) / cut.blocks;
    }
    return cut;
}

/* A step's tasks in contiguous ranges, one for each thread, so that each reads memory in one go; a thread that is done
 * with its own range helps with the others. */
struct range {
    atomic_llong next;
    int64_t end;
    char apart[48]; /* a cache line each, so that threads do not pass one around */
};

struct step {
    void (*task)(struct layer *, int64_t task);
    int64_t tasks;
    atomic_llong finished;
    atomic_llong *finished_in_block; /* of the core, for `left`: by block, or by task if a task holds several */
    struct range *ranges;
};

enum { PACK, RIGHT, CORE, LEFT, STEPS };

struct work {
    struct layer *layer;
    struct step steps[STEPS];
    atomic_int workers;
    int threads;
};

static void wait_for(atomic_llong *counter, int64_t value) {
    int spins = 1000; /* a few microseconds; a thread that waits longer lets others run */
    while (atomic_load_explicit(counter, memory_order_acquire) < value)
        if (spins)
            spins--;
        else
            sched_yield();
}

static void finish(atomic_llong *counter) { atomic_fetch_add_explicit(counter, 1, memory_order_release); }

static void take_tasks(void *argument) {
    struct work *work = argument;
    struct layer *layer = work->layer;
    int self = atomic_fetch_add(&work->workers, 1);
    for (int s = PACK; s < STEPS; s++) {
        struct step *step = &work->steps[s];
        if (s == RIGHT || s == CORE) wait_for(&step[-1].finished, step[-1].tasks);
        for (int r = 0; r < work->threads && step->tasks; r++) {
            struct range *range = &step->ranges[(self + r) % work->threads];
            int64_t task;
            while ((task = atomic_fetch_add_explicit(&range->next, 1, memory_order_relaxed)) < range->end) {
                if (s == LEFT)
                    wait_for(&step[-1].finished_in_block[task / layer->left_cut.per_block], layer->left_cut.per_block);
                step->task(layer, task);
                if (s == CORE)
                    for (int64_t t = task; t < layer->core_cut.tasks; t += step->tasks)
                        finish(&step->finished_in_block[t / layer->core_cut.per_block]);
                finish(&step->finished);
            }
        }
    }
}

static void run(struct work *work, parallel_function parallel) {
    int64_t blocks = work->layer->core_cut.tasks / work->layer->core_cut.per_block;
    for (int64_t b = 0; b < blocks; b++) atomic_init(&work->steps[CORE].finished_in_block[b], 0);
    for (int s = PACK; s < STEPS; s++) {
        struct step *step = &work->steps[s];
        atomic_init(&step->finished, 0);
        for (int r = 0; r < work->threads; r++) {
            atomic_init(&step->ranges[r].next, step->tasks * r / work->threads);
            step->ranges[r].end = step->tasks * (r + 1) / work->threads;
        }
    }
    atomic_init(&work->workers, 0);
    if (parallel && work->threads > 1)
        parallel(take_tasks, work, work->threads, 0);
    else
        take_tasks(work);
}

static const struct kernel *kernel_for(int level, int type, int64_t right_size) {
    const struct kernel *kernel = KERNELS[level][type];
    /* A block of an odd size would end in the middle of a pair of columns. */
    return kernel->unit == 2 && right_size % 2 ? KERNELS[level - 1][type] : kernel;
}

/* y (rows, out) = left (core (right x)) + bias, all of `type`; 0, or an errno.
 * values (out, kept), mask (out, ceil(in / 8)), left (out / left_size, left_size, left_size) or null, right likewise,
 * bias (out) or null. `group`: in every `group` consecutive columns of a row the core keeps kept * group / in.
 * `integers` says which of values, left and right are not of `type`; null: none. Its group is a multiple of 32, and one
 * of 512 if it is larger; int4 values are for cores that keep half of every 8 columns. */
int armor_multiply(int level, int type, const void *x, const void *values, const void *mask, const void *left,
                 const void *right, const void *bias, void *y, int64_t rows, int64_t in, int64_t out, int64_t kept,
                 int64_t group, int64_t left_size, int64_t right_size, const struct integers *integers,
                 parallel_function parallel, int threads) {
    const struct kernel *kernel = kernel_for(level, type, right ? right_size : 0);
    int64_t wave = rows < WAVE ? rows : WAVE, step = kernel->lanes * kernel->unit;
    int dot = wave <= kernel->dot_rows;
    struct layer layer = {
        .values = values,
        .left = left,
        .right = right,
        .bias = bias,
        .mask = mask,
        .in = in,
        .out = out,
        .kept = kept,
        .mask_stride = (in + 7) / 8,
        .half = kept * 2 == in && step % group == 0,
        .two_of_four = kept * 2 == in && group == 4,
        .stride = kept,
        .integers.group = in,
    };
    if (integers) layer.integers = *integers;
    if (layer.integers.core == INT4) layer.stride = (kept + 1) / 2 * 2;
    layer.left_cut = layer.core_cut = cut_of(out, left ? left_size : out);
    layer.right_cut = cut_of(in, right ? right_size : in);

    int64_t panels = (wave + kernel->lanes - 1) / kernel->lanes, lane_bytes = panels * kernel->lanes * 4;
    int64_t block_units = (layer.left_cut.size + kernel->unit - 1) / kernel->unit;
    size_t u_bytes = dot ? wave * in * kernel->element : (in + kernel->unit - 1) / kernel->unit * lane_bytes;
    size_t z_bytes = !left ? 0 : dot ? wave * out * kernel->element : layer.left_cut.count * block_units * lane_bytes;
    /* Without `right`, u is x itself where the types agree, or the panels of x. */
    int convert = dot && !right && kernel->element != kernel->weight;
    size_t panel_bytes = !dot && right ? u_bytes : 0, counter_bytes = layer.core_cut.tasks * sizeof(atomic_llong);
    if (dot && !right && !convert) u_bytes = 0;

    /* Starting the threads costs as much as this many multiply-adds. */
    if ((kept * out + left_size * out + right_size * in) * rows < 1 << 18) threads = 1;
    size_t range_bytes = STEPS * threads * sizeof(struct range);
    size_t sizes[] = {counter_bytes, range_bytes, u_bytes, z_bytes, panel_bytes}, offsets[5], total = 0;
    for (int i = 0; i < 5; i++) {
        offsets[i] = total;
        total += (sizes[i] + 63) / 64 * 64;
    }
    char *scratch = aligned_alloc(64, total);
    if (!scratch) return ENOMEM;
    layer.z = scratch + offsets[3];

    struct work work = {.layer = &layer, .threads = threads};
    for (int s = PACK; s < STEPS; s++) work.steps[s].ranges = (struct range *)(scratch + offsets[1]) + s * threads;
    work.steps[CORE].finished_in_block = (atomic_llong *)scratch;
    work.steps[PACK].task = dot ? kernel->convert : kernel->pack;
    work.steps[RIGHT].task = dot ? kernel->right_dot : kernel->right_panel;
    work.steps[CORE].task = dot ? kernel->core_dot : kernel->core_panel;
    work.steps[LEFT].task = dot ? kernel->left_dot : kernel->left_panel;
    work.steps[RIGHT].tasks = right ? layer.right_cut.tasks : 0;
    work.steps[CORE].tasks = dot ? (layer.core_cut.tasks + 1) / 2 : layer.core_cut.tasks; /* dot: two spans each */
    work.steps[LEFT].tasks = left ? layer.left_cut.tasks : 0;

    for (int64_t start = 0; start < rows; start += wave) {
        layer.rows = rows - start < wave ? rows - start : wave;
        layer.x = (const char *)x + start * in * kernel->weight;
        layer.y = (char *)y + start * out * kernel->weight;
        layer.panel_count = (layer.rows + kernel->lanes - 1) / kernel->lanes;
        layer.u = dot && !right && !convert ? (void *)layer.x : scratch + offsets[2];
        layer.panels = right ? scratch + offsets[4] : layer.u;
        work.steps[PACK].tasks = dot ? convert : layer.panel_count * ((in + PACK_COLUMNS - 1) / PACK_COLUMNS);
        run(&work, parallel);
    }
    free(scratch);
    return 0;
}

struct unpacking {
    const struct kernel *kernel;
    const char *values, *mask;
    char *dense;
    int64_t rows, in, kept;
    atomic_llong next;
};

static void take_rows(void *argument) {
    struct unpacking *work = argument;
    int64_t row, stride = (work->in + 7) / 8, weight = work->kernel->weight;
    while ((row = atomic_fetch_add(&work->next, CHUNK)) < work->rows)
        work->kernel->unpack(work->values + row * work->kept * weight, (const uint8_t *)work->mask + row * stride,
                             work->rows - row < CHUNK ? work->rows - row : CHUNK, work->in, work->kept, stride,
                             work->dense + row * work->in * weight);
}

/* dense (rows, in) = the rows of a core that `values` (rows, kept) and `mask` (rows, ceil(in / 8)) hold. */
void armor_unpack(int level, int type, const void *values, const void *mask, void *dense, int64_t rows, int64_t in,
                  int64_t kept, parallel_function parallel, int threads) {
    struct unpacking work = {KERNELS[level][type], values, mask, dense, rows, in, kept, 0};
    if (parallel && threads > 1)
        parallel(take_rows, &work, threads, 0);
    else
        take_rows(&work);
}

/* Whether the processor multiplies bf16 tiles (AMX), which torch's matrix products use and these loops do not. */
int armor_has_tiles(void) {
#ifdef __x86_64__
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & 1;
#else
    return 0;
#endif
}
