// The compiled kernels' C interface, called through ctypes (cpu_kernels.py). No headers but the compiler's: built in
// seconds. One thread: a rank has one core.

#include "cpu_attention.h"
#include "cpu_pass.h"
#include "cpu_products.h"
#include "cpu_rows.h"

extern "C" {

int pass_bytes() { return int(sizeof(Pass)); }
int stack_bytes() { return int(sizeof(Stack) + sizeof(Group) + sizeof(Layer)); }

void move_rows_f32(float *blocks, int64_t block_stride, int64_t tile_stride, int64_t unit_stride, int U, int D, int P,
                   const int32_t *from, const int32_t *to, int count) {
    move_rows(blocks, {block_stride, tile_stride, unit_stride}, U, D, P, from, to, count);
}
void move_rows_bf16(Bf16 *blocks, int64_t block_stride, int64_t tile_stride, int64_t unit_stride, int U, int D, int P,
                    const int32_t *from, const int32_t *to, int count) {
    move_rows(blocks, {block_stride, tile_stride, unit_stride}, U, D, P, from, to, count);
}

// by the types of heads, KV and context
#define ATTEND(name, In, Kv, Out)                                                                                    \
    void attend_##name(const Pass *pass, const In *qkv, Kv *blocks, int64_t block_stride, int64_t tile_stride,         \
                       int64_t unit_stride, int U, int G, int window, float scale, Out *context) {                     \
        attend(*pass, qkv, blocks, {block_stride, tile_stride, unit_stride}, U, G, window, scale, context);            \
    }
ATTEND(f32_f32_f32, float, float, float)
ATTEND(f32_f32_bf16, float, float, Bf16)
ATTEND(f32_bf16_bf16, float, Bf16, Bf16)
ATTEND(bf16_f32_bf16, Bf16, float, Bf16)
ATTEND(bf16_bf16_bf16, Bf16, Bf16, Bf16)

void add_rms_f32_f32(float *h, const float *delta, int T, int E, float eps, float *out) { add_rms(h, delta, T, E, eps, out); }
void add_rms_bf16_bf16(float *h, const Bf16 *delta, int T, int E, float eps, Bf16 *out) { add_rms(h, delta, T, E, eps, out); }
void add_rms_f32_bf16(float *h, const float *delta, int T, int E, float eps, Bf16 *out) {
    add_rms(h, delta, T, E, eps, out);
}
void swiglu_f32(const float *gate_up, int rows, int F, float *out) { swiglu(gate_up, rows, F, out); }
void swiglu_bf16(const Bf16 *gate_up, int rows, int F, Bf16 *out) { swiglu(gate_up, rows, F, out); }

// by the types of weights and KV
#define PASS(name, W, Kv)                                                                                              \
    void pass_##name(const Stack *stack, const Pass *pass, int form, float *h, float *delta, float *A) {               \
        whole_pass<W, Kv>(*stack, *pass, Form(form), h, delta, A);                                                     \
    }                                                                                                                  \
    void attention_##name(const Stack *stack, int group, const Pass *pass, float *h, const float *delta, int from,     \
                          int to, int summed, float *A) {                                                              \
        const W *x = normed<W>(*stack, pass->num_rows, h, delta);                                                      \
        attention<W, Kv>(*stack, stack->groups[group], *pass, x, from, to, summed != 0, A);                            \
    }
PASS(f32_f32, float, float)
PASS(bf16_bf16, Bf16, Bf16)
PASS(bf16_f32, Bf16, float)

// delta [T, E]: feed-forward blocks of layers [from, to) of a group over norm(h += A), summed
#define MLP(name, W)                                                                                                   \
    void mlp_##name(const Stack *stack, int group, int T, float *h, const float *A, int from, int to, float *delta) {  \
        const W *x = normed<W>(*stack, T, h, A);                                                                       \
        for (int l = from; l < to; l++) mlp(*stack, stack->groups[group].layers[l], T, x, l > from, delta);            \
    }
MLP(f32, float)
MLP(bf16, Bf16)

// y [T, O]
#define PRODUCT(name, W)                                                                                               \
    void product_##name(const Matrix *matrix, const W *x, int T, float *y) {                                           \
        product(x, matrix->inputs, T, *matrix, y, matrix->outputs, false);                                             \
    }
PRODUCT(f32, float)
PRODUCT(bf16, Bf16)
}
