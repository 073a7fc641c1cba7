/* Loops that torch has not, for processors with AVX-512 and bfloat16; see native.py.
 *
 * Training in bfloat16 is bound by memory: here batch norm and SiLU are one pass there and one back,
 * and AdamW reads gradients and writes weights in bfloat16 as it goes. Nearest places are found
 * without the table of distances being written, and frozen networks run image after image.
 *
 * Maps are rows of channels, (rows, width), width a multiple of 32; threads are OpenMP's, which are
 * torch's: nothing is linked here, the names are found in the process that loads this.
 */

#define _GNU_SOURCE
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint16_t bf16;

/* Of the functions' arguments: native.py does without a library of another one. */
int version(void) { return 3; }

enum { LANES = 16, LINE = 32 /* bfloat16 numbers of a cache line */, BLOCK = 128 /* rows */ };

#define INLINE static inline __attribute__((always_inline))

static inline __m512 load(const bf16 *from) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline void store(bf16 *to, __m512 values) {
    __m256bh low = _mm512_cvtneps_pbh(values);
    memcpy(to, &low, sizeof low);
}

#define LOG2_E 1.44269504f

/* 1 / (1 + 2^power) to 2e-4 of it, a tenth of what bfloat16 resolves: 2^power = 2^n 2^r, and 2^r a
 * polynomial of third degree. */
static inline __m512 over_one_and_power(__m512 power) {
    __m512 n = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_sub_ps(power, n);
    __m512 two_r = _mm512_fmadd_ps(r, _mm512_set1_ps(0.0558f), _mm512_set1_ps(0.2402265f));
    two_r = _mm512_fmadd_ps(two_r, r, _mm512_set1_ps(0.6931472f));
    two_r = _mm512_fmadd_ps(two_r, r, _mm512_set1_ps(1.0f));
    return _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_scalef_ps(two_r, n)));
}

static inline __m512 sigmoid(__m512 x) {
    return over_one_and_power(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)));
}

/* Adds what two times two vectors say of 32 channels to two rows of sums. */
static void add_lines(const __m512 *upper, const __m512 *lower, double *sums, long width) {
    float told[4][LANES];
    for (int i = 0; i < 2; i++) {
        _mm512_storeu_ps(told[i], upper[i]);
        _mm512_storeu_ps(told[2 + i], lower[i]);
    }
    for (int k = 0; k < LINE; k++) {
        sums[k] += told[k / LANES][k % LANES];
        sums[width + k] += told[2 + k / LANES][k % LANES];
    }
}

/* Sums and sums of squares of the channels of rows first to last, to sums (2, width). From the last
 * row to the first: the last were written last and are still in the cache. */
static void channel_sums(const bf16 *x, long first, long last, long width, double *sums) {
    for (long stop = last; stop > first; stop -= BLOCK) {
        long start = stop - BLOCK > first ? stop - BLOCK : first;
        for (long c = 0; c < width; c += LINE) {
            __m512 total[2], square[2];
            for (int i = 0; i < 2; i++) total[i] = square[i] = _mm512_setzero_ps();
            for (long row = start; row < stop; row++)
                for (int i = 0; i < 2; i++) {
                    __m512 v = load(x + row * width + c + i * LANES);
                    total[i] = _mm512_add_ps(total[i], v);
                    square[i] = _mm512_fmadd_ps(v, v, square[i]);
                }
            add_lines(total, square, sums + c, width);
        }
    }
}

/* u sigmoid(u) of u = scale x + shift. */
static void silu(const bf16 *x, long first, long last, long width, const float *scale,
                 const float *shift, bf16 *out) {
    for (long row = first; row < last; row++)
        for (long c = 0; c < width; c += LANES) {
            long at = row * width + c;
            __m512 u = _mm512_fmadd_ps(load(x + at), _mm512_loadu_ps(scale + c),
                                       _mm512_loadu_ps(shift + c));
            store(out + at, _mm512_mul_ps(u, sigmoid(u)));
        }
}

/* d = g s (1 + u (1 - s)), the gradient of u, to out; its sums and those of d x to sums (2, width). */
static void silu_gradient(const bf16 *x, const bf16 *above, long first, long last, long width,
                          const float *scale, const float *shift, bf16 *out, double *sums) {
    const __m512 one = _mm512_set1_ps(1.0f);
    for (long stop = last; stop > first; stop -= BLOCK) {
        long start = stop - BLOCK > first ? stop - BLOCK : first;
        for (long c = 0; c < width; c += LINE) {
            __m512 total[2], product[2], a[2], b[2];
            for (int i = 0; i < 2; i++) {
                total[i] = product[i] = _mm512_setzero_ps();
                a[i] = _mm512_loadu_ps(scale + c + i * LANES);
                b[i] = _mm512_loadu_ps(shift + c + i * LANES);
            }
            for (long row = start; row < stop; row++)
                for (int i = 0; i < 2; i++) {
                    long at = row * width + c + i * LANES;
                    __m512 v = load(x + at), u = _mm512_fmadd_ps(v, a[i], b[i]), s = sigmoid(u);
                    __m512 slope = _mm512_fmadd_ps(u, _mm512_sub_ps(one, s), one);
                    __m512 d = _mm512_mul_ps(load(above + at), _mm512_mul_ps(s, slope));
                    total[i] = _mm512_add_ps(total[i], d);
                    product[i] = _mm512_fmadd_ps(d, v, product[i]);
                    store(out + at, d);
                }
            add_lines(total, product, sums + c, width);
        }
    }
}

/* out = scale out + slope x + offset. */
static void affine(const bf16 *x, long first, long last, long width, const float *scale,
                   const float *slope, const float *offset, bf16 *out) {
    for (long row = first; row < last; row++)
        for (long c = 0; c < width; c += LANES) {
            long at = row * width + c;
            __m512 v = _mm512_fmadd_ps(load(x + at), _mm512_loadu_ps(slope + c),
                                       _mm512_loadu_ps(offset + c));
            store(out + at, _mm512_fmadd_ps(load(out + at), _mm512_loadu_ps(scale + c), v));
        }
}

/* The sums of all threads in those of the first. */
static void add_up(double *sums, long width, int threads) {
    for (int t = 1; t < threads; t++)
        for (long k = 0; k < 2 * width; k++) sums[k] += sums[t * 2 * width + k];
}

/* SiLU of the batch norm of maps x, to out. The running mean and variance follow those of the batch;
 * told (6, width) is what the gradient needs: mean, 1 / deviation, scale and shift of u, and room.
 * work: room for threads (2, width) doubles. */
void norm_silu(const bf16 *x, long rows, long width, const float *weight, const float *bias,
               float *running_mean, float *running_var, double momentum, double epsilon, bf16 *out,
               float *told, double *work, int threads) {
    memset(work, 0, sizeof(double) * 2 * width * threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++)
        channel_sums(x, rows * t / threads, rows * (t + 1) / threads, width, work + t * 2 * width);
    add_up(work, width, threads);
    float *mean = told, *root = told + width, *scale = told + 2 * width, *shift = told + 3 * width;
    for (long c = 0; c < width; c++) {
        double m = work[c] / rows, v = work[width + c] / rows - m * m;
        v = v > 0 ? v : 0;
        double r = 1 / sqrt(v + epsilon);
        mean[c] = m;
        root[c] = r;
        scale[c] = weight[c] * r;
        shift[c] = bias[c] - m * weight[c] * r;
        running_mean[c] += momentum * (m - running_mean[c]);
        running_var[c] += momentum * (v * rows / (rows > 1 ? rows - 1 : 1) - running_var[c]);
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++)
        silu(x, rows * t / threads, rows * (t + 1) / threads, width, scale, shift, out);
}

/* The gradient of the maps, to below; of weight and bias, to both (2, width). */
void norm_silu_gradient(const bf16 *x, const bf16 *above, long rows, long width, float *told,
                        bf16 *below, float *both, double *work, int threads) {
    const float *mean = told, *root = told + width, *scale = told + 2 * width;
    const float *shift = told + 3 * width;
    float *slope = told + 4 * width, *offset = told + 5 * width;
    memset(work, 0, sizeof(double) * 2 * width * threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++)
        silu_gradient(x, above, rows * t / threads, rows * (t + 1) / threads, width, scale, shift,
                      below, work + t * 2 * width);
    add_up(work, width, threads);
    for (long c = 0; c < width; c++) {
        both[c] = (work[width + c] - mean[c] * work[c]) * root[c];
        both[width + c] = work[c];
        double down = -(double)scale[c] * root[c] * both[c] / rows;
        slope[c] = down;
        offset[c] = -(double)scale[c] * both[width + c] / rows - down * mean[c];
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++)
        affine(x, rows * t / threads, rows * (t + 1) / threads, width, scale, slope, offset, below);
}

/* A step of AdamW (Loshchilov & Hutter 2019, alg. 2) on numbers first to last, a multiple of 16 but
 * for the end. */
static void adamw_some(float *weight, float *mean, float *square, bf16 *low, const bf16 *gradient,
                       long first, long last, const float *factors) {
    const __m512 clip = _mm512_set1_ps(factors[0]), decay = _mm512_set1_ps(factors[1]);
    const __m512 beta2 = _mm512_set1_ps(factors[3]), rate = _mm512_set1_ps(factors[4]);
    const __m512 new1 = _mm512_set1_ps(1 - factors[2]), new2 = _mm512_set1_ps(1 - factors[3]);
    const __m512 root = _mm512_set1_ps(factors[5]), epsilon = _mm512_set1_ps(factors[6]);
    for (long at = first; at < last; at += LANES) {
        __mmask16 some = last - at >= LANES ? 0xFFFF : (__mmask16)((1u << (last - at)) - 1);
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, gradient + at));
        __m512 g = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)), clip);
        __m512 m = _mm512_maskz_loadu_ps(some, mean + at);
        __m512 v = _mm512_maskz_loadu_ps(some, square + at);
        m = _mm512_fmadd_ps(_mm512_sub_ps(g, m), new1, m);
        v = _mm512_fmadd_ps(v, beta2, _mm512_mul_ps(_mm512_mul_ps(g, g), new2));
        __m512 size = _mm512_fmadd_ps(_mm512_sqrt_ps(v), root, epsilon);
        __m512 w = _mm512_mul_ps(_mm512_maskz_loadu_ps(some, weight + at), decay);
        w = _mm512_sub_ps(w, _mm512_div_ps(_mm512_mul_ps(rate, m), size));
        _mm512_mask_storeu_ps(mean + at, some, m);
        _mm512_mask_storeu_ps(square + at, some, v);
        _mm512_mask_storeu_ps(weight + at, some, w);
        __m256bh down = _mm512_cvtneps_pbh(w);
        __m256i bits;
        memcpy(&bits, &down, sizeof bits);
        _mm256_mask_storeu_epi16(low + at, some, bits);
    }
}

/* A step of how_many weights of counts numbers each. moved (how_many, 4): the weight, its two moments,
 * and the weight in bfloat16. factors: what the gradients are multiplied by, what decay leaves of the
 * weight, beta1, beta2, the rate over 1 - beta1^t, 1 / sqrt(1 - beta2^t), epsilon. */
void adamw(void *const *moved, const bf16 *const *gradients, const long *counts, int how_many,
           const float *factors, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++)
        for (int i = 0; i < how_many; i++) {
            long vectors = (counts[i] + LANES - 1) / LANES, last = vectors * (t + 1) / threads * LANES;
            adamw_some(moved[4 * i], moved[4 * i + 1], moved[4 * i + 2], moved[4 * i + 3],
                       gradients[i], vectors * t / threads * LANES,
                       last < counts[i] ? last : counts[i], factors);
        }
}

static double square_sum_of(const bf16 *gradient, long count) {
    double out = 0;
    long at = 0;
    while (count - at >= 4 * LANES) {
        __m512 sums[4];
        for (int i = 0; i < 4; i++) sums[i] = _mm512_setzero_ps();
        long stop = count - at > 8192 ? at + 8192 : at + (count - at) / (4 * LANES) * (4 * LANES);
        for (; at < stop; at += 4 * LANES)
            for (int i = 0; i < 4; i++) {
                __m512 g = load(gradient + at + i * LANES);
                sums[i] = _mm512_fmadd_ps(g, g, sums[i]);
            }
        for (int i = 0; i < 4; i++) out += _mm512_reduce_add_ps(sums[i]);
    }
    for (; at < count; at++) {
        uint32_t bits = (uint32_t)gradient[at] << 16;
        float g;
        memcpy(&g, &bits, sizeof g);
        out += (double)g * g;
    }
    return out;
}

/* The sum of the squares of all numbers of how_many gradients. */
double square_sum(const bf16 *const *gradients, const long *counts, int how_many) {
    double out = 0;
    for (int i = 0; i < how_many; i++) out += square_sum_of(gradients[i], counts[i]);
    return out;
}

/* What of maps (images, high, wide, width) lies beneath a kernel (size, size), place by place, to out
 * (images, down, across, size, size, width); beyond the maps are `padding` zeros. */
void windows(const bf16 *maps, long images, long high, long wide, long width, long size, long stride,
             long padding, long down, long across, bf16 *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < images; n++) {
        bf16 *to = out + n * down * across * size * size * width;
        for (long y = 0; y < down; y++)
            for (long x = 0; x < across; x++)
                for (long k = 0; k < size; k++, to += size * width) {
                    long row = y * stride - padding + k, first = x * stride - padding, last = first + size;
                    long from = first < 0 ? 0 : first, end = last > wide ? wide : last;
                    if (row < 0 || row >= high || from >= end) {
                        memset(to, 0, size * width * sizeof(bf16));
                        continue;
                    }
                    memset(to, 0, (from - first) * width * sizeof(bf16));
                    memcpy(to + (from - first) * width, maps + ((n * high + row) * wide + from) * width,
                           (end - from) * width * sizeof(bf16));
                    memset(to + (end - first) * width, 0, (last - end) * width * sizeof(bf16));
                }
    }
}

/* Whether the system lets this process use AMX's tiles. */
int may_use_tiles(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

struct tiles {
    uint8_t palette, start, zeros[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

/* What was written is in memory, and what is read is read anew: compilers do not know all that the
 * instructions for tiles touch. */
#define IN_MEMORY __asm__ volatile("" ::: "memory")

/* Eight tiles of 16 rows of 64 bytes; returns how they were set before. */
static struct tiles take_tiles(void) {
    struct tiles ours = {.palette = 1}, theirs;
    for (int i = 0; i < 8; i++) ours.bytes[i] = 64, ours.rows[i] = 16;
    IN_MEMORY;
    _tile_storeconfig(&theirs);
    _tile_loadconfig(&ours);
    IN_MEMORY;
    return theirs;
}

static void give_tiles_back(struct tiles theirs) {
    if (theirs.palette)
        _tile_loadconfig(&theirs);
    else
        _tile_release();
}

/* Queries (dims, count) as AMX takes them, 16 at a time, (count / 16, 16, 16, 2), of 32 columns each, and
 * |q|^2 of each, (count). Of every dimension the columns are q and what bfloat16 leaves over of it; then
 * come three ones, and once more the last dimensions, as many as there is room for. */
static void pack_queries(const float *queries, long dims, long count, bf16 *packed, float *squares) {
    long first = dims - (LINE - 3 - 2 * dims); /* of those that come once more */
    const __m512i one = _mm512_set1_epi32(0x3F80);
    for (long at = 0; at < count; at += LANES, packed += LINE * LANES) {
        __m512i columns[LINE];
        __m512 square = _mm512_setzero_ps();
        for (long d = 0; d < dims; d++) {
            __m512 q = _mm512_loadu_ps(queries + d * count + at), parts[2];
            for (int k = 0; k < 2; k++) {
                __m256bh low = _mm512_cvtneps_pbh(k ? _mm512_sub_ps(q, parts[0]) : q);
                __m256i bits;
                memcpy(&bits, &low, sizeof bits);
                columns[2 * d + k] = _mm512_cvtepu16_epi32(bits);
                parts[k] = _mm512_castsi512_ps(_mm512_slli_epi32(columns[2 * d + k], 16));
            }
            __m512 both = _mm512_add_ps(parts[0], parts[1]);
            square = _mm512_fmadd_ps(both, both, square);
        }
        for (long k = 0; k < LINE - 2 * dims; k++)
            columns[2 * dims + k] = k < 3 ? one : columns[2 * (first + k - 3)];
        for (int r = 0; r < LANES; r++) {
            __m512i second = _mm512_slli_epi32(columns[2 * r + 1], 16);
            _mm512_storeu_si512(packed + r * LINE, _mm512_or_si512(columns[2 * r], second));
        }
        _mm512_storeu_ps(squares + at, square);
    }
}

/* The least of each column of a tile's sums, and of what was least before. */
static inline __m512 least_of(float (*sums)[LANES], __m512 before) {
    __m512 even = _mm512_load_ps(sums[0]), odd = _mm512_load_ps(sums[1]);
    for (int i = 2; i < LANES; i += 2) {
        even = _mm512_min_ps(even, _mm512_load_ps(sums[i]));
        odd = _mm512_min_ps(odd, _mm512_load_ps(sums[i + 1]));
    }
    return _mm512_min_ps(before, _mm512_min_ps(even, odd));
}

/* The least product of each of the packed queries with one of the places of how_many of the banks
 * (., places, 32), to least. Tiles 4 and 5 hold two times 16 queries, 6 and 7 two times 16 places, 0 to 3
 * their products: while two are computed the other two are written, and those before them looked
 * through. count and places are multiples of 32. */
static void least_of_banks(const bf16 *queries, long count, const bf16 *banks, const int64_t *alike,
                           int how_many, long places, float *least) {
    enum { ROWS = 16, PIECE = 512 };
    float sums[4][ROWS][ROWS] __attribute__((aligned(64)));
    for (long q = 0; q < count; q += 2 * ROWS) {
        __m512 one = _mm512_set1_ps(INFINITY), two = one;
        for (int k = 0; k < 4 * ROWS; k++) _mm512_store_ps(sums[k / ROWS][k % ROWS], one);
        IN_MEMORY;
        _tile_loadd(2, sums[2], 64);
        _tile_loadd(3, sums[3], 64);
        _tile_loadd(4, queries + q * LINE, 64);
        _tile_loadd(5, queries + q * LINE + PIECE, 64);
        for (int b = 0; b < how_many; b++) {
            const bf16 *bank = banks + alike[b] * places * LINE;
            for (long p = 0; p < places; p += 2 * ROWS, bank += 2 * PIECE) {
#define PRODUCTS(tile, places_of, queries_of, other, found)  \
    _tile_zero(tile);                                        \
    _tile_dpbf16ps(tile, places_of, queries_of);             \
    _tile_stored(other, sums[other], 64);                    \
    found = least_of(sums[tile], found);
                _tile_loadd(6, bank, 64);
                PRODUCTS(0, 6, 4, 2, one)
                PRODUCTS(1, 6, 5, 3, two)
                _tile_loadd(7, bank + PIECE, 64);
                PRODUCTS(2, 7, 4, 0, one)
                PRODUCTS(3, 7, 5, 1, two)
            }
        }
        _tile_stored(2, sums[2], 64);
        _tile_stored(3, sums[3], 64);
        for (int k = 0; k < 4; k += 2) {
            one = least_of(sums[k], one);
            two = least_of(sums[k + 1], two);
        }
        _mm512_storeu_ps(least + q, one);
        _mm512_storeu_ps(least + q + ROWS, two);
    }
}

/* The squared distance of each of the queries (images, dims, count) to the nearest place of how_many of
 * the banks (., places, 32), which `alike` (images, how_many) names, to out (images, count): |q|^2 and the
 * least product of columns. See native.packed_places. */
void least_distances(const float *queries, long images, long dims, long count, const bf16 *banks,
                     const int64_t *alike, int how_many, long places, float *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < images; n++) {
        struct tiles theirs = take_tiles();
        bf16 *packed = aligned_alloc(64, count * LINE * sizeof(bf16));
        float *squares = aligned_alloc(64, count * sizeof(float)), *least = out + n * count;
        pack_queries(queries + n * dims * count, dims, count, packed, squares);
        IN_MEMORY;
        least_of_banks(packed, count, banks, alike + n * how_many, how_many, places, least);
        for (long q = 0; q < count; q++) least[q] += squares[q];
        free(packed);
        free(squares);
        give_tiles_back(theirs);
    }
}

enum { MIXED = 64 /* channels of local vectors */ };

/* Products of rows (count, width) with weights (width, 64), to out (count, 64), or added to it. The weights
 * lie as (width / 32, 4, 2, 16, 16, 2): for 32 columns and 16 of the 64 the bfloat16 nearest and what that
 * leaves over. count is a multiple of 16, width of 32. */
static void mix(const bf16 *rows, long count, long width, const bf16 *weights, float *out, int add) {
    enum { ROWS = 16, PIECE = 512 /* numbers of a tile */ };
    const long stride = MIXED * sizeof(float);
    for (long row = 0; row < count; row += ROWS, rows += ROWS * width, out += ROWS * MIXED) {
#define BEGIN(tile)                                     \
    if (add)                                            \
        _tile_loadd(tile, out + tile * LANES, stride);  \
    else                                                \
        _tile_zero(tile);
        BEGIN(0)
        BEGIN(1)
        BEGIN(2)
        BEGIN(3)
        for (long k = 0; k < width / LINE; k++) {
            const bf16 *weight = weights + k * 8 * PIECE;
            _tile_loadd(4, rows + k * LINE, width * sizeof(bf16));
#define MIX(tile)                                            \
    _tile_loadd(5, weight + tile * 2 * PIECE, 64);           \
    _tile_loadd(6, weight + (tile * 2 + 1) * PIECE, 64);     \
    _tile_dpbf16ps(tile, 4, 5);                              \
    _tile_dpbf16ps(tile, 4, 6);
            MIX(0)
            MIX(1)
            MIX(2)
            MIX(3)
        }
        _tile_stored(0, out, stride);
        _tile_stored(1, out + LANES, stride);
        _tile_stored(2, out + 2 * LANES, stride);
        _tile_stored(3, out + 3 * LANES, stride);
    }
}

/* Means of maps (side, side, width) over squares, (grid, grid, width): grid divides the side. */
static void pool(const bf16 *maps, long side, long width, long grid, bf16 *out) {
    const long ratio = side / grid;
    const __m512 share = _mm512_set1_ps(1.0f / (ratio * ratio));
    for (long y = 0; y < grid; y++)
        for (long x = 0; x < grid; x++)
            for (long c = 0; c < width; c += LANES) {
                const bf16 *from = maps + (y * ratio * side + x * ratio) * width + c;
                __m512 sum = _mm512_setzero_ps();
                for (long j = 0; j < ratio; j++)
                    for (long i = 0; i < ratio; i++)
                        sum = _mm512_add_ps(sum, load(from + (j * side + i) * width));
                store(out + (y * grid + x) * width + c, _mm512_mul_ps(sum, share));
            }
}

/* Between which two of `side` places the i-th of `grid` lies, and how far from the first (bilinear,
 * corners not aligned). */
static float between(long i, long side, long grid, long *first, long *second) {
    float at = (i + 0.5f) * side / grid - 0.5f;
    at = at > 0 ? at : 0;
    *first = (long)at;
    *second = *first + 1 < side ? *first + 1 : *first;
    return at - *first;
}

/* Vectors (side, side, 64) at grid x grid places, added to out; row: room for side vectors. */
static void add_wide(const float *vectors, long side, long grid, float *row, float *out) {
    for (long y = 0; y < grid; y++) {
        long first, second, line = side * MIXED;
        __m512 share = _mm512_set1_ps(between(y, side, grid, &first, &second));
        for (long i = 0; i < line; i += LANES) {
            __m512 above = _mm512_loadu_ps(vectors + first * line + i);
            __m512 below = _mm512_loadu_ps(vectors + second * line + i);
            _mm512_storeu_ps(row + i, _mm512_fmadd_ps(_mm512_sub_ps(below, above), share, above));
        }
        for (long x = 0; x < grid; x++, out += MIXED) {
            share = _mm512_set1_ps(between(x, side, grid, &first, &second));
            for (long c = 0; c < MIXED; c += LANES) {
                __m512 left = _mm512_loadu_ps(row + first * MIXED + c);
                __m512 right = _mm512_loadu_ps(row + second * MIXED + c);
                __m512 wide = _mm512_fmadd_ps(_mm512_sub_ps(right, left), share, left);
                _mm512_storeu_ps(out + c, _mm512_add_ps(_mm512_loadu_ps(out + c), wide));
            }
        }
    }
}

/* Maps of one image after the other mixed at grid x grid places, their sum to out (images, grid^2, 64).
 * Of each of `count` maps (images, side, side, width): weights as above; finer ones are averaged first,
 * coarser ones enlarged at last. The squares of sides and grid are multiples of 16. */
void local_vectors(const bf16 *const *maps, const bf16 *const *weights, const long *sides,
                   const long *widths, int count, long images, long grid, float *out, int threads) {
    long widest = 0;
    for (int k = 0; k < count; k++) widest = widths[k] > widest ? widths[k] : widest;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < images; n++) {
        struct tiles theirs = take_tiles();
        bf16 *pooled = malloc(grid * grid * widest * sizeof(bf16));
        float *coarse = malloc((grid + 1) * grid * MIXED * sizeof(float)), *to = out + n * grid * grid * MIXED;
        for (int k = 0; k < count; k++) {
            long side = sides[k], width = widths[k];
            const bf16 *own = maps[k] + n * side * side * width;
            if (side >= grid) {
                if (side > grid) pool(own, side, width, grid, pooled);
                IN_MEMORY;
                mix(side > grid ? pooled : own, grid * grid, width, weights[k], to, k > 0);
                continue;
            }
            mix(own, side * side, width, weights[k], coarse, 0);
            IN_MEMORY;
            add_wide(coarse, side, grid, coarse + grid * grid * MIXED, to);
        }
        free(pooled);
        free(coarse);
        give_tiles_back(theirs);
    }
}

/* The three colours of up to 16 pixels. */
static inline void load_colours(const float *pixels, long count, __m512 *colours) {
    enum { OTHER = 16 };
    static const int first[3][LANES] = {{0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30},
                                        {1, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31},
                                        {2, 5, 8, 11, 14, 17, 20, 23, 26, 29}};
    static const int then[3][LANES] = {
        {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, OTHER + 1, OTHER + 4, OTHER + 7, OTHER + 10, OTHER + 13},
        {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, OTHER + 2, OTHER + 5, OTHER + 8, OTHER + 11, OTHER + 14},
        {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, OTHER, OTHER + 3, OTHER + 6, OTHER + 9, OTHER + 12, OTHER + 15}};
    uint64_t some = count < LANES ? (1ull << 3 * count) - 1 : ~0ull;
    __m512 parts[3];
    for (int k = 0; k < 3; k++)
        parts[k] = _mm512_maskz_loadu_ps((__mmask16)(some >> k * LANES), pixels + k * LANES);
    for (int c = 0; c < 3; c++) {
        __m512 two = _mm512_permutex2var_ps(parts[0], _mm512_loadu_si512(first[c]), parts[1]);
        colours[c] = _mm512_permutex2var_ps(two, _mm512_loadu_si512(then[c]), parts[2]);
    }
}

/* Luma, red - green, yellow - blue, of colours. */
static inline void oppose(__m512 *colours) {
    __m512 red = colours[0], green = colours[1], blue = colours[2], both = _mm512_add_ps(red, green);
    colours[0] = _mm512_mul_ps(_mm512_add_ps(both, blue), _mm512_set1_ps(1.0f / 3));
    colours[1] = _mm512_sub_ps(red, green);
    colours[2] = _mm512_fmsub_ps(both, _mm512_set1_ps(0.5f), blue);
}

/* Gaussian blurs of planes of floats, (rows, stride), the stride the side filled up to a multiple of
 * 16.
 * A kernel of 2 radius + 1 weights; what lies beyond an edge is mirrored at it. */
static inline long mirrored(long i, long side) {
    i = i < 0 ? -i : i;
    return i < side ? i : 2 * (side - 1) - i;
}

/* n vectors of the sum of weighted rows. */
INLINE void weigh_some(const float *const *rows, const float *weights, long count, long x, float *out,
                       const int n) {
    __m512 sums[8];
    for (int i = 0; i < n; i++) sums[i] = _mm512_setzero_ps();
    for (long k = 0; k < count; k++) {
        __m512 weight = _mm512_set1_ps(weights[k]);
        for (int i = 0; i < n; i++)
            sums[i] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(rows[k] + x + i * LANES), sums[i]);
    }
    for (int i = 0; i < n; i++) _mm512_storeu_ps(out + x + i * LANES, sums[i]);
}

static void weigh(const float *const *rows, const float *weights, long count, long stride, float *out) {
    long x = 0;
    for (; x + 8 * LANES <= stride; x += 8 * LANES) weigh_some(rows, weights, count, x, out, 8);
    for (; x + 4 * LANES <= stride; x += 4 * LANES) weigh_some(rows, weights, count, x, out, 4);
    for (; x < stride; x += LANES) weigh_some(rows, weights, count, x, out, 1);
}

/* A row of the plane's blur downwards. */
static void blur_down(const float *plane, long y, long side, long stride, const float *kernel,
                      long radius, float *row) {
    const float *rows[2 * radius + 1];
    for (long k = -radius; k <= radius; k++) rows[k + radius] = plane + mirrored(y + k, side) * stride;
    weigh(rows, kernel, 2 * radius + 1, stride, row);
}

/* A row with `radius` mirrored values before and behind it. */
static void widen(const float *row, long side, long radius, float *wide) {
    memcpy(wide + radius, row, side * sizeof(float));
    for (long k = 1; k <= radius; k++) {
        wide[radius - k] = row[mirrored(-k, side)];
        wide[radius + side - 1 + k] = row[mirrored(side - 1 + k, side)];
    }
}

/* A row's blur, in place; wide has room for a row and what is beside it. */
static void blur_across(float *row, long side, long stride, const float *kernel, long radius,
                        float *wide) {
    const float *rows[2 * radius + 1];
    widen(row, side, radius, wide);
    for (long k = 0; k <= 2 * radius; k++) rows[k] = wide + k;
    weigh(rows, kernel, 2 * radius + 1, stride, row);
}

/* The blur of a whole plane. */
static void blur(const float *plane, long side, long stride, const float *kernel, long radius,
                 float *out, float *wide) {
    for (long y = 0; y < side; y++) {
        blur_down(plane, y, side, stride, kernel, radius, out + y * stride);
        blur_across(out + y * stride, side, stride, kernel, radius, wide);
    }
}

/* The blur of a plane at the places at (grid) of both sides only. */
static void blur_at(const float *plane, long side, long stride, const float *kernel, long radius,
                    const long *at, long grid, float *out, float *row, float *wide) {
    for (long j = 0; j < grid; j++) {
        blur_down(plane, at[j], side, stride, kernel, radius, row);
        blur_across(row, side, stride, kernel, radius, wide);
        for (long i = 0; i < grid; i++) out[j * grid + i] = row[at[i]];
    }
}

/* Local means of images x (images, side, side, 3) at the places at (grid) of both sides, to out
 * (images, 13, grid, grid): see structure.py. kernels: the weights of the window and of the three
 * bands one after the other, radii (4). */
void local_means(const float *x, long images, long side, const float *kernels, const long *radii,
                 const long *at, long grid, float *out, int threads) {
    enum { LUMA, FIRST, SECOND, TONE, LOW, REST, NEXT, PLANES };
    enum { BANDS = 3, VARIANCE = 3, COLOUR = 4, XX = 5, YY = 6, XY = 7, BLURRED = 8, DARK = 11 };
    long stride = (side + LANES - 1) / LANES * LANES, size = side * stride, room = 0;
    for (int k = 0; k < 4; k++) room = radii[k] > room ? radii[k] : room;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < images; n++) {
        float *plane = calloc(PLANES * size + 2 * stride + 2 * (room + 32), sizeof(float));
        float *row = plane + PLANES * size, *wide = row + stride, *planes[PLANES];
        for (int k = 0; k < PLANES; k++) planes[k] = plane + k * size;
        float *luma = planes[LUMA], *to = out + n * 13 * grid * grid;
        const float *pixel = x + n * side * side * 3, *window = kernels;
        for (long y = 0; y < side; y++)
            for (long i = 0; i < side; i += LANES) {
                __m512 colours[3];
                load_colours(pixel + (y * side + i) * 3, side - i, colours);
                oppose(colours);
                for (int k = 0; k < 3; k++)
                    _mm512_storeu_ps(planes[LUMA + k] + y * stride + i, colours[k]);
            }
#define MEAN(from, which) \
    blur_at(from, side, stride, window, radii[0], at, grid, to + (which) * grid * grid, row, wide)
        /* Bands: what each of three blurs takes away. */
        const float *kernel = kernels + 2 * radii[0] + 1, *rest = luma;
        for (int k = 0; k < BANDS; k++) {
            float *low = planes[k % 2 ? NEXT : REST], *energy = planes[LOW];
            blur(rest, side, stride, kernel, radii[1 + k], low, wide);
            for (long i = 0; i < size; i++) energy[i] = (rest[i] - low[i]) * (rest[i] - low[i]);
            MEAN(energy, k);
            kernel += 2 * radii[1 + k] + 1;
            rest = low;
        }
        /* Tone and tints, and how far single pixels are from them. */
        float *energy = planes[REST], *colour = planes[NEXT], *blurred = planes[TONE];
        for (int k = 0; k < 3; k++) {
            const float *own = planes[LUMA + k];
            float *square = k ? colour : energy;
            blur(own, side, stride, window, radii[0], blurred, wide);
            for (long i = 0; i < size; i++) {
                float gap = own[i] - blurred[i];
                square[i] = (k == 2 ? square[i] : 0) + gap * gap;
            }
            for (long j = 0; j < grid; j++)
                for (long i = 0; i < grid; i++)
                    to[((BLURRED + k) * grid + j) * grid + i] = blurred[at[j] * stride + at[i]];
        }
        MEAN(energy, VARIANCE);
        MEAN(colour, COLOUR);
        /* Products of the central differences. */
        float *xx = planes[TONE], *yy = planes[REST], *xy = planes[NEXT];
        for (long y = 0; y < side; y++) {
            const float *above = luma + mirrored(y - 1, side) * stride;
            const float *below = luma + mirrored(y + 1, side) * stride, *here = luma + y * stride;
            widen(here, side, 1, wide);
            for (long i = 0; i < side; i++) {
                float gx = (wide[i + 2] - wide[i]) / 2, gy = (below[i] - above[i]) / 2;
                xx[y * stride + i] = gx * gx;
                yy[y * stride + i] = gy * gy;
                xy[y * stride + i] = gx * gy;
            }
        }
        MEAN(xx, XX);
        MEAN(yy, YY);
        MEAN(xy, XY);
        /* The darkest and the brightest of 3 x 3. */
        for (long j = 0; j < grid; j++)
            for (long i = 0; i < grid; i++) {
                float least = INFINITY, most = -INFINITY;
                for (long dy = -1; dy <= 1; dy++)
                    for (long dx = -1; dx <= 1; dx++) {
                        float v = luma[mirrored(at[j] + dy, side) * stride + mirrored(at[i] + dx, side)];
                        least = v < least ? v : least;
                        most = v > most ? v : most;
                    }
                to[(DARK * grid + j) * grid + i] = least;
                to[((DARK + 1) * grid + j) * grid + i] = most;
            }
        free(plane);
    }
}

/* Squared Mahalanobis distances of vectors (images, places, 64) from the mean (places, 64) of their
 * place, to out (images, places): the rows of the upper triangular whiten (places, 64, 64) lie one
 * after the other without the blocks of 16 columns that are zero, (places, 2560). */
void place_distances(const float *vectors, long images, long places, const float *mean,
                     const float *whiten, float *out, int threads) {
    enum { D = 64, BLOCKS = 4, PACKED = 2560, AHEAD = 4 /* images */ };
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long p = 0; p < places; p++)
        for (long n = 0; n < images; n++) {
            const float *v = vectors + (n * places + p) * D, *row = whiten + p * PACKED;
            if (n + AHEAD < images) /* each lies in a page of its own */
                for (int i = 0; i < D; i += LANES)
                    _mm_prefetch((const char *)(v + AHEAD * places * D + i), _MM_HINT_T0);
            float gap[D];
            for (int i = 0; i < D; i++) gap[i] = v[i] - mean[p * D + i];
            __m512 sum[BLOCKS];
            for (int j = 0; j < BLOCKS; j++) sum[j] = _mm512_setzero_ps();
#pragma GCC unroll 4
            for (int first = 0; first < BLOCKS; first++)
                for (int i = 0; i < LANES; i++, row += (BLOCKS - first) * LANES) {
                    __m512 g = _mm512_set1_ps(gap[first * LANES + i]);
#pragma GCC unroll 4
                    for (int j = first; j < BLOCKS; j++)
                        sum[j] = _mm512_fmadd_ps(g, _mm512_loadu_ps(row + (j - first) * LANES), sum[j]);
                }
            __m512 all = _mm512_setzero_ps();
            for (int j = 0; j < BLOCKS; j++) all = _mm512_fmadd_ps(sum[j], sum[j], all);
            out[n * places + p] = _mm512_reduce_add_ps(all);
        }
}

/* Blurs of whole planes (count, side, side), to out. */
void blur_planes(const float *planes, long count, long side, const float *kernel, long radius,
                 float *out, int threads) {
    long stride = (side + LANES - 1) / LANES * LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < count; n++) {
        float *room = calloc(side * stride + 2 * stride + 2 * (radius + 32), sizeof(float));
        float *row = room + side * stride, *wide = row + stride;
        const float *plane = planes + n * side * side;
        float *to = out + n * side * side;
        if (stride != side)
            for (long y = 0; y < side; y++)
                memcpy(room + y * stride, plane + y * side, side * sizeof(float));
        for (long y = 0; y < side; y++) {
            blur_down(stride == side ? plane : room, y, side, stride, kernel, radius, row);
            blur_across(row, side, stride, kernel, radius, wide);
            memcpy(to + y * side, row, side * sizeof(float));
        }
        free(room);
    }
}

/* Numbers in the order of the floats. */
static inline uint32_t key_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

/* The n-th greatest of values, bit by bit: to count is far faster than to sort. keys: room for them. */
static float nth_greatest(const float *values, long count, long n, uint32_t *keys) {
    uint32_t found = 0;
    for (long i = 0; i < count; i++) keys[i] = key_of(values[i]);
    for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
        uint32_t tried = found | bit, reach = 0;
        for (long i = 0; i < count; i++) reach += keys[i] >= tried;
        if ((long)reach >= n) found = tried;
    }
    float value;
    uint32_t bits = found ^ (found >> 31 ? 0x80000000u : 0xFFFFFFFFu);
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The sum of the values above high, to *above how many they are; those from low to high, *count of them,
 * to near. */
static double part(const float *values, long size, float low, float high, float *near, long *count,
                   long *above) {
    __m512d sums[2] = {_mm512_setzero_pd(), _mm512_setzero_pd()};
    *count = *above = 0;
    for (long i = 0; i < size; i += LANES) {
        __mmask16 some = size - i < LANES ? (__mmask16)((1u << (size - i)) - 1) : 0xFFFF;
        __m512 v = _mm512_maskz_loadu_ps(some, values + i);
        __mmask16 over = _mm512_mask_cmp_ps_mask(some, v, _mm512_set1_ps(high), _CMP_GT_OQ);
        __mmask16 from = _mm512_mask_cmp_ps_mask(some & ~over, v, _mm512_set1_ps(low), _CMP_GE_OQ);
        if (from) {
            _mm512_mask_compressstoreu_ps(near + *count, from, v);
            *count += __builtin_popcount(from);
        }
        if (over) {
            *above += __builtin_popcount(over);
            v = _mm512_maskz_mov_ps(over, v);
            sums[0] = _mm512_add_pd(sums[0], _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
            sums[1] = _mm512_add_pd(sums[1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
        }
    }
    return _mm512_reduce_add_pd(_mm512_add_pd(sums[0], sums[1]));
}

/* The means of the `most` greatest of each row of values (rows, size), to out (rows). A sample of a row
 * tells about where the least of them lies, so that only few values have to be looked at closely: all
 * of them where it misleads. */
void greatest_means(const float *values, long rows, long size, long most, float *out, int threads) {
    enum { SAMPLE = 256 };
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long r = 0; r < rows; r++) {
        const float *row = values + r * size;
        float *near = malloc((size + LANES) * sizeof(float)), low = -INFINITY, high = INFINITY;
        uint32_t *keys = malloc((size + SAMPLE) * sizeof(uint32_t));
        if (size > 8 * SAMPLE) {
            float sample[SAMPLE];
            long step = size / SAMPLE | 1; /* not down one column of a picture */
            for (long i = 0; i < SAMPLE; i++) sample[i] = row[i * step % size];
            double rank = (double)most * SAMPLE / size, away = 4 * sqrt(rank) + 2;
            if (rank - away >= 1) high = nth_greatest(sample, SAMPLE, rank - away, keys);
            if (rank + away < SAMPLE) low = nth_greatest(sample, SAMPLE, rank + away, keys);
        }
        long count, above, more, others;
        double all = part(row, size, low, high, near, &count, &above);
        if (above >= most || above + count < most)
            all = part(row, size, -INFINITY, INFINITY, near, &count, &above);
        float least = nth_greatest(near, count, most - above, keys);
        all += part(near, count, INFINITY, least, near, &others, &more);
        out[r] = (all + (most - above - more) * (double)least) / most;
        free(near);
        free(keys);
    }
}

/* Of two rows 2 x 2 values at a time: their means, and energies of their differences, which are added to
 * those before. */
static __m512 haar_row(const float *top, long line, long half, float *mean, __m512 energy) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    for (long i = 0; i < half; i += LANES) {
        uint32_t some = half - i < LANES ? (1u << 2 * (half - i)) - 1 : 0xFFFFFFFFu;
        __m512 sums[2], gaps[2], values[2][2];
        for (int r = 0; r < 2; r++) {
            const float *row = top + r * line + 2 * i;
            __m512 first = _mm512_maskz_loadu_ps((__mmask16)some, row);
            __m512 second = _mm512_maskz_loadu_ps((__mmask16)(some >> LANES), row + LANES);
            values[r][0] = _mm512_permutex2var_ps(first, even, second);
            values[r][1] = _mm512_permutex2var_ps(first, odd, second);
        }
        for (int c = 0; c < 2; c++) {
            sums[c] = _mm512_add_ps(values[0][c], values[1][c]);
            gaps[c] = _mm512_sub_ps(values[0][c], values[1][c]);
        }
        __m512 across = _mm512_sub_ps(sums[0], sums[1]), down = _mm512_mul_ps(gaps[0], gaps[0]);
        down = _mm512_fmadd_ps(gaps[1], gaps[1], down);
        energy = _mm512_fmadd_ps(across, across, energy);
        energy = _mm512_fmadd_ps(down, _mm512_set1_ps(2), energy);
        __m512 quarter = _mm512_mul_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_set1_ps(0.25f));
        __mmask16 kept = half - i < LANES ? (__mmask16)((1u << (half - i)) - 1) : 0xFFFF;
        _mm512_mask_storeu_ps(mean + i, kept, quarter);
    }
    return energy;
}

/* The energies of three Haar bands and the rest, luma and colour, of x - recon and of x - 1/2, images
 * (images, side, side, 3), to out (images, 2, 4, 2): see scores.py. */
void band_energies(const float *x, const float *recon, long images, long side, float *out,
                   int threads) {
    enum { BANDS = 3, COLOURS = 3 };
    const long size = side * side;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long task = 0; task < 2 * images; task++) {
        const float *own = x + task / 2 * side * side * 3;
        const float *other = task % 2 ? NULL : recon + task / 2 * side * side * 3;
        float *planes = malloc(sizeof(float) * COLOURS * size), *to = out + task * 2 * (BANDS + 1);
        for (long i = 0; i < size; i += LANES) {
            long left = size - i;
            __m512 gap[COLOURS], less[COLOURS];
            for (int c = 0; c < COLOURS; c++) less[c] = _mm512_set1_ps(0.5f);
            load_colours(own + 3 * i, left, gap);
            if (other) load_colours(other + 3 * i, left, less);
            for (int c = 0; c < COLOURS; c++) gap[c] = _mm512_sub_ps(gap[c], less[c]);
            oppose(gap);
            __mmask16 some = left < LANES ? (__mmask16)((1u << left) - 1) : 0xFFFF;
            for (int c = 0; c < COLOURS; c++) _mm512_mask_storeu_ps(planes + c * size + i, some, gap[c]);
        }
        memset(to, 0, sizeof(float) * 2 * (BANDS + 1));
        for (int c = 0; c < COLOURS; c++) {
            float *rest = planes + c * size;
            long high = side, line = side; /* of what is left, and from row to row */
            for (int k = 0; k < BANDS; k++) {
                long half = high / 2;
                __m512 energy = _mm512_setzero_ps();
                for (long j = 0; j < half; j++) /* the mean is written behind what is still to be read */
                    energy = haar_row(rest + 2 * j * line, line, half, rest + j * half, energy);
                to[2 * k + (c > 0)] += _mm512_reduce_add_ps(energy) / (16.0 * half * half);
                high = line = half;
            }
            double energy = 0;
            for (long i = 0; i < high * high; i++) energy += rest[i] * rest[i];
            to[2 * BANDS + (c > 0)] += energy / (high * high);
        }
        free(planes);
    }
}

/* The mean over three channels of (x - recon)^2, of count pixels. */
void squared_error(const float *x, const float *recon, long count, float *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < count; i++) {
        float a = x[3 * i] - recon[3 * i], b = x[3 * i + 1] - recon[3 * i + 1];
        float c = x[3 * i + 2] - recon[3 * i + 2];
        out[i] = (a * a + b * b + c * c) * (1.0f / 3);
    }
}

/* The mean of (x - recon)^2 of the `size` numbers of each image, to out (images). */
void mean_squares(const float *x, const float *recon, long images, long size, float *out, int threads) {
    enum { SOME = 64 * LANES }; /* numbers that are added up in single precision */
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < images; n++) {
        const float *own = x + n * size, *other = recon + n * size;
        double all = 0;
        for (long first = 0; first < size; first += SOME) {
            __m512 sum = _mm512_setzero_ps();
            for (long i = first; i < size && i < first + SOME; i += LANES) {
                __mmask16 some = size - i < LANES ? (__mmask16)((1u << (size - i)) - 1) : 0xFFFF;
                __m512 gap = _mm512_sub_ps(_mm512_maskz_loadu_ps(some, own + i),
                                           _mm512_maskz_loadu_ps(some, other + i));
                sum = _mm512_fmadd_ps(gap, gap, sum);
            }
            all += _mm512_reduce_add_ps(sum);
        }
        out[n] = all / size;
    }
}

/* (sqrt(v + floor) - mean) / deviation of each value of planes (count, size), in place; means and deviations
 * (size) of each place. */
void root_deviations(float *planes, long count, long size, float floor, const float *means,
                     const float *deviations, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < count; n++) {
        float *plane = planes + n * size;
        for (long i = 0; i < size; i += LANES) {
            __mmask16 some = size - i < LANES ? (__mmask16)((1u << (size - i)) - 1) : 0xFFFF;
            __m512 v = _mm512_add_ps(_mm512_maskz_loadu_ps(some, plane + i), _mm512_set1_ps(floor));
            __m512 gap = _mm512_sub_ps(_mm512_sqrt_ps(v), _mm512_maskz_loadu_ps(some, means + i));
            v = _mm512_maskz_div_ps(some, gap, _mm512_maskz_loadu_ps(some, deviations + i));
            _mm512_mask_storeu_ps(plane + i, some, v);
        }
    }
}

/* Images (images, side, side, 3) at small x small places, the means of whole squares, to out. */
void reduce_images(const float *x, long images, long side, long small, float *out, int threads) {
    const long ratio = side / small, line = side * 3;
    const float share = 1.0f / (ratio * ratio);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < images; n++) {
        float *row = malloc((line + LANES) * sizeof(float)), *to = out + n * small * small * 3;
        for (long y = 0; y < small; y++) {
            const float *rows[ratio];
            for (long k = 0; k < ratio; k++) rows[k] = x + (n * side + y * ratio + k) * line;
            for (long i = 0; i < line; i += LANES) {
                __mmask16 some = line - i < LANES ? (__mmask16)((1u << (line - i)) - 1) : 0xFFFF;
                __m512 sum = _mm512_setzero_ps();
                for (long k = 0; k < ratio; k++)
                    sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(some, rows[k] + i));
                _mm512_storeu_ps(row + i, sum);
            }
            for (long i = 0; i < small; i++, to += 3) {
                const float *from = row + i * ratio * 3;
                float red = 0, green = 0, blue = 0;
                for (long k = 0; k < ratio; k++, from += 3) {
                    red += from[0];
                    green += from[1];
                    blue += from[2];
                }
                to[0] = red * share;
                to[1] = green * share;
                to[2] = blue * share;
            }
        }
        free(row);
    }
}

/* Planes (count, side, side) at wide x wide places (bilinear, corners not aligned), to out. wide is no
 * less than side: what 16 places lie between are 18 at most. */
void enlarge_planes(const float *planes, long count, long side, long wide, float *out, int threads) {
    long room = wide + LANES;
    int32_t *firsts = malloc(room * sizeof(int32_t)), *seconds = malloc(room * sizeof(int32_t));
    float *shares = malloc(room * sizeof(float));
    for (long x = 0; x < room; x++) {
        long first, second;
        shares[x] = between(x < wide ? x : wide - 1, side, wide, &first, &second);
        firsts[x] = first;
        seconds[x] = second;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < count; n++) {
        float *row = calloc(side + 3 * LANES, sizeof(float)), *to = out + n * wide * wide;
        for (long y = 0; y < wide; y++, to += wide) {
            const float *upper = planes + (n * side + firsts[y]) * side;
            const float *lower = planes + (n * side + seconds[y]) * side;
            for (long i = 0; i < side; i++) row[i] = upper[i] + shares[y] * (lower[i] - upper[i]);
            for (long x = 0; x < wide; x += LANES) {
                const float *near = row + firsts[x];
                __m512i base = _mm512_set1_epi32(firsts[x]);
                __m512 low = _mm512_loadu_ps(near), high = _mm512_loadu_ps(near + LANES);
                __m512i first = _mm512_sub_epi32(_mm512_loadu_si512(firsts + x), base);
                __m512i second = _mm512_sub_epi32(_mm512_loadu_si512(seconds + x), base);
                __m512 left = _mm512_permutex2var_ps(low, first, high);
                __m512 right = _mm512_permutex2var_ps(low, second, high);
                __mmask16 some = wide - x < LANES ? (__mmask16)((1u << (wide - x)) - 1) : 0xFFFF;
                __m512 share = _mm512_loadu_ps(shares + x);
                _mm512_mask_storeu_ps(to + x, some,
                                      _mm512_fmadd_ps(_mm512_sub_ps(right, left), share, left));
            }
        }
        free(row);
    }
    free(firsts);
    free(seconds);
    free(shares);
}

/* To within 1e-7. */
static inline __m512 exact_sigmoid(__m512 x) {
    __m512 power = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f));
    __m512 n = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_sub_ps(power, n), two_r = _mm512_set1_ps(1.54035304e-4f);
    const float series[] = {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f,
                            6.93147181e-1f, 1.0f};
    for (int i = 0; i < 6; i++) two_r = _mm512_fmadd_ps(two_r, r, _mm512_set1_ps(series[i]));
    __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(one, _mm512_add_ps(one, _mm512_scalef_ps(two_r, n)));
}

/* What lies in memory as 12 channels of a place, (colour, row, column), as two rows of two pixels of
 * three colours, and back. */
static const int TO_ROWS[16] = {0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11, 12, 13, 14, 15};
static const int TO_CHANNELS[16] = {0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11, 12, 13, 14, 15};
enum { UPPER = 0x003F, LOWER = 0x0FC0, TWELVE = 0x0FFF };

/* The sigmoids of the 12 channels of a place, and how far they are from the pixels. */
static inline __m512 place_gap(const bf16 *channels, const float *upper, const float *lower,
                               __m512 *pixels) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(TWELVE, channels));
    __m512 own = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    *pixels = exact_sigmoid(_mm512_permutexvar_ps(_mm512_loadu_si512(TO_ROWS), own));
    __m512 x = _mm512_mask_loadu_ps(_mm512_maskz_loadu_ps(UPPER, upper), LOWER, lower - 6);
    return _mm512_maskz_sub_ps(TWELVE, *pixels, x);
}

/* The sum of squares of sigmoid(h) - x, h (rows, wide, 12) the channels of 2 x 2 pixels each (Shi et
 * al. 2016), x (2 rows, 2 wide, 3); sums: room for threads numbers. */
double painted_error(const bf16 *h, const float *x, long rows, long wide, double *sums, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        sums[t] = 0;
        for (long row = rows * t / threads; row < rows * (t + 1) / threads; row++) {
            const float *upper = x + row * wide * 12, *lower = upper + wide * 6;
            __m512 sum = _mm512_setzero_ps(), pixels;
            for (long i = 0; i < wide; i++) {
                __m512 gap = place_gap(h + (row * wide + i) * 12, upper + i * 6, lower + i * 6, &pixels);
                sum = _mm512_fmadd_ps(gap, gap, sum);
            }
            sums[t] += _mm512_reduce_add_ps(sum);
        }
    }
    double out = 0;
    for (int t = 0; t < threads; t++) out += sums[t];
    return out;
}

/* Its gradient times scale, (rows, wide, 12), to out. */
void painted_error_gradient(const bf16 *h, const float *x, long rows, long wide, float scale,
                            bf16 *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const float *upper = x + row * wide * 12, *lower = upper + wide * 6;
        const __m512 one = _mm512_set1_ps(1.0f), twice = _mm512_set1_ps(2 * scale);
        for (long i = 0; i < wide; i++) {
            long at = (row * wide + i) * 12;
            __m512 pixels, gap = place_gap(h + at, upper + i * 6, lower + i * 6, &pixels);
            __m512 slope = _mm512_mul_ps(pixels, _mm512_sub_ps(one, pixels));
            __m512 all = _mm512_mul_ps(_mm512_mul_ps(gap, slope), twice);
            all = _mm512_permutexvar_ps(_mm512_loadu_si512(TO_CHANNELS), all);
            __m256bh down = _mm512_cvtneps_pbh(all);
            __m256i bits;
            memcpy(&bits, &down, sizeof bits);
            _mm256_mask_storeu_epi16(out + at, TWELVE, bits);
        }
    }
}

/* A convolution of 32 channels by 3 x 3 to 12, which are the three colours of 2 x 2 pixels (Shi et al. 2016),
 * and its sigmoid, to out (2 side, 2 side, 3); from a plane with a border of zeros.
 *
 * weights (9, 2, 16, 16, 2): the 32 channels, in pairs, of each place beneath the kernel, for 16 columns,
 * of which 12 count, 2 rows x 2 columns x 3 colours; the bfloat16 nearest and what that leaves over.
 * side is 16 at least: the last places of a row are computed twice where 16 does not divide it. */
static void paint(const bf16 *plane, long side, const bf16 *weights, const float *bias, float *out) {
    enum { ROWS = 16, PIECE = 512 /* numbers of a tile */ };
    float table[4][ROWS][ROWS] __attribute__((aligned(64)));
    const __m512 added = _mm512_loadu_ps(bias);
    for (long y = 0; y < side; y++) {
        float *upper = out + y * 2 * side * 6, *lower = upper + side * 6;
        for (long x = 0; x < side; x += 4 * ROWS) {
            long pieces = 0, starts[4];
            for (long at = x; at < side && pieces < 4; at += ROWS)
                starts[pieces++] = at + ROWS < side ? at : side - ROWS;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int tap = 0; tap < 9; tap++) {
                const bf16 *from = plane + ((y + tap / 3) * (side + 2) + tap % 3) * LINE;
                _tile_loadd(6, weights + tap * 2 * PIECE, 64);
                _tile_loadd(7, weights + (tap * 2 + 1) * PIECE, 64);
#define PIECE_OF(tile)                                   \
    if (tile < pieces) {                                 \
        _tile_loadd(4, from + starts[tile] * LINE, 64);  \
        _tile_dpbf16ps(tile, 4, 6);                      \
        _tile_dpbf16ps(tile, 4, 7);                      \
    }
                PIECE_OF(0)
                PIECE_OF(1)
                PIECE_OF(2)
                PIECE_OF(3)
            }
            _tile_stored(0, table[0], 64);
            _tile_stored(1, table[1], 64);
            _tile_stored(2, table[2], 64);
            _tile_stored(3, table[3], 64);
            for (long i = 0; i < pieces * ROWS; i++) {
                __m512 sums = _mm512_load_ps(table[i / ROWS][i % ROWS]);
                __m512 pixels = exact_sigmoid(_mm512_add_ps(sums, added));
                long place = starts[i / ROWS] + i % ROWS;
                _mm512_mask_storeu_ps(upper + place * 6, UPPER, pixels);
                _mm512_mask_storeu_ps(lower + place * 6 - 6, LOWER, pixels);
            }
        }
    }
}

/* Networks of convolutions, image after image: the maps of a few images, from layer to layer, are still
 * in the cache. They lie in planes, channels last, with a border of zeros. A layer computes 16 places
 * (a block) and 32 channels at a time; counted are numbers, where nothing else is said. */
struct layer {
    const bf16 *weights;   /* (width / 32, taps, chunks, 2, 16, 16, 2), as AMX takes them */
    const float *bias;     /* (width) */
    const int32_t *taps;   /* (n_taps) from where a place starts to what is beneath the kernel */
    const int32_t *starts; /* (blocks) where the first place of each starts in the plane above */
    const int32_t *at;     /* (blocks, 3, 16) places below, in the kept maps, in those added; or -1 */
    const float *told;     /* (33) weights of 32 channels and a bias, or NULL: their sum alone is kept */
    long n_taps, chunks /* of 32, of what is beneath a tap */, blocks, step /* from place to place */;
    long width /* channels */, above, below, added /* planes, or -1 */, kept /* maps, or -1 */;
    long silu, paints /* the channels are the colours of 2 x 2 pixels: see `paint` */;
};

struct plane {
    long at, size; /* of an image */
};

/* Where a layer's channels, from one on, go. */
struct target {
    const struct layer *layer;
    const float *bias;
    bf16 *below;
    const bf16 *added;
    void *kept;
};

enum { SILU = 1, ADDED = 2, BELOW = 4, KEPT = 8, TOLD = 16 };

/* Places first to last of two blocks, whose sums are in the table: bias, SiLU, what is added. */
INLINE void finish(const struct target *to, const int32_t *bases, float (*table)[LANES][LANES], int first,
                   int last, const int kind) {
    const __m512 bias[2] = {_mm512_loadu_ps(to->bias), _mm512_loadu_ps(to->bias + LANES)};
    const __m512 powers[2] = {_mm512_mul_ps(bias[0], _mm512_set1_ps(-LOG2_E)),
                              _mm512_mul_ps(bias[1], _mm512_set1_ps(-LOG2_E))};
    const float *tell = kind & TOLD ? to->layer->told : to->bias;
    const __m512 told[2] = {_mm512_loadu_ps(tell), _mm512_loadu_ps(tell + LANES)};
    const long width = to->layer->width;
    for (int i = first; i < last; i++) {
        int block = i / LANES, r = i % LANES;
        const int32_t *place = bases + block * 3 * LANES + r;
        if (place[0] < 0) continue;
        __m512 sums[2] = {_mm512_load_ps(table[2 * block][r]), _mm512_load_ps(table[2 * block + 1][r])};
        __m512 u = _mm512_add_ps(sums[0], bias[0]), v = _mm512_add_ps(sums[1], bias[1]);
        if (kind & SILU) { /* -log2(e) times the same, beside the addition */
            __m512 p = _mm512_fmadd_ps(sums[0], _mm512_set1_ps(-LOG2_E), powers[0]);
            __m512 q = _mm512_fmadd_ps(sums[1], _mm512_set1_ps(-LOG2_E), powers[1]);
            u = _mm512_mul_ps(u, over_one_and_power(p));
            v = _mm512_mul_ps(v, over_one_and_power(q));
        }
        if (kind & ADDED) {
            const bf16 *more = to->added + place[2 * LANES] * width;
            u = _mm512_add_ps(u, load(more));
            v = _mm512_add_ps(v, load(more + LANES));
        }
        if (kind & TOLD) {
            u = _mm512_fmadd_ps(v, told[1], _mm512_mul_ps(u, told[0]));
            ((float *)to->kept)[place[LANES]] = to->layer->told[LINE] + _mm512_reduce_add_ps(u);
            continue;
        }
        __m512bh both = _mm512_cvtne2ps_pbh(v, u);
        if (kind & BELOW) memcpy(to->below + place[0] * width, &both, sizeof both);
        if (kind & KEPT) memcpy((bf16 *)to->kept + place[LANES] * width, &both, sizeof both);
    }
}

/* 32 channels of an image's maps. While the sums of two blocks are computed those before are finished,
 * a few places with each step: tiles are multiplied beside other work. */
INLINE void convolve_as(const struct target *to, const bf16 *above, const bf16 *weights, const int kind) {
    enum { PIECE = 512 /* numbers of a tile */ };
    const struct layer *l = to->layer;
    float tables[2][4][LANES][LANES] __attribute__((aligned(64)));
    const int32_t *before = NULL;
    int steps = l->n_taps * l->chunks, each = (2 * LANES + steps - 1) / steps, last = 0;
    long stride = l->step * sizeof(bf16), turn = 0;
    for (long b = 0; b < l->blocks; b += 2, turn = 1 - turn) {
        long other = b + 1 < l->blocks ? b + 1 : b;
        const bf16 *one = above + l->starts[b], *two = above + l->starts[other], *w = weights;
        int done = 0;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (long tap = 0; tap < l->n_taps; tap++)
            for (long k = l->taps[tap]; k < l->taps[tap] + l->chunks * LINE; k += LINE, w += 2 * PIECE) {
                _tile_loadd(4, one + k, stride);
                _tile_loadd(6, w, 64);
                _tile_loadd(7, w + PIECE, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, two + k, stride);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
                int next = done + each < last ? done + each : last;
                finish(to, before, tables[1 - turn], done, next, kind);
                done = next;
            }
        _tile_stored(0, tables[turn][0], 64);
        _tile_stored(1, tables[turn][1], 64);
        _tile_stored(2, tables[turn][2], 64);
        _tile_stored(3, tables[turn][3], 64);
        before = l->at + b * 3 * LANES;
        last = (other - b + 1) * LANES;
    }
    finish(to, before, tables[1 - turn], 0, last, kind);
}

/* Each kind of layer as a function of its own, without a question at each place. */
static void convolve(const struct target *to, const bf16 *above, const bf16 *weights) {
    int kind = to->layer->silu ? SILU : 0;
    if (to->added) kind |= ADDED;
    if (to->below) kind |= BELOW;
    if (to->kept) kind |= to->layer->told ? TOLD : KEPT;
#define KIND(of)                                \
    case (of):                                  \
        convolve_as(to, above, weights, (of));  \
        break;
    switch (kind) {
        KIND(BELOW)
        KIND(BELOW | SILU)
        KIND(BELOW | ADDED)
        KIND(BELOW | SILU | ADDED)
        KIND(BELOW | SILU | KEPT)
        KIND(KEPT | SILU)
        KIND(KEPT | SILU | ADDED)
        KIND(SILU | TOLD)
        default:
            convolve_as(to, above, weights, kind);
    }
}

/* Pixels less 1/2, into a plane with its border. */
static void lay_out_pixels(const float *pixels, long side, bf16 *plane) {
    long count = side * 3;
    for (long y = 0; y < side; y++) {
        bf16 *row = plane + ((y + 1) * (side + 2) + 1) * 3;
        for (long at = 0; at < count; at += LANES) {
            __mmask16 some = count - at >= LANES ? 0xFFFF : (__mmask16)((1u << (count - at)) - 1);
            __m512 v = _mm512_maskz_loadu_ps(some, pixels + y * count + at);
            __m256bh down = _mm512_cvtneps_pbh(_mm512_sub_ps(v, _mm512_set1_ps(0.5f)));
            __m256i bits;
            memcpy(&bits, &down, sizeof bits);
            _mm256_mask_storeu_epi16(row + at, some, bits);
        }
    }
}

static void lay_out_maps(const bf16 *maps, long side, long width, bf16 *plane) {
    for (long y = 0; y < side; y++)
        memcpy(plane + ((y + 1) * (side + 2) + 1) * width, maps + y * side * width,
               side * width * sizeof(bf16));
}

/* Layers one after the other, of images (images, side, side, 3) or of maps (images, side, side, width);
 * `together` of them are taken through all layers at a time. Of each kept maps an image has so many
 * bytes. room (threads, room_size): the planes, their borders zero. */
void run_layers(const struct layer *layers, int count, const struct plane *planes, const void *given,
                long images, long side, long width, char *const *kept, const long *bytes, bf16 *room,
                long room_size, long together, int threads) {
    long groups = (images + together - 1) / together, size = side * side * width;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        struct tiles theirs = take_tiles();
        bf16 *own = room + t * room_size;
        for (long g = groups * t / threads; g < groups * (t + 1) / threads; g++) {
            long first = g * together, some = images - first < together ? images - first : together;
            for (long i = 0; i < some; i++) {
                bf16 *plane = own + planes[0].at + i * planes[0].size;
                if (width == 3)
                    lay_out_pixels((const float *)given + (first + i) * size, side, plane);
                else
                    lay_out_maps((const bf16 *)given + (first + i) * size, side, width, plane);
            }
            for (int k = 0; k < count; k++) {
                const struct layer *l = layers + k;
#define OF(plane) (own + planes[plane].at + i * planes[plane].size)
                IN_MEMORY;
                if (l->paints) {
                    for (long i = 0; i < some; i++) {
                        char *pixels = kept[l->kept] + (first + i) * bytes[l->kept];
                        paint(OF(l->above), l->paints, l->weights, l->bias, (float *)pixels);
                    }
                    continue;
                }
                for (long c = 0; c < l->width; c += LINE)
                    for (long i = 0; i < some; i++) {
                        struct target to = {.layer = l, .bias = l->bias + c};
                        if (l->below >= 0) to.below = OF(l->below) + c;
                        if (l->added >= 0) to.added = OF(l->added) + c;
                        if (l->kept >= 0) {
                            char *maps = kept[l->kept] + (first + i) * bytes[l->kept];
                            to.kept = maps + (l->told ? 0 : c * sizeof(bf16));
                        }
                        convolve(&to, OF(l->above), l->weights + c * l->n_taps * l->chunks * LINE);
                    }
            }
        }
        give_tiles_back(theirs);
    }
}

/* Products of rows (count, size) with weights of `columns` columns, to out (count, columns). The weights lie
 * as (size / 32, columns / 16, parts, 16, 16, 2): the bfloat16 nearest and, of two parts, what that leaves
 * over. size is a multiple of 32, columns of 32. The weights, which no cache holds, are read once: a few
 * steps of 32 numbers after the other, for all rows, 32 of these at a time. */
void linear(const bf16 *rows, long count, long size, const bf16 *weights, long columns, int parts,
            float *out, int threads) {
    enum { PIECE = 512, GROUP = 32 /* rows */, STEPS = 16 };
    const long groups = (count + GROUP - 1) / GROUP, all = size / LINE, pairs = columns / (2 * LANES);
    const long stride = columns * sizeof(float);
    bf16 *near = aligned_alloc(64, groups * GROUP * size * sizeof(bf16)); /* (steps, rows, 32) */
    float *sums = calloc(groups * GROUP * columns, sizeof(float));
    for (long r = 0; r < groups * GROUP; r++)
        for (long k = 0; k < all; k++) {
            bf16 *to = near + (k * groups * GROUP + r) * LINE;
            if (r < count)
                memcpy(to, rows + r * size + k * LINE, LINE * sizeof(bf16));
            else
                memset(to, 0, LINE * sizeof(bf16));
        }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        struct tiles theirs = take_tiles();
        for (long first = 0; first < all; first += STEPS)
            for (long p = pairs * t / threads; p < pairs * (t + 1) / threads; p++)
                for (long g = 0; g < groups; g++) {
                    float *upper = sums + g * GROUP * columns + p * 2 * LANES;
                    float *lower = upper + LANES * columns;
                    _tile_loadd(0, upper, stride);
                    _tile_loadd(1, upper + LANES, stride);
                    _tile_loadd(2, lower, stride);
                    _tile_loadd(3, lower + LANES, stride);
                    for (long k = first; k < all && k < first + STEPS; k++) {
                        const bf16 *row = near + (k * groups + g) * GROUP * LINE;
                        const bf16 *weight = weights + (k * columns + p * 2 * LANES) * parts * LINE;
                        _tile_loadd(4, row, 64);
                        _tile_loadd(5, row + LANES * LINE, 64);
                        for (int part = 0; part < parts; part++) {
                            _tile_loadd(6, weight + part * PIECE, 64);
                            _tile_loadd(7, weight + (parts + part) * PIECE, 64);
                            _tile_dpbf16ps(0, 4, 6);
                            _tile_dpbf16ps(1, 4, 7);
                            _tile_dpbf16ps(2, 5, 6);
                            _tile_dpbf16ps(3, 5, 7);
                        }
                    }
                    _tile_stored(0, upper, stride);
                    _tile_stored(1, upper + LANES, stride);
                    _tile_stored(2, lower, stride);
                    _tile_stored(3, lower + LANES, stride);
                }
        give_tiles_back(theirs);
    }
    memcpy(out, sums, count * columns * sizeof(float));
    free(near);
    free(sums);
}
