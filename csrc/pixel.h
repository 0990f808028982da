// What the CPU and the CUDA kernel share: what describes a patch, the taps and weights of its
// filters, its colour operations and their order. Their loops over pixels are their own.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define EMPSSL_FN __host__ __device__ __forceinline__
#else
#define EMPSSL_FN static inline
#endif

// The K columns of a patch's parameters; empssl_support.pixels.COLUMNS has the same order.
enum {
    TOP,
    LEFT,
    HEIGHT,
    WIDTH,
    FLIP,
    BRIGHTNESS,
    CONTRAST,
    SATURATION,
    HUE,
    ORDER,
    GREY,
    SIGMA,
    SOLARIZE,
    K
};

enum { BLUR_RADIUS = 6, BLUR_TAPS = 2 * BLUR_RADIUS + 1 };

// Whether the crop is whole pixels inside its H x W image, and the order, cut to a whole number, a
// code. False for NaN.
EMPSSL_FN bool patch_is_valid(const float* p, int64_t H, int64_t W) {
    return p[TOP] >= 0 && p[LEFT] >= 0 && p[HEIGHT] >= 1 && p[WIDTH] >= 1 &&
           p[TOP] + p[HEIGHT] <= (float)H && p[LEFT] + p[WIDTH] <= (float)W &&
           p[TOP] == floorf(p[TOP]) && p[LEFT] == floorf(p[LEFT]) &&
           p[HEIGHT] == floorf(p[HEIGHT]) && p[WIDTH] == floorf(p[WIDTH]) &&
           p[ORDER] >= 0 && p[ORDER] < 24;
}

// A factor that is NaN must make its patch NaN, but on a GPU clamp01 turns NaN into 0. So it is
// added at the end, where pixels x are scaled to 2 x + offset: the offset is -1, or NaN where a
// factor is NaN or infinite, since infinity minus itself is NaN. (The reference clamps an infinite
// one's pixels.)
EMPSSL_FN float offset_of(const float* p) {
    const float b = p[BRIGHTNESS];
    const float c = p[CONTRAST];
    const float s = p[SATURATION];
    const float h = p[HUE];
    return (b - b) + (c - c) + (s - s) + (h - h) - 1;
}

// ---- crop and resize ----
// A resize by the antialiased triangle filter. Output pixel i of s lies at (i + 1/2) length / s of
// the crop. It reads input pixels [first, first + count), the t-th of them weighted by
// 1 - |start + t step|, over the sum of these weights.

struct Taps {
    int first, count;
    float start, inverse_sum;
};

EMPSSL_FN float tap_step(int length, int s) { return length > s ? (float)s / (float)length : 1.0f; }

EMPSSL_FN float tap_weight(float start, float step, int t) {
    return 1 - fabsf(start + (float)t * step);
}

// Places are counted in units of 1 / (2 s) of an input pixel. Then every edge and centre is a whole
// number, so that which pixels are read is exact. Int must hold 4 s length.
template <typename Int>
EMPSSL_FN Taps taps_of(int i, int length, int s) {
    const Int unit = 2 * (Int)s;  // the width of an input pixel
    const Int centre = (2 * (Int)i + 1) * length;
    const Int support = 2 * (Int)(length > s ? length : s);  // half the width of the triangle

    // Input pixel j has its centre at unit j + s, and counts where unit j lies between these two.
    const Int from = centre - support - s;
    const Int to = centre + support - s;
    const Int first = from < 0 ? 0 : from / unit + 1;
    const Int end = (to - 1) / unit + 1;

    Taps taps;
    taps.first = (int)first;
    taps.count = (int)((end < length ? end : length) - first);
    taps.start = (float)(unit * first + s - centre) / (float)support;
    const float step = tap_step(length, s);
    float sum = 0;
    for (int t = 0; t < taps.count; ++t) sum += tap_weight(taps.start, step, t);
    taps.inverse_sum = 1 / sum;
    return taps;
}

// ---- colour ----

EMPSSL_FN float clamp01(float x) {
#ifdef __CUDA_ARCH__
    return __saturatef(x);  // free, as part of the operation before it
#else
    return x < 0 ? 0.0f : x > 1 ? 1.0f : x;
#endif
}

// ITU-R 601 luma, torchvision's weights.
EMPSSL_FN float grey_of(float r, float g, float b) { return 0.2989f * r + 0.587f * g + 0.114f * b; }

EMPSSL_FN float blend(float x, float other, float factor) {
    return clamp01(factor * x + (1 - factor) * other);
}

// A shift of the hue as `rotate_hue` wants it: in sixths of the colour circle, in [-3, 3).
EMPSSL_FN float hue_sixths(float shift) { return 6 * (shift - floorf(shift + 0.5f)); }

// One channel after the hue has been turned. It falls below the value, the highest channel, by its
// share of the chroma: clamp01(2 - distance), where the distance is that round the circle from the
// hue to the one at which this channel is lowest. All is times chroma, so that nothing is divided;
// |from_lowest| is at most 9 chroma.
EMPSSL_FN float hue_channel(float value, float chroma, float from_lowest) {
    const float one_way = fabsf(from_lowest);
    const float other_way = fabsf(one_way - 6 * chroma);
    const float left = 2 * chroma - (one_way < other_way ? one_way : other_way);
    const float share = left < 0 ? 0.0f : left > chroma ? chroma : left;
    return value - share;
}

// Through HSV and back: the value, max(r, g, b), and the chroma, max - min, stay as they are while
// the hue turns by `sixths` of the circle.
EMPSSL_FN void rotate_hue(float& r, float& g, float& b, float sixths) {
    float high = r > g ? r : g;
    float low = r < g ? r : g;
    high = high > b ? high : b;
    low = low < b ? low : b;
    const float chroma = high - low;

    // Before the turn the hue is 0 at red, 2 at green and 4 at blue. `hue` is the one after it,
    // times the chroma: in [-4, 8) chroma.
    const bool red = high == r;
    const bool green = high == g;
    const float difference = red ? g - b : green ? b - r : r - g;
    const float turned = sixths + (red ? 0.0f : green ? 2.0f : 4.0f);
    const float hue = turned * chroma + difference;

    // Red is lowest at a hue of 3, green at 5, or -1, and blue at 1.
    r = hue_channel(high, chroma, hue - 3 * chroma);
    g = hue_channel(high, chroma, hue + chroma);
    b = hue_channel(high, chroma, hue - chroma);
}

EMPSSL_FN float solarized(float x) { return x >= (float)(128.0 / 255.0) ? 1 - x : x; }

// The four operations of an order, a code from 0 to 23 as itertools.permutations(range(4)) counts:
// four bits for each operation, the first one lowest.
EMPSSL_FN unsigned unpack_order(int code) {
    unsigned left = 0x3210;  // the operations that have no place yet, in rising order
    unsigned order = 0;
    for (int place = 0; place < 4; ++place) {
        // As many codes share an operation here as there are orders of those that follow it.
        const int block = place == 0 ? 6 : place == 1 ? 2 : 1;
        const int shift = 4 * (code / block);
        code %= block;
        order |= (left >> shift & 15) << 4 * place;
        // Take it out of those that are left.
        left = (left & ((1u << shift) - 1)) | left >> (shift + 4) << shift;
    }
    return order;
}

// Jitter, its four operations in the patch's own order, and grey. each(change) applies
// change(r, g, b) to every pixel of the patch, and mean_grey() is the mean luma of them all.
template <typename Each, typename Mean>
EMPSSL_FN void recolour(const float* p, const Each& each, const Mean& mean_grey) {
    unsigned order = unpack_order((int)p[ORDER]);
    for (int step = 0; step < 4; ++step, order >>= 4) {
        const int operation = order & 15;
        if (operation == 0 && p[BRIGHTNESS] != 1) {
            const float factor = p[BRIGHTNESS];
            each([=](float& r, float& g, float& b) {
                r = clamp01(factor * r);
                g = clamp01(factor * g);
                b = clamp01(factor * b);
            });
        } else if (operation == 1 && p[CONTRAST] != 1) {
            const float factor = p[CONTRAST];
            const float mean = mean_grey();
            each([=](float& r, float& g, float& b) {
                r = blend(r, mean, factor);
                g = blend(g, mean, factor);
                b = blend(b, mean, factor);
            });
        } else if (operation == 2 && p[SATURATION] != 1) {
            const float factor = p[SATURATION];
            each([=](float& r, float& g, float& b) {
                const float grey = grey_of(r, g, b);
                r = blend(r, grey, factor);
                g = blend(g, grey, factor);
                b = blend(b, grey, factor);
            });
        } else if (operation == 3 && p[HUE] != 0) {
            const float sixths = hue_sixths(p[HUE]);
            each([=](float& r, float& g, float& b) { rotate_hue(r, g, b, sixths); });
        }
    }
    if (p[GREY] > 0) each([](float& r, float& g, float& b) { r = g = b = grey_of(r, g, b); });
}

// Solarize, and scale to [-1, 1].
template <typename Each>
EMPSSL_FN void finish(const float* p, const Each& each) {
    const float offset = offset_of(p);
    if (p[SOLARIZE] > 0) {
        each([](float& r, float& g, float& b) {
            r = solarized(r);
            g = solarized(g);
            b = solarized(b);
        });
    }
    each([=](float& r, float& g, float& b) {
        r = 2 * r + offset;
        g = 2 * g + offset;
        b = 2 * b + offset;
    });
}

// ---- blur ----

// Where a tap that falls outside s pixels reads: mirrored about the border pixels, as often as
// needed.
EMPSSL_FN int reflected(int i, int s) {
    if (i >= 0 && i < s) return i;
    if (s == 1) return 0;
    const int period = 2 * (s - 1);
    i %= period;
    if (i < 0) i += period;
    return i < s ? i : period - i;
}

// The weight of tap t, before they are divided by their sum. What is below 1e-26 is 0, so that
// hardly any product is a denormal number, which is slow.
EMPSSL_FN float blur_weight(float sigma, int t) {
    const float x = (float)(t - BLUR_RADIUS) / sigma;
    const float half = 0.5f * x * x;
    return half < 60 ? expf(-half) : 0.0f;
}
