// Pages of a pool to pages of the wire and back, and int8 for both (pages.py, codec.py).
//
// Letters: N pages, U heads, D head width. A tile of a head in the pool: key [D][16], value [16][D]; on the wire both
// are [16][D].

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace {

constexpr int PAGE = 16;
constexpr int VECTOR = 16;  // bytes

template <class T>
struct Lanes {
    typedef T Vec __attribute__((vector_size(VECTOR), aligned(1)));
};

#ifdef __clang__
#define SHUFFLE(Mask, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(Mask, a, b, ...) __builtin_shuffle(a, b, Mask{__VA_ARGS__})
#endif

typedef Lanes<uint16_t>::Vec Eight;
typedef Lanes<uint32_t>::Vec Four;

Eight low(Eight a, Eight b) { return SHUFFLE(Eight, a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
Eight high(Eight a, Eight b) { return SHUFFLE(Eight, a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
Four low(Four a, Four b) { return SHUFFLE(Four, a, b, 0, 4, 1, 5); }
Four high(Four a, Four b) { return SHUFFLE(Four, a, b, 2, 6, 3, 7); }

// from [rows][columns], to [columns][rows]. A square of lanes is turned by interleaving its upper with its lower half
// as often as halves can be halved.
template <class T>
void transpose(const T *from, T *to, int rows, int columns) {
    typedef typename Lanes<T>::Vec Vec;
    constexpr int N = VECTOR / sizeof(T);
    const int whole_rows = rows / N * N, whole_columns = columns / N * N;
    for (int r = 0; r < whole_rows; r += N) {
        for (int c = 0; c < whole_columns; c += N) {
            Vec a[N], b[N];
            for (int i = 0; i < N; i++) a[i] = *(const Vec *)(from + (r + i) * columns + c);
            for (int width = 1; width < N; width *= 2) {
                for (int i = 0; i < N / 2; i++) {
                    b[2 * i] = low(a[i], a[i + N / 2]);
                    b[2 * i + 1] = high(a[i], a[i + N / 2]);
                }
                for (int i = 0; i < N; i++) a[i] = b[i];
            }
            for (int i = 0; i < N; i++) *(Vec *)(to + (c + i) * rows + r) = a[i];
        }
    }
    for (int r = 0; r < rows; r++) {
        for (int c = r < whole_rows ? whole_columns : 0; c < columns; c++) to[c * rows + r] = from[r * columns + c];
    }
}

// Asks for memory before it is wanted: hardware looks ahead only to the end of a 4 KiB page.
void expect(const void *from, int64_t bytes) {
    const char *at = (const char *)from;
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(at + b);
}

// What is written is not looked at soon, so it goes past the caches where the processor lets it: a line that is
// written whole need not be read first. `to` is aligned to a vector.
template <class T>
void put(T *to, const T *from, int count) {
#ifdef __SSE2__
    constexpr int N = VECTOR / sizeof(T);
    int i = 0;
    for (; i + N <= count; i += N) _mm_stream_si128((__m128i *)(to + i), _mm_loadu_si128((const __m128i *)(from + i)));
    for (; i < count; i++) to[i] = from[i];
#else
    std::memcpy(to, from, count * sizeof(T));
#endif
}

void settle() {
#ifdef __SSE2__
    _mm_sfence();
#endif
}

constexpr int WIDEST = 512;  // heads wider than this are moved without a buffer

// pool: the first of U heads that lie side by side, in page 0; `stride` elements to the same in the next page.
template <class T>
void gather(const T *pool, int64_t stride, const int64_t *pages, int64_t N, int U, int D, T *out) {
    const int half = PAGE * D;
    for (int64_t n = 0; n < N; n++) {
        const T *from = pool + pages[n] * stride;
        for (int u = 0; u < U; u++, from += 2 * half, out += 2 * half) {
            const T *next = u + 1 < U ? from + 2 * half : n + 1 < N ? pool + pages[n + 1] * stride : from;
            expect(next, 2 * half * sizeof(T));
            transpose(from, out, D, PAGE);
            std::memcpy(out + half, from + half, half * sizeof(T));
        }
    }
}

template <class T>
void scatter(T *pool, int64_t stride, const int64_t *pages, int64_t N, int U, int D, const T *data) {
    const int half = PAGE * D;
    for (int64_t n = 0; n < N; n++) {
        T *to = pool + pages[n] * stride;
        for (int u = 0; u < U; u++, to += 2 * half, data += 2 * half) {
            if (D > WIDEST || (uintptr_t)to % VECTOR || D % (VECTOR / sizeof(T))) {
                transpose(data, to, PAGE, D);
                std::memcpy(to + half, data + half, half * sizeof(T));
                continue;
            }
            alignas(64) T keys[PAGE * WIDEST];
            transpose(data, keys, PAGE, D);
            put(to, keys, half);
            put(to + half, data + half, half);
        }
    }
    settle();
}

typedef uint16_t Bf16;

uint32_t wide_bits(Bf16 x) { return uint32_t(x) << 16; }
uint32_t wide_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
float widen(Bf16 x) {
    const uint32_t bits = wide_bits(x);
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
float widen(float x) { return x; }
template <class T>
T narrow(float x);
template <>
float narrow<float>(float x) { return x; }
template <>
Bf16 narrow<Bf16>(float x) {  // to nearest, ties to even
    const uint32_t bits = wide_bits(x);
    return Bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

constexpr int ROWS = 2 * PAGE;  // of a head in a page: one per token of K and of V
constexpr float SMALLEST = 0x1p-100f, LARGEST = 0x1p120f;

// rows [units][32][D], out [units] of scales [32], integers [32][D]. False for what int8 cannot carry.
template <class T>
bool quantise(const T *rows, int64_t units, int D, uint8_t *out) {
    const int32_t largest = int32_t(wide_bits(LARGEST));
    for (int64_t u = 0; u < units; u++, out += ROWS * (4 + D)) {
        int8_t *to = (int8_t *)out + ROWS * 4;
        for (int r = 0; r < ROWS; r++, rows += D, to += D) {
            int32_t top_bits = 0;  // magnitudes are ordered as their bits are, with infinity and NaN above all
            for (int d = 0; d < D; d++) {
                const int32_t bits = int32_t(wide_bits(rows[d]) & 0x7fffffff);
                top_bits = bits > top_bits ? bits : top_bits;
            }
            if (top_bits >= largest) return false;
            float top;
            std::memcpy(&top, &top_bits, 4);
            const bool zero = top < SMALLEST;
            const float scale = zero ? 0 : top / 127.0f, inverse = zero ? 0 : 127.0f / top;
            std::memcpy(out + r * 4, &scale, 4);
            for (int d = 0; d < D; d++) to[d] = int8_t(int32_t(std::rint(widen(rows[d]) * inverse)));
        }
    }
    return true;
}

template <class T>
void restore(const uint8_t *in, int64_t units, int D, T *__restrict rows) {
    for (int64_t u = 0; u < units; u++, in += ROWS * (4 + D)) {
        const int8_t *__restrict from = (const int8_t *)in + ROWS * 4;
        for (int r = 0; r < ROWS; r++, rows += D, from += D) {
            float scale;
            std::memcpy(&scale, in + r * 4, 4);
            for (int d = 0; d < D; d++) rows[d] = narrow<T>(float(from[d]) * scale);
        }
    }
}

}  // namespace

extern "C" {

#define MOVES(name, T)                                                                                                 \
    void gather_##name(const T *pool, int64_t stride, const int64_t *pages, int64_t N, int U, int D, T *out) {         \
        gather(pool, stride, pages, N, U, D, out);                                                                     \
    }                                                                                                                  \
    void scatter_##name(T *pool, int64_t stride, const int64_t *pages, int64_t N, int U, int D, const T *data) {       \
        scatter(pool, stride, pages, N, U, D, data);                                                                   \
    }

#define INT8(name, T)                                                                                                  \
    int quantise_##name(const T *rows, int64_t units, int D, uint8_t *out) { return quantise(rows, units, D, out); }   \
    void restore_##name(const uint8_t *in, int64_t units, int D, T *rows) { restore(in, units, D, rows); }

MOVES(2, uint16_t)
MOVES(4, uint32_t)
INT8(bfloat16, Bf16)
INT8(float32, float)
}
