/* Loops that torch has not, for processors with AVX-512 and bfloat16; see native.py.
 *
 * Training in bfloat16 is bound by memory: here batch norm and SiLU are one pass there and one back,
 * and AdamW reads gradients and writes weights in bfloat16 as it goes. Nearest places are found
 * without the table of distances being written.
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
int version(void) { return 2; }

enum { LANES = 16, LINE = 32 /* bfloat16 numbers of a cache line */, BLOCK = 128 /* rows */ };

static inline __m512 load(const bf16 *from) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

static inline void store(bf16 *to, __m512 values) {
    __m256bh low = _mm512_cvtneps_pbh(values);
    memcpy(to, &low, sizeof low);
}

/* 1 / (1 + exp(-x)) to 2e-4 of it, a tenth of what bfloat16 resolves: exp(-x) = 2^n 2^r, and 2^r a
 * polynomial of third degree. */
static inline __m512 sigmoid(__m512 x) {
    __m512 power = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f));
    __m512 n = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_sub_ps(power, n);
    __m512 two_r = _mm512_fmadd_ps(r, _mm512_set1_ps(0.0558f), _mm512_set1_ps(0.2402265f));
    two_r = _mm512_fmadd_ps(two_r, r, _mm512_set1_ps(0.6931472f));
    two_r = _mm512_fmadd_ps(two_r, r, _mm512_set1_ps(1.0f));
    return _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_scalef_ps(two_r, n)));
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

/* The least product of each of the queries (count, 64) with a row of any of how_many of the banks, to
 * least. count is a multiple of 16, places of 64. Tiles 4 and 5 hold 16 queries, 6 and 7 the two halves
 * of 16 places, 0 to 3 the products with 64: only their least are kept. */
static void least_of_image(const bf16 *queries, long count, const bf16 *banks, const int64_t *alike,
                           int how_many, long places, float *least) {
    enum { COLUMNS = 64, HALF = 32, ROWS = 16, TABLE = 4 * ROWS, NEAR = 256 /* rows in the cache */ };
    struct tiles theirs = take_tiles();
    float table[4][ROWS][ROWS] __attribute__((aligned(64)));
    for (long q = 0; q < count; q++) least[q] = INFINITY;
    for (int b = 0; b < how_many; b++)
        for (long near = 0; near < places; near += NEAR)
            for (long q = 0; q < count; q += ROWS) {
                long end = near + NEAR < places ? near + NEAR : places;
                __m512 low[ROWS];
                for (int i = 0; i < ROWS; i++) low[i] = _mm512_set1_ps(INFINITY);
                _tile_loadd(4, queries + q * COLUMNS, COLUMNS * sizeof(bf16));
                _tile_loadd(5, queries + q * COLUMNS + HALF, COLUMNS * sizeof(bf16));
                for (long p = near; p < end; p += TABLE) {
                    const bf16 *bank = banks + (alike[b] * places + p) * COLUMNS;
#define PRODUCTS(tile)                                                              \
    _tile_zero(tile);                                                               \
    _tile_loadd(6, bank + tile * ROWS * COLUMNS, 64);                               \
    _tile_loadd(7, bank + tile * ROWS * COLUMNS + HALF * ROWS, 64);                 \
    _tile_dpbf16ps(tile, 4, 6);                                                     \
    _tile_dpbf16ps(tile, 5, 7);
                    PRODUCTS(0)
                    PRODUCTS(1)
                    PRODUCTS(2)
                    PRODUCTS(3)
                    _tile_stored(0, table[0], 64);
                    _tile_stored(1, table[1], 64);
                    _tile_stored(2, table[2], 64);
                    _tile_stored(3, table[3], 64);
                    for (int t = 0; t < 4; t++)
                        for (int i = 0; i < ROWS; i++)
                            low[i] = _mm512_min_ps(low[i], _mm512_load_ps(table[t][i]));
                }
                for (int i = 0; i < ROWS; i++) {
                    float found = _mm512_reduce_min_ps(low[i]);
                    if (found < least[q + i]) least[q + i] = found;
                }
            }
    give_tiles_back(theirs);
}

/* The same for several images: queries (images, count, 64), of each how_many alike (images, how_many) of
 * the banks. A bank (places, 64) lies in groups of 16 rows, (places / 16, 32, 16, 2): pairs of columns,
 * then the rows, as AMX takes them. */
void least_products(const bf16 *queries, long images, long count, const bf16 *banks,
                    const int64_t *alike, int how_many, long places, float *least, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < images; n++)
        least_of_image(queries + n * count * 64, count, banks, alike + n * how_many, how_many, places,
                       least + n * count);
}

/* Products of rows (count, width) with weights (width, 64), to out (count, 64). The weights lie as
 * (width / 32, 4, 2, 16, 16, 2): for 32 columns and 16 of the 64 the bfloat16 nearest and what that
 * leaves over. count is a multiple of 16, width of 32. */
void mix(const bf16 *rows, long count, long width, const bf16 *weights, float *out, int threads) {
    enum { ROWS = 16, PIECE = 512 /* numbers of a tile */, SIDE = 64 };
    long blocks = count / ROWS;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        struct tiles theirs = take_tiles();
        for (long block = blocks * t / threads; block < blocks * (t + 1) / threads; block++) {
            const bf16 *from = rows + block * ROWS * width;
            float *to = out + block * ROWS * SIDE;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (long k = 0; k < width / LINE; k++) {
                const bf16 *weight = weights + k * 8 * PIECE;
                _tile_loadd(4, from + k * LINE, width * sizeof(bf16));
#define MIXED(tile)                                          \
    _tile_loadd(5, weight + tile * 2 * PIECE, 64);           \
    _tile_loadd(6, weight + (tile * 2 + 1) * PIECE, 64);     \
    _tile_dpbf16ps(tile, 4, 5);                              \
    _tile_dpbf16ps(tile, 4, 6);
                MIXED(0)
                MIXED(1)
                MIXED(2)
                MIXED(3)
            }
            _tile_stored(0, to, SIDE * sizeof(float));
            _tile_stored(1, to + 16, SIDE * sizeof(float));
            _tile_stored(2, to + 32, SIDE * sizeof(float));
            _tile_stored(3, to + 48, SIDE * sizeof(float));
        }
        give_tiles_back(theirs);
    }
}

/* Gaussian blurs of planes of floats, (rows, stride), the stride the side filled up to a multiple of
 * 16.
 * A kernel of 2 radius + 1 weights; what lies beyond an edge is mirrored at it. */
static inline long mirrored(long i, long side) {
    i = i < 0 ? -i : i;
    return i < side ? i : 2 * (side - 1) - i;
}

/* A row of the plane's blur downwards. */
static void blur_down(const float *plane, long y, long side, long stride, const float *kernel,
                      long radius, float *row) {
    for (long x = 0; x < stride; x += LANES) {
        __m512 sum = _mm512_setzero_ps();
        for (long k = -radius; k <= radius; k++)
            sum = _mm512_fmadd_ps(_mm512_set1_ps(kernel[k + radius]),
                                  _mm512_loadu_ps(plane + mirrored(y + k, side) * stride + x), sum);
        _mm512_storeu_ps(row + x, sum);
    }
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
    widen(row, side, radius, wide);
    for (long x = 0; x < stride; x += LANES) {
        __m512 sum = _mm512_setzero_ps();
        for (long k = 0; k <= 2 * radius; k++)
            sum = _mm512_fmadd_ps(_mm512_set1_ps(kernel[k]), _mm512_loadu_ps(wide + x + k), sum);
        _mm512_storeu_ps(row + x, sum);
    }
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
        widen(row, side, radius, wide);
        for (long i = 0; i < grid; i++) {
            float sum = 0;
            for (long k = 0; k <= 2 * radius; k++) sum += kernel[k] * wide[at[i] + k];
            out[j * grid + i] = sum;
        }
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
            for (long i = 0; i < side; i++, pixel += 3) {
                long here = y * stride + i;
                luma[here] = (pixel[0] + pixel[1] + pixel[2]) * (1.0f / 3);
                planes[FIRST][here] = pixel[0] - pixel[1];
                planes[SECOND][here] = 0.5f * pixel[0] + 0.5f * pixel[1] - pixel[2];
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
    enum { D = 64, BLOCKS = 4, PACKED = 2560 };
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long p = 0; p < places; p++)
        for (long n = 0; n < images; n++) {
            const float *v = vectors + (n * places + p) * D, *row = whiten + p * PACKED;
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

/* The means of the `most` greatest of each row of values (rows, size), to out (rows). The value that
 * parts them from the rest is found bit by bit: to count is far faster than to sort. */
void greatest_means(const float *values, long rows, long size, long most, float *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long r = 0; r < rows; r++) {
        const float *row = values + r * size;
        uint32_t *keys = malloc(size * sizeof(uint32_t)), parting = 0; /* in the floats' order */
        for (long i = 0; i < size; i++) {
            uint32_t bits;
            memcpy(&bits, row + i, sizeof bits);
            keys[i] = bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
        }
        for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
            uint32_t tried = parting | bit, reach = 0;
            for (long i = 0; i < size; i++) reach += keys[i] >= tried;
            if ((long)reach >= most) parting = tried;
        }
        float least;
        uint32_t above = 0, bits = parting ^ (parting >> 31 ? 0x80000000u : 0xFFFFFFFFu);
        memcpy(&least, &bits, sizeof least);
        double all = 0;
        for (long i = 0; i < size; i++) {
            int is = keys[i] > parting;
            above += is;
            all += is ? row[i] : 0;
        }
        out[r] = (all + (most - above) * (double)least) / most;
        free(keys);
    }
}

/* The energies of three Haar bands and the rest, luma and colour, of x - recon and of x - 1/2, images
 * (images, side, side, 3), to out (images, 2, 4, 2): see scores.py. */
void band_energies(const float *x, const float *recon, long images, long side, float *out,
                   int threads) {
    enum { BANDS = 3, COLOURS = 3 };
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long task = 0; task < 2 * images; task++) {
        const float *own = x + task / 2 * side * side * 3;
        const float *other = task % 2 ? NULL : recon + task / 2 * side * side * 3;
        float *planes = malloc(sizeof(float) * COLOURS * side * side), *to = out + task * 2 * (BANDS + 1);
        for (long i = 0; i < side * side; i++) {
            float gap[COLOURS];
            for (int c = 0; c < COLOURS; c++)
                gap[c] = own[3 * i + c] - (other ? other[3 * i + c] : 0.5f);
            planes[i] = (gap[0] + gap[1] + gap[2]) * (1.0f / 3);
            planes[side * side + i] = gap[0] - gap[1];
            planes[2 * side * side + i] = 0.5f * gap[0] + 0.5f * gap[1] - gap[2];
        }
        memset(to, 0, sizeof(float) * 2 * (BANDS + 1));
        for (int c = 0; c < COLOURS; c++) {
            float *rest = planes + c * side * side;
            long high = side, line = side; /* of what is left, and from row to row */
            for (int k = 0; k < BANDS; k++) {
                long half = high / 2;
                double energy = 0;
                for (long j = 0; j < half; j++) {
                    const float *top = rest + 2 * j * line, *bottom = top + line;
                    float *mean = rest + j * half, sum = 0; /* behind what is still to be read */
                    for (long i = 0; i < half; i++) {
                        float a = top[2 * i], b = top[2 * i + 1];
                        float d = bottom[2 * i], e = bottom[2 * i + 1];
                        float left = a + d, right = b + e, up = a - d, down = b - e;
                        sum += (left - right) * (left - right) + 2 * (up * up + down * down);
                        mean[i] = (left + right) / 4;
                    }
                    energy += sum;
                }
                to[2 * k + (c > 0)] += energy / (16.0 * half * half);
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

/* A convolution of maps (images, high, wide, 32) by 3 x 3 to 12 channels, which are the three colours
 * of 2 x 2 pixels (Shi et al. 2016), and its sigmoid, to out (images, 2 high, 2 wide, 3).
 *
 * weights (9, 2, 16, 16, 2): the 32 channels, in pairs, of each place beneath the kernel, for 16 columns,
 * of which 12 count, 2 rows x 2 columns x 3 colours; the bfloat16 nearest and what that leaves over.
 * wide is a multiple of 16. */
void to_pixels(const bf16 *maps, long images, long high, long wide, const bf16 *weights,
               const float *bias, float *out, int threads) {
    enum { WIDTH = 32, ROWS = 16, PIECE = ROWS * WIDTH /* numbers of a tile */ };
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < images; n++) {
        struct tiles theirs = take_tiles();
        bf16 *room = calloc(3 * (wide + 2) * WIDTH, sizeof(bf16)); /* rows with a zero at either end */
        float table[4][ROWS][ROWS] __attribute__((aligned(64)));
        const __m512 added = _mm512_loadu_ps(bias);
        for (long y = -1; y < high; y++) {
            bf16 *next = room + (y + 1) % 3 * (wide + 2) * WIDTH + WIDTH;
            if (y + 1 < high)
                memcpy(next, maps + (n * high + y + 1) * wide * WIDTH, wide * WIDTH * sizeof(bf16));
            else
                memset(next, 0, wide * WIDTH * sizeof(bf16));
            if (y < 0) continue;
            IN_MEMORY;
            float *upper = out + (n * high + y) * 2 * wide * 6, *lower = upper + wide * 6;
            for (long x = 0; x < wide; x += 4 * ROWS) {
                long pieces = (wide - x) / ROWS < 4 ? (wide - x) / ROWS : 4;
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
                for (int tap = 0; tap < 9; tap++) {
                    /* Row y - 1 lies in the third before that of y + 1, zeros above the first. */
                    const bf16 *row = room + (y + 2 + tap / 3) % 3 * (wide + 2) * WIDTH;
                    const bf16 *from = row + (x + tap % 3) * WIDTH;
                    _tile_loadd(6, weights + tap * 2 * PIECE, 64);
                    _tile_loadd(7, weights + (tap * 2 + 1) * PIECE, 64);
#define PIECE_OF(tile)                                   \
    if (tile < pieces) {                                 \
        _tile_loadd(4, from + tile * PIECE, 64);         \
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
                    _mm512_mask_storeu_ps(upper + (x + i) * 6, UPPER, pixels);
                    _mm512_mask_storeu_ps(lower + (x + i) * 6 - 6, LOWER, pixels);
                }
            }
        }
        free(room);
        give_tiles_back(theirs);
    }
}
