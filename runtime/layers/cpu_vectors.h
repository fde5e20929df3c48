// Vectors of sixteen floats, and what is loaded into them and stored from them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

typedef float Vec __attribute__((vector_size(64), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4)));
constexpr int LANES = 16;

typedef uint16_t Bf16;

float widen(Bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
float widen(float x) { return x; }

void narrow(float x, Bf16 *out) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    *out = Bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
void narrow(float x, float *out) { *out = x; }

typedef uint16_t Halves __attribute__((vector_size(32), aligned(2)));
typedef uint32_t Words __attribute__((vector_size(64)));

Vec load(const float *from) { return *(const Vec *)from; }
Vec load(const Bf16 *from) {
    Words bits = __builtin_convertvector(*(const Halves *)from, Words) << 16;
    Vec out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}
void store(float *to, Vec v) { *(Vec *)to = v; }
void store(Bf16 *to, Vec v) {
    Words bits;
    std::memcpy(&bits, &v, sizeof bits);
    *(Halves *)to = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
}
Vec splat(float x) { return Vec{} + x; }

// All lanes of a vector folded into one.
template <typename F>
float fold(Vec v, F &&both) {
    typedef float Half __attribute__((vector_size(32)));
    typedef float Quarter __attribute__((vector_size(16)));
    Half a, b;
    std::memcpy(&a, &v, 32), std::memcpy(&b, (const char *)&v + 32, 32);
    const Half half = both(a, b);
    Quarter c, d;
    std::memcpy(&c, &half, 16), std::memcpy(&d, (const char *)&half + 16, 16);
    const Quarter quarter = both(c, d);
    return both(both(quarter[0], quarter[2]), both(quarter[1], quarter[3]));
}
inline float largest(Vec v) {
    return fold(v, [](auto a, auto b) { return a > b ? a : b; });
}
inline float total(Vec v) {
    return fold(v, [](auto a, auto b) { return a + b; });
}

// e^x for x <= 0, to about 2 ulp: 2^n by the exponent's bits, the rest by a polynomial on [-ln2/2, ln2/2].
Vec exponential(Vec x) {
    x = x < -87.0f ? splat(-87.0f) : x;
    Vec scaled = x * 1.44269504088896341f;
    Ints n = __builtin_convertvector(scaled + (scaled < 0.0f ? splat(-0.5f) : splat(0.5f)), Ints);
    Vec whole = __builtin_convertvector(n, Vec);
    Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    Ints bits = (n + 127) << 23;
    Vec power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

template <typename F>
void by_count(int Q, F &&run) {  // a loop whose bound the compiler knows, for every tile size
    switch (Q) {
        case 1: run(std::integral_constant<int, 1>{}); break;
        case 2: run(std::integral_constant<int, 2>{}); break;
        case 3: run(std::integral_constant<int, 3>{}); break;
        case 4: run(std::integral_constant<int, 4>{}); break;
        case 5: run(std::integral_constant<int, 5>{}); break;
        case 6: run(std::integral_constant<int, 6>{}); break;
        case 7: run(std::integral_constant<int, 7>{}); break;
        default: run(std::integral_constant<int, 8>{}); break;
    }
}

}  // namespace
