// extract_patches on a CPU: one patch after another in planes of floats that stay in the cache. Compiled once for each
// instruction set, named by VARIANT; the compiler vectorises the loops over a row or a plane.
#include <string.h>

#include "empssl.h"
#include "pixel.h"

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)

// A resize along one axis: output i reads `taps` inputs from first[i] on, weighted by weight[t * s + i].
struct Axis {
    int taps;
    int* first;
    float* weight;
};

static inline int most_taps(int64_t length, int64_t s) {
    int64_t support = (length + s - 1) / s;
    int64_t taps = 2 * (support < 1 ? 1 : support) + 1;
    return (int)(taps < length ? taps : length);
}

static Axis make_axis(int length, int s, bool flip, float* memory) {
    Axis axis{most_taps(length, s), (int*)memory, memory + s};
    memset(axis.weight, 0, sizeof(float) * (size_t)axis.taps * (size_t)s);
    for (int i = 0; i < s; ++i) {
        Taps t = taps_of(i, length, s);
        int column = flip ? s - 1 - i : i;
        int first = t.first + axis.taps <= length ? t.first : length - axis.taps;
        float sum = 0;
        for (int j = t.first; j < t.last; ++j) sum += triangle(t, j);
        for (int j = t.first; j < t.last; ++j) axis.weight[(j - first) * s + column] = triangle(t, j) / sum;
        axis.first[column] = first;
    }
    return axis;
}

static inline int64_t axis_floats(int64_t length, int64_t s) { return s + (int64_t)most_taps(length, s) * s; }

#ifdef EMPSSL_BASELINE
int64_t patch_scratch_floats(const PatchJob& job) {
    int64_t plane = job.s * job.s;
    int64_t axes = axis_floats(job.H, job.s) + axis_floats(job.W, job.s);
    return 4 * plane + axes + job.W + job.s + 2 * BLUR_RADIUS;
}
#endif

static void crop(const PatchJob& job, int64_t image, const float* p, float* plane, float* memory) {
    const int s = (int)job.s, height = (int)p[HEIGHT], width = (int)p[WIDTH];
    Axis down = make_axis(height, s, false, memory);
    memory += axis_floats(height, s);
    Axis across = make_axis(width, s, p[FLIP] > 0, memory);
    float* row = memory + axis_floats(width, s);                                    // (width,)
    const uint8_t* corner = job.images + image * job.stride_n + (int64_t)p[TOP] * job.stride_h + (int64_t)p[LEFT] * job.stride_w;
    for (int c = 0; c < 3; ++c) {
        for (int y = 0; y < s; ++y) {
            memset(row, 0, sizeof(float) * (size_t)width);
            for (int t = 0; t < down.taps; ++t) {
                const float w = down.weight[t * s + y];
                if (w == 0) continue;
                const uint8_t* in = corner + c * job.stride_c + (down.first[y] + t) * job.stride_h;
                if (job.stride_w == 1)
                    for (int x = 0; x < width; ++x) row[x] += w * in[x];
                else
                    for (int x = 0; x < width; ++x) row[x] += w * in[x * job.stride_w];
            }
            float* out = plane + (c * s + y) * s;
            for (int x = 0; x < s; ++x) out[x] = across.weight[x] * row[across.first[x]];
            for (int t = 1; t < across.taps; ++t)
                for (int x = 0; x < s; ++x) out[x] += across.weight[t * s + x] * row[across.first[x] + t];
            for (int x = 0; x < s; ++x) out[x] /= 255.0f;
        }
    }
}

static float mean_grey(const float* r, const float* g, const float* b, int pixels) {
    enum { LANES = 16 };
    float part[LANES] = {0};
    int i = 0;
    for (; i + LANES <= pixels; i += LANES)
        for (int l = 0; l < LANES; ++l) part[l] += grey_of(r[i + l], g[i + l], b[i + l]);
    double sum = 0;
    for (; i < pixels; ++i) sum += grey_of(r[i], g[i], b[i]);
    for (int l = 0; l < LANES; ++l) sum += part[l];
    return (float)(sum / pixels);
}

static void jitter(const float* p, float* __restrict r, float* __restrict g, float* __restrict b, int pixels) {
    int order[4];
    unpack_order((int)p[ORDER], order);
    for (int step = 0; step < 4; ++step) {
        if (order[step] == 0 && p[BRIGHTNESS] != 1) {
            const float f = p[BRIGHTNESS];
            for (int i = 0; i < pixels; ++i) {
                r[i] = clamp01(f * r[i]);
                g[i] = clamp01(f * g[i]);
                b[i] = clamp01(f * b[i]);
            }
        } else if (order[step] == 1 && p[CONTRAST] != 1) {
            const float f = p[CONTRAST], mean = mean_grey(r, g, b, pixels);
            for (int i = 0; i < pixels; ++i) {
                r[i] = blend(r[i], mean, f);
                g[i] = blend(g[i], mean, f);
                b[i] = blend(b[i], mean, f);
            }
        } else if (order[step] == 2 && p[SATURATION] != 1) {
            const float f = p[SATURATION];
            for (int i = 0; i < pixels; ++i) {
                const float grey = grey_of(r[i], g[i], b[i]);
                r[i] = blend(r[i], grey, f);
                g[i] = blend(g[i], grey, f);
                b[i] = blend(b[i], grey, f);
            }
        } else if (order[step] == 3 && p[HUE] != 0) {
            const float sixths = hue_sixths(p[HUE]);
            for (int i = 0; i < pixels; ++i) {
                float R = r[i], G = g[i], B = b[i];
                rotate_hue(R, G, B, sixths);
                r[i] = R;
                g[i] = G;
                b[i] = B;
            }
        }
    }
}

static void blur(float sigma, float* plane, int s, float* spare, float* padded) {
    float weight[BLUR_TAPS];
    blur_taps(sigma, weight);
    for (int c = 0; c < 3; ++c) {
        float* x = plane + c * s * s;
        for (int y = 0; y < s; ++y) {                                               // along the rows, into spare
            for (int i = 0; i < s + 2 * BLUR_RADIUS; ++i) padded[i] = x[y * s + reflected(i - BLUR_RADIUS, s)];
            float* out = spare + y * s;
            for (int i = 0; i < s; ++i) out[i] = weight[0] * padded[i];
            for (int t = 1; t < BLUR_TAPS; ++t)
                for (int i = 0; i < s; ++i) out[i] += weight[t] * padded[i + t];
        }
        for (int y = 0; y < s; ++y) {                                               // down the columns, back
            float* out = x + y * s;
            memset(out, 0, sizeof(float) * (size_t)s);
            for (int t = 0; t < BLUR_TAPS; ++t) {
                const float* in = spare + reflected(y + t - BLUR_RADIUS, s) * s;
                for (int i = 0; i < s; ++i) out[i] += weight[t] * in[i];
            }
        }
    }
}

static inline uint16_t to_bfloat16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return x != x ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

static inline uint16_t to_float16(float x) {            // round to nearest even; |x| is at most about 1
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint32_t sign = (u >> 16) & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (u >= 0x47800000) return (uint16_t)(sign | 0x7c00);
    if (u < 0x38800000) {                               // subnormal: the adder rounds at the right bit
        float magnitude, half = 0.5f;
        uint32_t bits, half_bits;
        memcpy(&magnitude, &u, 4);
        magnitude += half;
        memcpy(&bits, &magnitude, 4);
        memcpy(&half_bits, &half, 4);
        return (uint16_t)(sign | (bits - half_bits));
    }
    return (uint16_t)(sign | ((u + 0xc8000fff + ((u >> 13) & 1)) >> 13));
}

template <typename Out, typename Convert>
static void store(const float* plane, int pixels, Out* out, Convert convert) {
    for (int i = 0; i < pixels; ++i)
        for (int c = 0; c < 3; ++c) out[3 * i + c] = convert(plane[c * pixels + i] * 2 - 1);
}

void JOIN(extract_patches_, VARIANT)(const PatchJob& job, int64_t from, int64_t to, float* scratch) {
    const int s = (int)job.s, pixels = s * s;
    float *plane = scratch, *spare = plane + 3 * pixels, *memory = spare + pixels;
    for (int64_t patch = from; patch < to; ++patch) {
        const float* p = job.params + patch * K;
        crop(job, job.index[patch % job.b], p, plane, memory);
        float *r = plane, *g = r + pixels, *b = g + pixels;
        jitter(p, r, g, b, pixels);
        if (p[GREY] > 0)
            for (int i = 0; i < pixels; ++i) r[i] = g[i] = b[i] = grey_of(r[i], g[i], b[i]);
        if (p[SIGMA] > 0) blur(p[SIGMA], plane, s, spare, memory);
        if (p[SOLARIZE] > 0)
            for (int i = 0; i < 3 * pixels; ++i) plane[i] = solarized(plane[i]);
        const int64_t start = patch * 3 * pixels;
        if (job.out_type == OUT_FLOAT32)
            store(plane, pixels, (float*)job.out + start, [](float x) { return x; });
        else if (job.out_type == OUT_BFLOAT16)
            store(plane, pixels, (uint16_t*)job.out + start, to_bfloat16);
        else
            store(plane, pixels, (uint16_t*)job.out + start, to_float16);
    }
}
