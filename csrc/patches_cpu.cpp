// extract_patches on a CPU: one patch after another, its red, green and blue each a plane of floats
// that stays in the cache. Compiled once for each instruction set, named by VARIANT. The compiler
// vectorises the loops over a row or a plane.
#include <string.h>

#include "empssl.h"
#include "pixel.h"

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)

// How many floats a register holds.
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX2__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
enum { MOST_LANES = 16 };

// That many floats, at any address.
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

// ---- crop and resize ----

// A resize along one axis: output i is the sum over t below count[i] of weight[i * taps + t] times
// input first[i] + t.
struct Axis {
    int taps;
    int* first;     // (s,)
    int* count;     // (s,)
    float* weight;  // (s, taps)
};

static inline int64_t most_taps(int64_t length, int64_t s) {
    const int64_t taps = 2 * ((length + s - 1) / s) + 1;
    return taps < length ? taps : length;
}

static inline int64_t axis_floats(int64_t length, int64_t s) {
    return s * (2 + most_taps(length, s));
}

static Axis make_axis(int length, int s, bool flip, float* memory) {
    const Axis axis{(int)most_taps(length, s), (int*)memory, (int*)memory + s, memory + 2 * s};
    // An image is flipped by writing its outputs from right to left.
    const float step = tap_step(length, s);
    for (int i = 0; i < s; ++i) {
        const Taps taps = taps_of<int64_t>(i, length, s);
        const int place = flip ? s - 1 - i : i;
        axis.first[place] = taps.first;
        axis.count[place] = taps.count;
        for (int t = 0; t < taps.count; ++t) {
            const float weight = tap_weight(taps.start, step, t) * taps.inverse_sum;
            axis.weight[place * axis.taps + t] = weight;
        }
    }
    return axis;
}

// Resizes and blurs all come down to this: out[i] = sum over t of weight[t] * in[t * stride + i],
// for i below n.
static inline void weighted_sum(int n, int taps, const float* weight, const float* in, int stride,
                                float* __restrict out) {
    int i = 0;
    for (; i + LANES <= n; i += LANES) {  // whole vectors
        Vector sum = {};
        for (int t = 0; t < taps; ++t) sum += weight[t] * *(const Vector*)(in + t * stride + i);
        *(Vector*)(out + i) = sum;
    }
    for (; i < n; ++i) {  // and what is left
        float sum = 0;
        for (int t = 0; t < taps; ++t) sum += weight[t] * in[t * stride + i];
        out[i] = sum;
    }
}

// One of the compilations defines this for all, so it allows for the most lanes.
#ifdef EMPSSL_BASELINE
int64_t patch_scratch_floats(const PatchJob& job) {
    const int64_t s = job.s;
    const int64_t for_axes = axis_floats(job.H, s) + axis_floats(job.W, s);
    const int64_t for_crop = for_axes + MOST_LANES * (job.W + 1) + job.H * s;
    const int64_t for_blur = (s + 2 * BLUR_RADIUS) * (s + 1);
    // The three planes, and beside them what the crop and then the blur need.
    return 3 * s * s + (for_crop > for_blur ? for_crop : for_blur);
}
#endif

// Across first, then down. Across, the crop is turned on its side, as many of its lines at a time
// as a vector has lanes, so that both ways an output is a sum of whole vectors.
static void crop(const PatchJob& job, int64_t image, const float* p, float* plane, float* memory) {
    const int s = (int)job.s;
    const int height = (int)p[HEIGHT];
    const int width = (int)p[WIDTH];

    const Axis down = make_axis(height, s, false, memory);
    memory += axis_floats(height, s);
    const Axis across = make_axis(width, s, p[FLIP] > 0, memory);
    float* columns = memory + axis_floats(width, s);  // (width, LANES): some lines, transposed
    float* resized = columns + LANES * width;         // (LANES,): a column of their output
    float* rows = resized + LANES;                    // (height, s): all lines, resized across

    const uint8_t* corner = job.images + image * job.stride_n + (int64_t)p[TOP] * job.stride_h +
                            (int64_t)p[LEFT] * job.stride_w;
    for (int c = 0; c < 3; ++c) {
        for (int y = 0; y < height; y += LANES) {
            const int lines = height - y < LANES ? height - y : LANES;
            for (int l = 0; l < lines; ++l) {
                const uint8_t* in = corner + c * job.stride_c + (y + l) * job.stride_h;
                for (int x = 0; x < width; ++x) columns[x * LANES + l] = in[x * job.stride_w];
            }
            // Lanes past the last line hold leftovers; what comes of them is not copied.
            for (int i = 0; i < width * LANES; ++i) columns[i] /= 255.0f;
            for (int x = 0; x < s; ++x) {
                weighted_sum(LANES, across.count[x], across.weight + x * across.taps,
                             columns + across.first[x] * LANES, LANES, resized);
                for (int l = 0; l < lines; ++l) rows[(int64_t)(y + l) * s + x] = resized[l];
            }
        }
        for (int y = 0; y < s; ++y) {
            weighted_sum(s, down.count[y], down.weight + y * down.taps,
                         rows + (int64_t)down.first[y] * s, s, plane + ((int64_t)c * s + y) * s);
        }
    }
}

// ---- colour and blur ----

// In as many sums side by side as there are lanes, since the compiler may not reorder a single one.
static float mean_grey(const float* r, const float* g, const float* b, int pixels) {
    float part[LANES] = {0};
    int i = 0;
    for (; i + LANES <= pixels; i += LANES)
        for (int l = 0; l < LANES; ++l) part[l] += grey_of(r[i + l], g[i + l], b[i + l]);
    double sum = 0;
    for (; i < pixels; ++i) sum += grey_of(r[i], g[i], b[i]);
    for (int l = 0; l < LANES; ++l) sum += part[l];
    return (float)(sum / pixels);
}

static void blur(float sigma, float* plane, int s, float* memory) {
    float weight[BLUR_TAPS];
    float total = 0;
    for (int t = 0; t < BLUR_TAPS; ++t) {
        weight[t] = blur_weight(sigma, t);
        total += weight[t];
    }
    for (int t = 0; t < BLUR_TAPS; ++t) weight[t] /= total;
    // What lies beyond the borders mirrors these rows, or columns.
    int above[BLUR_RADIUS];
    int below[BLUR_RADIUS];
    for (int i = 0; i < BLUR_RADIUS; ++i) {
        above[i] = reflected(i - BLUR_RADIUS, s);
        below[i] = reflected(i + s, s);
    }
    float* row = memory;                      // (s + 2 BLUR_RADIUS,): one row and its borders
    float* rows = row + s + 2 * BLUR_RADIUS;  // (s + 2 BLUR_RADIUS, s): blurred across, and borders
    float* inner = rows + BLUR_RADIUS * s;    // (s, s): those of rows that are no border
    const size_t bytes = sizeof(float) * (size_t)s;
    for (int c = 0; c < 3; ++c) {
        float* x = plane + c * s * s;
        // Across, row by row.
        for (int y = 0; y < s; ++y) {
            memcpy(row + BLUR_RADIUS, x + y * s, bytes);
            for (int i = 0; i < BLUR_RADIUS; ++i) {
                row[i] = x[y * s + above[i]];
                row[BLUR_RADIUS + s + i] = x[y * s + below[i]];
            }
            weighted_sum(s, BLUR_TAPS, weight, row, 1, inner + y * s);
        }
        // Down, all columns at once.
        for (int i = 0; i < BLUR_RADIUS; ++i) {
            memcpy(rows + i * s, inner + above[i] * s, bytes);
            memcpy(inner + (s + i) * s, inner + below[i] * s, bytes);
        }
        for (int y = 0; y < s; ++y) {
            weighted_sum(s, BLUR_TAPS, weight, rows + y * s, s, x + y * s);
        }
    }
}

// ---- store ----
// Rounded to the nearest, and to even where two are as near: adding just under half of the last
// place that is kept, or half where that place is odd, carries into it where it should.

static inline uint16_t to_bfloat16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return x != x ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline uint16_t to_float16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint32_t sign = (u >> 16) & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return (uint16_t)(sign | 0x7e00);   // NaN
    if (u >= 0x47800000) return (uint16_t)(sign | 0x7c00);  // 65536 and more become infinite
    if (u < 0x38800000) {
        // Below 2^-14 a float16 is a whole number of steps of 2^-24. Those are the steps of a float
        // from 1/2 to 1 as well, so adding 1/2 rounds, and leaves their number in the last bits.
        float magnitude, half = 0.5f;
        uint32_t bits, half_bits;
        memcpy(&magnitude, &u, 4);
        magnitude += half;
        memcpy(&bits, &magnitude, 4);
        memcpy(&half_bits, &half, 4);
        return (uint16_t)(sign | (bits - half_bits));
    }
    // 0xc8000000 takes 112 from the exponent, whose bias is 127 in a float and 15 in a float16.
    return (uint16_t)(sign | ((u + 0xc8000fff + ((u >> 13) & 1)) >> 13));
}

// From planes to channels-last.
template <typename Out, typename Convert>
static void store(const float* plane, int pixels, Out* out, Convert convert) {
    for (int i = 0; i < pixels; ++i) {
        for (int c = 0; c < 3; ++c) out[3 * i + c] = convert(plane[c * pixels + i]);
    }
}

// ---- a patch from crop to store ----

void JOIN(extract_patches_, VARIANT)(const PatchJob& job, int64_t from, int64_t to,
                                     float* scratch) {
    const int s = (int)job.s;
    const int pixels = s * s;
    float* plane = scratch;  // (3, s, s)
    float* memory = plane + 3 * pixels;
    for (int64_t patch = from; patch < to; ++patch) {
        const float* p = job.params + patch * K;
        crop(job, job.index[patch % job.b], p, plane, memory);

        float* __restrict r = plane;
        float* __restrict g = r + pixels;
        float* __restrict b = g + pixels;
        const auto each = [=](const auto& change) {
            for (int i = 0; i < pixels; ++i) {
                float red = r[i], green = g[i], blue = b[i];
                change(red, green, blue);
                r[i] = red;
                g[i] = green;
                b[i] = blue;
            }
        };
        recolour(p, each, [=] { return mean_grey(r, g, b, pixels); });
        if (p[SIGMA] > 0) blur(p[SIGMA], plane, s, memory);
        finish(p, each);

        const int64_t start = patch * 3 * pixels;
        if (job.out_type == OUT_FLOAT32) {
            store(plane, pixels, (float*)job.out + start, [](float x) { return x; });
        } else if (job.out_type == OUT_BFLOAT16) {
            store(plane, pixels, (uint16_t*)job.out + start, to_bfloat16);
        } else {
            store(plane, pixels, (uint16_t*)job.out + start, to_float16);
        }
    }
}
