// A pass of a few rows through a model's layers in one call: between products as small as these, a library's own call,
// and Python's around it, take longer than the product.
//
// Letters: T rows, E width, U attention units of a group here, G query heads per unit, D head width, F feed-forward
// units of a layer here, L layers of a group.
//
//     group     U units in all; layer l has those from first_unit on
//     exact     for each layer:  A = attention(norm(h += delta));  delta = mlp(norm(h += A))
//     grouped   all layers' attention from one norm(h += delta), then, as runtime/spec/layer_parallel.py says:
//               `attention`  for each layer:  delta = mlp(norm(h += delta + A_l))
//               `block`      h += sum A_l;    delta = sum mlp_l(norm(h))

#pragma once

#include "cpu_attention.h"
#include "cpu_products.h"
#include "cpu_rows.h"

struct Layer {
    Matrix qkv;      // [units * (G + 2) * D, E]
    Matrix out;      // [E, units * G * D]
    Matrix gate_up;  // [2F, E]
    Matrix down;     // [E, F]
    int32_t first_unit, num_units;
};

struct Group {
    const Layer *layers;
    void *blocks;  // the group's KV
    int64_t block_stride, tile_stride, unit_stride;
    int32_t num_layers, num_units, queries, window;
};

enum Form : int32_t { EXACT, ATTENTION, BLOCK };

struct Stack {
    const Group *groups;
    int32_t num_groups, width;
    float eps, scale;
};

namespace {

// Where a pass keeps what is on its way; as large as the largest so far.
template <typename W>
struct Room {
    std::vector<W> x, context, active;
    std::vector<float> qkv, gate_up;
};

template <typename W>
Room<W> &room() {
    static thread_local Room<W> own;
    return own;
}

template <typename T>
T *at_least(std::vector<T> &values, size_t size) {
    if (values.size() < size) values.resize(size);
    return values.data();
}

// A [L or 1, T, E]: attention of layers [from, to) of a group over x [T, E], each alone or, if `summed`, all in one.
template <typename W, typename Kv>
void attention(const Stack &stack, const Group &group, const Pass &pass, const W *x, int from, int to, bool summed,
               float *A) {
    Room<W> &own = room<W>();
    const int T = pass.num_rows, D = pass.head_dim, G = group.queries, E = stack.width;
    int first = 0, U = 0;  // a rank may hold no unit of a layer
    for (int l = from; l < to; l++) {
        if (U == 0) first = group.layers[l].first_unit;
        U += group.layers[l].num_units;
    }
    const int64_t heads = int64_t(U) * (G + 2) * D, mixed = int64_t(U) * G * D;
    float *qkv = at_least(own.qkv, T * heads);
    W *context = at_least(own.context, T * mixed);
    // where a layer's heads begin among those of all: queries, key, value in qkv; queries in context
    const auto place = [&](int l) { return int64_t(group.layers[l].num_units ? group.layers[l].first_unit - first : 0); };
    for (int l = from; l < to; l++) product(x, E, T, group.layers[l].qkv, qkv + place(l) * (G + 2) * D, heads, false);
    if (U > 0)
        attend(pass, qkv, (Kv *)group.blocks + first * group.unit_stride,
               {group.block_stride, group.tile_stride, group.unit_stride}, U, G, group.window, stack.scale, context);
    for (int l = from; l < to; l++) {
        float *into = A + (summed ? 0 : int64_t(l - from) * T * E);
        product(context + place(l) * G * D, mixed, T, group.layers[l].out, into, E, summed && l > from);
    }
}

template <typename W>
void mlp(const Stack &stack, const Layer &layer, int T, const W *x, bool add, float *delta) {
    Room<W> &own = room<W>();
    const int F = layer.down.inputs;
    float *gate_up = at_least(own.gate_up, size_t(T) * 2 * F);
    W *active = at_least(own.active, size_t(T) * F);
    product(x, stack.width, T, layer.gate_up, gate_up, 2 * F, false);
    swiglu(gate_up, T, F, active);
    product(active, F, T, layer.down, delta, stack.width, add);
}

template <typename W>
W *normed(const Stack &stack, int T, float *h, const float *delta) {
    W *x = at_least(room<W>().x, size_t(T) * stack.width);
    add_rms(h, delta, T, stack.width, stack.eps, x);
    return x;
}

// The whole stack on one rank. h [T, E] changes; delta [T, E], to be added to it, is set; A [most layers, T, E] is
// room.
template <typename W, typename Kv>
void whole_pass(const Stack &stack, const Pass &pass, Form form, float *h, float *delta, float *A) {
    const int T = pass.num_rows;
    const float *last = nullptr;
    for (const Group *group = stack.groups; group < stack.groups + stack.num_groups; group++) {
        const int L = group->num_layers;
        if (form == EXACT || L == 1) {
            for (int l = 0; l < L; l++) {
                attention<W, Kv>(stack, *group, pass, normed<W>(stack, T, h, last), l, l + 1, true, A);
                mlp(stack, group->layers[l], T, normed<W>(stack, T, h, A), false, delta);
                last = delta;
            }
            continue;
        }
        attention<W, Kv>(stack, *group, pass, normed<W>(stack, T, h, last), 0, L, form == BLOCK, A);
        if (form == BLOCK) {
            const W *x = normed<W>(stack, T, h, A);
            for (int l = 0; l < L; l++) mlp(stack, group->layers[l], T, x, l > 0, delta);
        } else {
            for (int l = 0; l < L; l++) {
                float *A_l = A + int64_t(l) * T * stack.width;
                if (l > 0)
                    for (int64_t i = 0; i < int64_t(T) * stack.width; i++) A_l[i] += delta[i];
                mlp(stack, group->layers[l], T, normed<W>(stack, T, h, A_l), false, delta);
            }
        }
        last = delta;
    }
}

}  // namespace
