// test_cuda_update.h: the rounded weights after AdamW, against the definition of each rounding.
// Part of test_cuda.cu.
#ifndef TEST_CUDA_UPDATE_H
#define TEST_CUDA_UPDATE_H

// Over all random bits the mean is x itself, to the last bit; only the two neighbours occur, and
// only x if it is exact in bf16.
void test_cuda_round_at_random(void) {
    static const float some[] = {0, -0.0f, 1, -1.5f, 3.14159265f, -0.02f, 1e-40f, -1e30f,
                                 0x1.fffffep-1f, 0x1.fdfffep3f};
    enum { SOME = sizeof some / sizeof some[0], ALL_BITS = 1 << 16 };
    for (int k = 0; k < SOME + 20; k++) {
        const double random = uniform01(rng_words(1, STREAM_TEST, (uint64_t)k, 0, 0).v[0]) - 0.5;
        const float x = k < SOME ? some[k] : (float)ldexp(random, k);
        float least = INFINITY, most = -INFINITY;
        double sum = 0;
        for (uint32_t bits = 0; bits < ALL_BITS; bits++) {
            const float y = round_at_random(x, bits);
            EXPECT(y == to_float(from_float<bf16>(y)), "%a is no number of bf16", (double)y);
            least = fminf(least, y), most = fmaxf(most, y);
            sum += (double)y;
        }
        EXPECT(sum / ALL_BITS == (double)x, "%a: the mean is %a", (double)x, sum / ALL_BITS);
        EXPECT(x == to_float(from_float<bf16>(x)) ? least == x && most == x : least < x && x < most,
               "%a becomes %a to %a", (double)x, (double)least, (double)most);
        EXPECT(fabs((double)most - (double)least) <= fmax(fabs((double)x) / 128, 0x1p-133),
               "%a becomes %a to %a", (double)x, (double)least, (double)most);
    }
    for (uint32_t bits = 0; bits < ALL_BITS; bits += 0xffff)
        EXPECT(round_at_random(INFINITY, bits) == INFINITY && round_at_random(-INFINITY, bits) ==
               -INFINITY &&
               isnan(round_at_random(NAN, bits)), "what is not finite changes with bits %x", bits);
}

static Model *update_model(const GptConfig *c, int rounding) {
    EngineArgs args;
    memset(&args, 0, sizeof args);
    args.B = 1, args.T = 2, args.dtype = DTYPE_BF16, args.bound = MemoryBound{c->L, c->L, 2 * c->L};
    args.rounding = rounding, args.seed = 5;
    return model_open(c, &args);
}

// The rounded elements of one tensor.
static float *update_copy(const Model *m, int p, int l) {
    return host_floats(&m->gpu, m->copy + param_offset(m, p, l), gpt_param_size(&m->config, p), 1);
}

// One update with step counts t, always from the same weights and gradients.
static void update_once(Model *m, const int64_t *t) {
    const GptConfig *c = &m->config;
    const UpdateArgs args = {1e-2, 0.9, 0.95, 1e-8, 0.1, 0, t, 0, 0};
    for (int p = 0; p < N_PARAMS; p++)
        for (int l = 0; l < gpt_param_layers(c, p); l++) {
            float *w = numbers(2 * p, gpt_param_size(c, p)),
                *dw = numbers(2 * p + 1, gpt_param_size(c, p));
            model_write(m, SLOT_PARAM, p, l, w);
            model_write(m, SLOT_GRAD, p, l, dw);
            free(w), free(dw);
        }
    model_update(m, &args);
}

// The expected rounding of weights x with t AdamW steps behind them.
static float rounded(const Model *m, float x, int p, int l, size_t i, int64_t t) {
    if (m->args.rounding == ROUNDING_NEAREST || t == 0) return to_float(from_float<bf16>(x));
    const Philox bits = rng_words(m->args.seed, STREAM_ROUND, (uint64_t)t,
                                  (uint32_t)p | (uint32_t)l << 8, (uint32_t)(i / 4));
    return round_at_random(x, bits.v[i % 4] >> 16);
}

// Both roundings, with rows that are multiples of 4 elements or not; then a model whose weights
// were written, as by a resumed run.
void test_cuda_update_rounds(void) {
    static const GptConfig configs[] = {{300, 5, 2, 2, 64}, {11, 3, 2, 2, 10}};     // V T L NH C
    const int64_t t[5] = {3, 0, 5, 1LL << 33, 3};
    for (const GptConfig &c : configs)
        for (int rounding = ROUNDING_NEAREST; rounding <= ROUNDING_STOCHASTIC; rounding++) {
            Model *m = update_model(&c, rounding), *again = update_model(&c, rounding);
            // copy - weight in units of bf16's last place: sum and count
            double off = 0, units = 0;
            int wrong = 0, differ = 0;
            update_once(m, t);
            for (int p = 0; p < N_PARAMS; p++)
                for (int l = 0; l < gpt_param_layers(&c, p); l++) {
                    const size_t n = gpt_param_size(&c, p);
                    const int64_t step = t[gpt_branch_index(&m->config, l, gpt_param[p].branch)];
                    float *x = (float *)xcalloc(n, sizeof *x), *copy = update_copy(m, p, l);
                    model_read(m, SLOT_PARAM, p, l, x);
                    model_write(again, SLOT_PARAM, p, l, x);
                    for (size_t i = 0; i < n; i++) {
                        wrong += copy[i] != rounded(m, x[i], p, l, i, step);
                        differ += copy[i] != to_float(from_float<bf16>(x[i]));
                        if (x[i] == 0 || step == 0) continue;
                        int exponent;
                        frexp((double)x[i], &exponent);
                        off += ldexp((double)copy[i] - (double)x[i], 8 - exponent), units++;
                    }
                    free(x), free(copy);
                }
            EXPECT(!wrong, "rounding %d: %d wrong", rounding, wrong);
            if (rounding) {
                EXPECT(differ > 0.2 * units, "%d of %.0f are not the nearest", differ, units);
                EXPECT(fabs(off / units) < 5 * 0.5 / sqrt(units),
                       "%.0f numbers are off by %g units in the mean", units, off / units);
            }
            model_resumed(again, t);
            for (int p = 0; p < N_PARAMS; p++)
                for (int l = 0; l < gpt_param_layers(&c, p); l++) {
                    float *want = update_copy(m, p, l), *got = update_copy(again, p, l);
                    EXPECT(!memcmp(want, got, gpt_param_size(&c, p) * sizeof *got),
                           "rounding %d: parameter %d of layer %d has other bits after a resume",
                           rounding, p, l);
                    free(want), free(got);
                }
            model_close(m), model_close(again);
        }
}

#endif
