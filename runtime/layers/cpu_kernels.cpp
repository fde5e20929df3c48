// The compiled kernels' C interface, called through ctypes (cpu_kernels.py). No headers but the compiler's: built in
// seconds.

#include "cpu_attention.h"
#include "cpu_chain.h"
#include "cpu_pass.h"
#include "cpu_products.h"
#include "cpu_rows.h"

extern "C" {

int pass_bytes() { return int(sizeof(Pass)); }
int stack_bytes() { return int(sizeof(Stack) + sizeof(Group) + sizeof(Layer) + sizeof(Ranks) + sizeof(Ends)); }
int chain_bytes() { return int(sizeof(Chain)); }

Team *new_team(int size) { return new Team(size); }
void end_team(Team *team) { delete team; }

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
        attend(*pass, qkv, blocks, {block_stride, tile_stride, unit_stride}, {0, U, U}, G, window, scale, context);    \
    }
ATTEND(f32_f32_f32, float, float, float)
ATTEND(f32_f32_bf16, float, float, Bf16)
ATTEND(f32_bf16_bf16, float, Bf16, Bf16)
ATTEND(bf16_f32_bf16, Bf16, float, Bf16)
ATTEND(bf16_bf16_bf16, Bf16, Bf16, Bf16)

// by the types of delta and of what comes out
#define ADD_RMS(name, In, Out)                                                                                         \
    void add_rms_##name(float *h, const In *delta, int T, int E, float eps, Out *out, const float *weight) {           \
        add_rms(h, delta, T, E, eps, out, weight);                                                                     \
    }
ADD_RMS(f32_f32, float, float)
ADD_RMS(bf16_bf16, Bf16, Bf16)
ADD_RMS(f32_bf16, float, Bf16)
void swiglu_f32(const float *gate_up, int rows, int F, float *out) { swiglu(gate_up, rows, F, out); }
void swiglu_bf16(const Bf16 *gate_up, int rows, int F, Bf16 *out) { swiglu(gate_up, rows, F, out); }

// by the types of weights and KV
#define PASS(name, W, Kv)                                                                                              \
    void pass_##name(Team *team, const Stack *stack, const Ends *ends, const Pass *pass, int form,                     \
                     const int64_t *token_ids, float *h, float *delta, float *A) {                                     \
        together<W, Kv>(*team, *stack, *pass, [&](const auto &run) {                                                   \
            run.embed(*ends, token_ids, h);                                                                            \
            run.whole(Form(form), h, delta, A, &ends->head);                                                           \
        });                                                                                                            \
    }                                                                                                                  \
    void attention_##name(Team *team, const Stack *stack, int group, const Pass *pass, float *h, const float *delta,   \
                          int from, int to, int summed, float *A) {                                                    \
        together<W, Kv>(*team, *stack, *pass, [&](const auto &run) {                                                   \
            run.norm(h, delta);                                                                                        \
            run.attention(stack->groups[group], from, to, summed != 0, A);                                             \
        });                                                                                                            \
    }                                                                                                                  \
    /* delta [T, E]: feed-forward blocks of layers [from, to) of a group over norm(h += A), summed */                  \
    void mlp_##name(Team *team, const Stack *stack, int group, const Pass *pass, float *h, const float *A, int from,   \
                    int to, float *delta) {                                                                            \
        together<W, Kv>(*team, *stack, *pass, [&](const auto &run) {                                                   \
            run.norm(h, A);                                                                                            \
            for (int l = from; l < to; l++) run.mlp(stack->groups[group].layers[l], l > from, delta);                  \
        });                                                                                                            \
    }                                                                                                                  \
    void choose_##name(Team *team, const Stack *stack, const Ends *ends, int T, float *h, const float *factors,        \
                       const int32_t *keys, int32_t *token_ids) {                                                      \
        choose<W, Kv>(*team, *stack, *ends, T, h, {factors, keys}, token_ids);                                         \
    }                                                                                                                  \
    void chain_##name(Team *team, const Stack *stack, const Ends *ends, const Chain *chain) {                          \
        draft_on<W, Kv>(*team, *stack, *ends, *chain);                                                                 \
    }
PASS(f32_f32, float, float)
PASS(bf16_bf16, Bf16, Bf16)
PASS(bf16_f32, Bf16, float)

// y [T, O]
#define PRODUCT(name, W)                                                                                               \
    void product_##name(Team *team, const Matrix *matrix, const W *x, int T, float *y) {                               \
        team->run([&](int index) {                                                                                     \
            const auto part = Member{*team, index}.part(num_tiles(*matrix));                                           \
            product(x, matrix->inputs, T, *matrix, y, matrix->outputs, false, part.from, part.to);                     \
        });                                                                                                            \
    }
PRODUCT(f32, float)
PRODUCT(bf16, Bf16)
}
