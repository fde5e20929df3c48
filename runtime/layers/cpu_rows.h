// What stands between products and attention: the residual stream with its norm, and the gate.
//
// Letters: T rows, E width, F feed-forward units here.

#pragma once

#include "cpu_vectors.h"

namespace {

// h += delta; out = h / sqrt(mean(h^2) + eps), times the weight [E] if there is one, row by row
template <typename In, typename Out>
void add_rms(float *h, const In *delta, int T, int E, float eps, Out *out, const float *weight = nullptr) {
    for (int t = 0; t < T; t++, h += E, out += E) {
        Vec sums = Vec{};
        float sum = 0;
        int e = 0;
        for (; e + LANES <= E; e += LANES) {
            Vec x = load(h + e);
            if (delta) store(h + e, x += load(delta + size_t(t) * E + e));
            sums += x * x;
        }
        for (; e < E; e++) {
            if (delta) h[e] += widen(delta[size_t(t) * E + e]);
            sum += h[e] * h[e];
        }
        for (int i = 0; i < LANES; i++) sum += sums[i];
        const float factor = 1.0f / std::sqrt(sum / E + eps);
        if (weight) {
            for (e = 0; e + LANES <= E; e += LANES) store(out + e, load(h + e) * factor * load(weight + e));
            for (; e < E; e++) narrow(h[e] * factor * weight[e], out + e);
            continue;
        }
        for (e = 0; e + LANES <= E; e += LANES) store(out + e, load(h + e) * factor);
        for (; e < E; e++) narrow(h[e] * factor, out + e);
    }
}

// silu(gate) * up of units [from, to) of a row [gate F | up F]; from is a multiple of a vector
template <typename In, typename Out>
void gate(const In *gate_up, int F, int from, int to, Out *out) {
    const In *gate = gate_up, *up = gate_up + F;
    int f = from;
    for (; f + LANES <= to; f += LANES) {
        const Vec g = load(gate + f);
        const Vec low = exponential(g < 0.0f ? g : -g);  // e^-|g|: a sigmoid that cannot overflow
        store(out + f, g * ((g < 0.0f ? low : splat(1.0f)) / (low + 1.0f)) * load(up + f));
    }
    for (; f < to; f++) {
        const float g = widen(gate[f]);
        narrow(g / (1.0f + std::exp(-g)) * widen(up[f]), out + f);
    }
}

// the same for whole rows
template <typename In, typename Out>
void swiglu(const In *gate_up, int rows, int F, Out *out) {
    for (int t = 0; t < rows; t++) gate(gate_up + size_t(t) * 2 * F, F, 0, F, out + size_t(t) * F);
}

}  // namespace
