// selfcheck.h: two optimizer steps of a tiny model on the engine in use, compared with stored
// values. Finds a miscompiled program or a faulty machine before training starts.
//
// The stored values come from the CPU engine in double precision, which dev/golden and finite
// differences verify:
//
//     make test REAL=double                                  # compares them to 1e-9
//     SELFCHECK=1 build/double/test_gpt numbers_selfcheck    # prints the tables below
//
// Two values are stored per tensor: its norm, and its dot product with random signs, which an error
// in any element changes. Inputs are made with exact operations only, so every machine starts from
// the same bits.
#ifndef SELFCHECK_H
#define SELFCHECK_H

#include "../model/engine.h"
#include "comm.h"

// Sizes that leave remainders of what engines process at once: vectors of 16, tiles of 4 to 48,
// tiles of 64 tokens, panels of 768 terms (the vocabulary), chunks of 2^14 weights.
static const GptConfig selfcheck_config = {803, 67, 2, 2, 72};
enum { SELFCHECK_B = 2, SELFCHECK_T = 67, SELFCHECK_L = 2, SELFCHECK_MICRO = 3,
       SELFCHECK_PLACES = 4 + 12 * SELFCHECK_L,
       SELFCHECK_WORDS = 16 };                           // streams beside those of the parameters

// Losses of the three micro-batches and at the end, and the norms of both updates; for every
// tensor, layer by layer in the order of GPT_PARAMS, norm and signed sum of the first step's
// gradient and of the change made by both updates.
typedef struct { double norm, sum; } SelfcheckTensor;
typedef struct {
    double loss[SELFCHECK_MICRO + 1], norm[2];
    SelfcheckTensor gradient[SELFCHECK_PLACES], change[SELFCHECK_PLACES];
} Selfcheck;

static const Selfcheck selfcheck_numbers = {
    {10.128232998, 10.3918790302, 12.1598322501, 9.32246289687}, {5.96723015194, 3.64666605909},
    {{1.11553909611, 1.03677580342}, {0.328686266304, 0.250010263946},
     {0.0713994847484, 0.0441182409845},
     {0.223174874468, 0.150516163078}, {0.180738121221, -0.0709619957141},
     {0.331885147982, 0.189338057964},
     {0.703980276993, 0.098182975363}, {2.0516720995, 0.0846790673829},
     {0.190080925329, -0.105508427139},
     {0.360874260165, -0.544108065441}, {0.691036541824, 0.354273215041},
     {2.55695489954, -0.136982638478},
     {0.183480311165, 0.287279649718}, {0.362197717394, -0.351746516255},
     {0.109318738535, -0.0472663777684},
     {0.0967242332662, -0.108473969768}, {0.271567297528, 0.348980291752},
     {0.0893854259124, -0.0229053648738},
     {1.32582885568, -3.2821914504}, {0.739116874725, -0.27185318797},
     {0.288305529893, -0.136391713254},
     {0.0907456043007, -0.0623108860721}, {3.96840267904, -3.29735631135},
     {1.54980083328, -1.23340157546},
     {0.506678542045, -0.168772939617}, {0.128712961811, 0.039373896179},
     {0.849094481439, 0.950477455453},
     {0.602557382857, -0.507871128926}},
    {{1.41836589226, 0.366228112747}, {0.39161043506, -0.378306551025},
     {0.00590968270165, -0.00368023055152},
     {0.0277004339557, -0.023757193381}, {0.0147271388618, 0.00585971336072},
     {0.0490565318513, -0.0497831945969},
     {0.15719879039, 0.295381635629}, {0.396828900577, 0.218804793454},
     {0.0155133372995, 0.00863681292738},
     {0.0525115549644, 0.0817277419744}, {0.102641281402, -0.0647741623171},
     {0.348246643348, 0.0120414336624},
     {0.0149409280399, -0.0233954074571}, {0.0481273821577, 0.0500449487194},
     {0.00901124888461, 0.0038503514437},
     {0.0172858804295, 0.00843952971957}, {0.0219072807172, -0.0283440275631},
     {0.0171844999428, 0.0130600842132},
     {0.201348415993, 0.308607866637}, {0.360314973884, 0.786040154102},
     {0.0235789185578, 0.0108144566559},
     {0.0171770537403, 0.00927462443884}, {0.327066799106, 0.240419586607},
     {0.318254268281, 0.165573207805},
     {0.0393373241415, 0.01419109588}, {0.0241675789872, -0.0124183648635},
     {0.15216412158, -0.219056900036},
     {0.0776488347931, 0.0720525699764}}
};

// The tolerance relative to a tensor's norm: about eight times the largest error seen on CPUs and
// the emulated GPU, since other machines sum in another order; wrong arithmetic is usually off by 1
// or more. Largest errors: fp32 3.4e-5, because weights of size 1 that change by 1e-3 round that
// change to 2^-14; bf16 1.5e-2 and tf32 1.3e-3, whose operand roundings of 2^-9 and 2^-11
// accumulate over about ten matmuls.
static inline double selfcheck_tolerance(int dtype) {
    if (dtype == DTYPE_BF16) return 0x1p-3;
    if (dtype == DTYPE_TF32) return 0x1p-6;
    return sizeof(real) == 8 ? 1e-9 : 0x1p-12;
}

// A value in (-1, 1), exact in fp32.
static inline double selfcheck_uniform(uint64_t what, uint32_t a, uint32_t b) {
    return ((double)(rng_words(7, STREAM_TEST, what, a, b).v[0] >> 8) + 0.5) * 0x1p-23 - 1;
}

// Far from GPT-2's initial weights, so that no part of a gradient is small: matmul outputs are
// about 1.
static inline void selfcheck_weights(real *w, int p, int l) {
    const GptConfig *c = &selfcheck_config;
    const int small = gpt_param[p].branch == NO_BRANCH || gpt_param[p].dims == 1;
    const double size = small ? 0.5 : sqrt(3.0 / gpt_param_rows(c, p));
    for (size_t i = 0; i < gpt_param_size(c, p); i++)
        w[i] = (real)(float)((gpt_param[p].init == INIT_ONE) + size * selfcheck_uniform((uint64_t)p,
            (uint32_t)l, (uint32_t)i));
}

static inline SelfcheckTensor selfcheck_tensor(const real *x, const real *minus, size_t n) {
    SelfcheckTensor t = {0, 0};
    for (size_t i = 0; i < n; i++) {
        const double d = (double)x[i] - (minus ? (double)minus[i] : 0);
        t.norm += d * d;
        t.sum += rng_words(7, STREAM_TEST, SELFCHECK_WORDS, 0, (uint32_t)i).v[0] & 1 ? d : -d;
    }
    t.norm = sqrt(t.norm);
    return t;
}

// Every tensor of a slot, or the change of the weights.
static inline void selfcheck_read(SelfcheckTensor *to, const Engine *e, Model *m, Slot slot) {
    const GptConfig *c = &selfcheck_config;
    for (int p = 0, n = 0; p < N_PARAMS; p++)
        for (int l = 0; l < gpt_param_layers(c, p); l++) {
            const size_t size = gpt_param_size(c, p);
            real *now = (real *)xcalloc(2 * size, sizeof *now), *before = now + size;
            e->read(m, slot, p, l, now);
            if (slot == SLOT_PARAM) selfcheck_weights(before, p, l);
            to[n++] = selfcheck_tensor(now, before, size);
            free(now);
        }
}

// The plans: by row; by branch, with one that runs all its rows; tied, with a layer that no row of
// the step reaches.
static inline void selfcheck_plan(DropPlan *plan, int micro) {
    enum { BRANCH = 2 * SELFCHECK_L };
    static const struct { int tied; unsigned char kept[BRANCH][SELFCHECK_B]; double scale[BRANCH];
                          } plans[] = {
        {0, {{1, 0}, {1, 1}, {1, 1}, {0, 1}}, {1.25, 1, 1, 1.5}},
        {0, {{0, 0}, {1, 1}, {1, 1}, {0, 0}}, {1, 1.25, 1.5, 1}},
        {1, {{0, 0}, {0, 0}, {0, 1}, {0, 1}}, {1, 1, 1.25, 1.25}}};
    plan->batch = SELFCHECK_B;
    plan->tied = plans[micro].tied;
    for (int i = 0; i < BRANCH; i++)
        drop_plan_keep(plan, i, plans[micro].kept[i], SELFCHECK_B, plans[micro].scale[i]);
}

// Runs both steps on this engine. args: its dtype, threads, recompute, and comm, which only selects
// the device.
static inline void selfcheck_run(Selfcheck *s, const Engine *e, EngineArgs args) {
    enum { BT = SELFCHECK_B * SELFCHECK_T };
    const GptConfig *c = &selfcheck_config;
    const Comm alone = {0, 1, args.comm ? args.comm->local_rank : 0, NULL};
    int tokens[BT], targets[BT];
    DropPlan plan = drop_plan_new(c->L, SELFCHECK_B);
    args.B = SELFCHECK_B, args.T = SELFCHECK_T, args.comm = &alone, args.zero = 0;
    args.bound.attn_rows = args.bound.mlp_rows = c->L * SELFCHECK_B,
        args.bound.rows = 2 * c->L * SELFCHECK_B;
    Model *m = engine_open(e, c, &args);
    for (int p = 0; p < N_PARAMS; p++)
        for (int l = 0; l < gpt_param_layers(c, p); l++) {
            real *w = (real *)xcalloc(gpt_param_size(c, p), sizeof *w);
            selfcheck_weights(w, p, l);
            e->write(m, SLOT_PARAM, p, l, w);
            free(w);
        }
    for (int micro = 0; micro <= SELFCHECK_MICRO; micro++) {
        for (int i = 0; i < BT; i++) {
            const Philox word = rng_words(7, STREAM_TEST, SELFCHECK_WORDS + 1, (uint32_t)micro,
                                          (uint32_t)i);
            tokens[i] = (int)(word.v[0] % (uint32_t)c->V),
                targets[i] = (int)(word.v[1] % (uint32_t)c->V);
        }
        if (micro == SELFCHECK_MICRO) {
            drop_plan_keep_all(&plan, NULL, 0, SELFCHECK_B);
            s->loss[micro] = engine_forward(e, m, SELFCHECK_T, tokens, targets, &plan);
            break;
        }
        selfcheck_plan(&plan, micro);
        s->loss[micro] = engine_forward_backward(e, m, SELFCHECK_T, tokens, targets, &plan,
                                                 micro < 2 ? 0.5 : 1);
        if (micro == 0) continue;                        // the first step has two micro-batches
        if (micro == 1) selfcheck_read(s->gradient, e, m, SLOT_GRAD);
        const int64_t first[] = {1, 1, 1, 1, 1}, second[] = {0, 0, 2, 2, 2};
        // eps is of the order of the gradients, so that rounding does not decide the direction of
        // small ones
        const UpdateArgs update = {0.1, 0.9, 0.95, 0.1, 0.1, 0.5, micro == 1 ? first : second, 0,
                                   0};
        s->norm[micro - 1] = e->update(m, &update);
    }
    selfcheck_read(s->change, e, m, SLOT_PARAM);
    e->close(m);
    drop_plan_free(&plan);
}

// Keeps the largest excess over the tolerance; `what` is from malloc. NaN exceeds everything.
typedef struct { double tolerance, worst; char *what; } SelfcheckError;

static inline void selfcheck_compare(SelfcheckError *e, double got, double want, double size,
                                     const char *kind, const char *name) {
    const double off = fabs(got - want) / size;
    if (off <= e->worst) return;
    free(e->what);
    e->worst = isnan(off) ? INFINITY : off;
    e->what = xprintf("%s%s is %.9g instead of %.9g, off by %.1e (allowed: %.1e)", kind, name, got,
                      want, off, e->tolerance);
}

// NULL, or an error message from malloc; *worst (may be NULL) is the largest relative error.
static inline char *selfcheck_judge(const Selfcheck *got, const Selfcheck *want, int dtype,
                                    double *worst) {
    const GptConfig *c = &selfcheck_config;
    SelfcheckError e = {selfcheck_tolerance(dtype), 0, NULL};
    const double *x = got->loss, *y = want->loss;
    for (int i = 0; i <= SELFCHECK_MICRO; i++)
        selfcheck_compare(&e, x[i], y[i], y[i], "the loss", "");
    for (int i = 0; i < 2; i++)
        selfcheck_compare(&e, got->norm[i], want->norm[i], want->norm[i], "the gradient's norm",
                          "");
    for (int p = 0, n = 0; p < N_PARAMS; p++)
        for (int l = 0; l < gpt_param_layers(c, p); l++, n++) {
            char *name = gpt_param_name(p, l);
            for (int k = 0; k < 2; k++) {
                const SelfcheckTensor is = (k ? got->change : got->gradient)[n];
                const SelfcheckTensor should = (k ? want->change : want->gradient)[n];
                const char *kind = k ? "the update of " : "the gradient of ";
                selfcheck_compare(&e, is.norm, should.norm, should.norm, kind, name);
                selfcheck_compare(&e, is.sum, should.sum, should.norm, kind, name);
            }
            free(name);
        }
    if (worst) *worst = e.worst;
    if (e.worst > e.tolerance) return e.what;
    free(e.what);
    return NULL;
}

#endif
