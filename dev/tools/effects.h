// effects.h: the effect of dropping a branch on the loss, estimated from a training run itself:
// each micro-batch is an experiment in which drop path left some branches out. An ordinary least
// squares regression of the micro-batches' losses on the dropped units, after detrending both.
//
//     y_m = trend(t) + sum_i z_mi e_i + noise
//     z_mi: the share of micro-batch m's rows that dropped unit i
//
// The trend is the mean over a centred window of 101 steps, shorter at the ends. It is subtracted
// from both y and z, so that a linear trend and rates that change with the step cause no bias
// (Frisch and Waugh 1933; Lovell 1963).
//
// Effects are centred: e_i minus the mean of all. The design often cannot identify their level:
// with batch units and systematic sampling the number of dropped units is constant if the rates add
// up to an integer, so adding a constant to all effects changes no y_m. An effect is identified if
// its contrast is orthogonal to every direction in which the design has no variance.
#ifndef EFFECTS_H
#define EFFECTS_H

#include "../run/metrics.h"
#include "../run/options.h"
#include "../model/drop_path.h"

enum { EFFECTS_WINDOW = 101 };
#define EFFECTS_CONDITION 1e8 // of the normal equations with a unit diagonal

typedef struct {
    int units; // 2L branches, or L blocks if they are dropped whole
    int64_t observations, steps;
    double *effect, *error; // (units) centred, and standard errors; NaN: not identified
    double *rate; // (units) the share of rows that dropped them
    double condition; // largest over smallest eigenvalue; infinite: singular
    int level; // whether the mean of the effects is identified
    double mean, mean_error; // if so, over all units that were ever dropped
    double noise;                                        // standard deviation of the residuals
    int recorded; // micro-batches' own losses; 0: means of steps
} Effects;

static inline void effects_free(Effects *e) { free(e->effect), free(e->error), free(e->rate); }

// ---- Eigenvalues of a symmetric matrix, by Jacobi's rotations ----

// a (n,n) becomes diagonal, v (n,n) its eigenvectors as columns. Golub and Van Loan, Matrix
// Computations, 8.5.
static inline void effects_eigen(double *a, double *v, int n) {
    for (int i = 0; i < n * n; i++) v[i] = i % (n + 1) == 0;
    for (int sweep = 0; sweep < 60; sweep++) {
        double off = 0, all = 0;
        for (int i = 0; i < n; i++)
            for (int j = 0; j < n; j++)
                all += a[i * n + j] * a[i * n + j], off += i == j ? 0 : a[i * n + j] * a[i * n + j];
        if (off <= 1e-32 * all) return;
        for (int p = 0; p < n; p++)
            for (int q = p + 1; q < n; q++) {
                if (a[p * n + q] == 0) continue;
                const double theta = (a[q * n + q] - a[p * n + p]) / (2 * a[p * n + q]);
                const double t = (theta < 0 ? -1 : 1) / (fabs(theta) + sqrt(theta * theta + 1));
                const double c = 1 / sqrt(t * t + 1), s = t * c;
                for (int k = 0; k < n; k++) {
                    const double x = a[k * n + p], y = a[k * n + q], g = v[k * n + p],
                                 h = v[k * n + q];
                    a[k * n + p] = c * x - s * y, a[k * n + q] = s * x + c * y;
                    v[k * n + p] = c * g - s * h, v[k * n + q] = s * g + c * h;
                }
                for (int k = 0; k < n; k++) {
                    const double x = a[p * n + k], y = a[q * n + k];
                    a[p * n + k] = c * x - s * y, a[q * n + k] = s * x + c * y;
                }
            }
    }
}

// ---- The observations: losses y (n) and shares dropped z (n,k), of steps that have begin[s] ..
// begin[s+1]-1 ----

typedef struct {
    int k;
    int64_t n, steps, room;
    double *y;
    float *z;
    int64_t *begin;                                      // (steps + 1)
} EffectsData;

static inline void effects_data_free(EffectsData *d) { free(d->y), free(d->z), free(d->begin); }

// Subtracts from each observation the mean over the surrounding steps: as many before as after, at
// most 50, each step's mean first. y and z are changed in place; z is then small and centred around
// 0.
static inline void effects_detrend(EffectsData *d) {
    const int k1 = d->k + 1;
    double *mean =
        (double *)xcalloc((size_t)d->steps * (size_t)k1, sizeof *mean); // per step: y, then z
    double *sum = (double *)xcalloc((size_t)k1, sizeof *sum);
    for (int64_t s = 0; s < d->steps; s++) {
        const int64_t from = d->begin[s], end = d->begin[s + 1];
        double *at = mean + s * k1;
        for (int64_t i = from; i < end; i++) {
            at[0] += d->y[i] / (double)(end - from);
            for (int j = 0; j < d->k; j++)
                at[1 + j] += (double)d->z[i * d->k + j] / (double)(end - from);
        }
    }
    int64_t low = 0, high = 0; // sum covers steps low .. high-1; both only increase
    for (int64_t s = 0; s < d->steps; s++) {
        const int64_t near = s < d->steps - 1 - s ? s : d->steps - 1 - s;
        const int64_t half = near < EFFECTS_WINDOW / 2 ? near : EFFECTS_WINDOW / 2;
        for (; high <= s + half; high++)
            for (int j = 0; j < k1; j++) sum[j] += mean[high * k1 + j];
        for (; low < s - half; low++)
            for (int j = 0; j < k1; j++) sum[j] -= mean[low * k1 + j];
        for (int64_t i = d->begin[s]; i < d->begin[s + 1]; i++) {
            d->y[i] -= sum[0] / (double)(high - low);
            for (int j = 0; j < d->k; j++)
                d->z[i * d->k + j] =
                    (float)((double)d->z[i * d->k + j] - sum[1 + j] / (double)(high - low));
        }
    }
    free(mean), free(sum);
}

// The centred effects of the n units in `use`, from G = z'z (k,k), b = z'y (k) and y'y. G is scaled
// to a unit diagonal: e_i = x_i / d_i.
static inline void effects_solve(Effects *e, const EffectsData *data, const int *use, int n,
                                 const double *G, const double *b, double yy, const double *d) {
    double *a = (double *)xcalloc((size_t)n * (size_t)n, sizeof *a),
           *v = (double *)xcalloc((size_t)n * (size_t)n, sizeof *v);
    double *x = (double *)xcalloc((size_t)n, sizeof *x), most = 0, least = INFINITY, fitted = 0;
    int rank = 0;
    memcpy(a, G, (size_t)n * (size_t)n * sizeof *a);
    effects_eigen(a, v, n);
    for (int j = 0; j < n; j++) most = fmax(most, a[j * n + j]), least = fmin(least, a[j * n + j]);
    e->condition = least > 0 ? most / least : INFINITY;
    for (int j = 0; j < n; j++) {                        // the minimum-norm solution
        double along = 0;
        if (a[j * n + j] * EFFECTS_CONDITION < most) continue;
        for (int i = 0; i < n; i++) along += v[i * n + j] * b[i];
        for (int i = 0; i < n; i++) x[i] += v[i * n + j] * along / a[j * n + j];
        fitted += along * along / a[j * n + j];
        rank++;
    }
    const double freedom = (double)(data->n - rank) - (double)data->steps / EFFECTS_WINDOW;
    const double noise = freedom > 0 && yy > fitted ? (yy - fitted) / freedom : 0;
    e->noise = sqrt(noise);
    // contrast i: w = (1_i - 1/n) / d; w'x is estimable if w lies in the span of the directions
    // with variance
    for (int i = 0; i <= n; i++) {                       // n: the mean of all
        double value = 0, variance = 0, length = 0, lost = 0;
        for (int k = 0; k < n; k++) {
            const double w = ((i == n ? 0 : k == i) + (i == n ? 1.0 : -1.0) / n) / d[k];
            value += w * x[k], length += w * w;
        }
        for (int j = 0; j < n; j++) {
            double along = 0;
            for (int k = 0; k < n; k++)
                along += v[k * n + j] * ((i == n ? 0 : k == i) + (i == n ? 1.0 : -1.0) / n) / d[k];
            if (a[j * n + j] * EFFECTS_CONDITION < most) lost += along * along;
            else variance += along * along * noise / a[j * n + j];
        }
        const int known = freedom > 0 && lost <= 1e-6 * length;
        if (i < n)
            e->effect[use[i]] = known ? value : NAN,
            e->error[use[i]] = known ? sqrt(variance) : NAN;
        else
            e->level = known, e->mean = known ? value : NAN,
            e->mean_error = known ? sqrt(variance) : NAN;
    }
    free(a), free(v), free(x);
}

// The effects from the observations, which are consumed. Free with effects_free.
static inline Effects effects_estimate(EffectsData *d) {
    const int k = d->k;
    Effects e = {k, d->n, d->steps, NULL, NULL, NULL, INFINITY, 0, NAN, NAN, NAN, 0};
    double *gram = (double *)xcalloc((size_t)k * (size_t)k, sizeof *gram),
           *b = (double *)xcalloc((size_t)k, sizeof *b), yy = 0;
    double *scale = (double *)xcalloc((size_t)k, sizeof *scale);
    int *use = (int *)xcalloc((size_t)k, sizeof *use), n = 0;
    e.effect = (double *)xcalloc((size_t)k, sizeof *e.effect);
    e.error = (double *)xcalloc((size_t)k, sizeof *e.error);
    e.rate = (double *)xcalloc((size_t)k, sizeof *e.rate);
    for (int64_t i = 0; i < d->n; i++)
        for (int j = 0; j < k; j++) e.rate[j] += (double)d->z[i * k + j] / (double)d->n;
    effects_detrend(d);
    for (int64_t i = 0; i < d->n; i++) {
        const float *z = d->z + i * k;
        yy += d->y[i] * d->y[i];
        for (int p = 0; p < k; p++) {
            b[p] += (double)z[p] * d->y[i];
            for (int q = 0; q <= p; q++) gram[p * k + q] += (double)z[p] * (double)z[q];
        }
    }
    for (int p = 0; p < k; p++) {
        e.effect[p] = e.error[p] = NAN;
        if (gram[p * k + p] > 1e-9 * (double)d->n) use[n] = p, scale[n++] = sqrt(gram[p * k + p]);
    }
    double *G = (double *)xcalloc((size_t)n * (size_t)n + 1, sizeof *G);
    for (int p = 0; p < n; p++) {
        b[p] = b[use[p]] / scale[p]; // use[p] >= p: no element is overwritten before it is read
        for (int q = 0; q < n; q++) {
            const int row = use[p] > use[q] ? use[p] : use[q],
                      col = use[p] > use[q] ? use[q] : use[p];
            G[p * n + q] = gram[row * k + col] / (scale[p] * scale[q]);
        }
    }
    if (n) effects_solve(&e, d, use, n, G, b, yy, scale);
    free(gram), free(b), free(scale), free(use), free(G);
    return e;
}

// ---- From a run's files ----

// A run's settings of its plans, from its config.txt. Returns NULL, or from malloc what is wrong.
typedef struct { int layers, batch, branches, sampling, unit; int64_t total_batch; } EffectsRun;

static inline char *effects_read_run(EffectsRun *r, const char *config, size_t size,
                                     const char *path, int layers) {
    TrainOptions t;
    Options o;
    options_init(&o, "");
    options_add(&o, train_options(), &t);
    char *error = options_config(&o, config, size, FROM_CONFIG, path);
    r->layers = layers, r->batch = (int)t.batch;
    r->branches = t.drop_branches, r->sampling = t.drop_sampling, r->unit = t.drop_unit;
    options_free(&o);
    return error;
}

// Adds the micro-batches of one step. Returns NULL, or what is wrong with its plan.
static inline const char *effects_add_step(EffectsData *d, const EffectsRun *run, const Metrics *r,
                                           DropPlan *plan, const DropPath *policy) {
    const double loss = !isnan(r->nll) ? r->nll : r->loss;
    int micros = 1, apart = r->micros > 0;
    for (const char *s = r->plan; *s; s++) micros += *s == ' ';
    if (apart && r->micros != micros)
        return "it has another number of losses of micro-batches than of plans";
    const int64_t first = d->n;
    for (int m = 0; m < micros; m++) {
        const double y = apart ? r->micro[m] : loss;
        const char *error = drop_plan_read(plan, policy, 0, r->plan, m, run->batch);
        if (error) return error;
        // without losses of their own, they form one observation
        const int append = apart || m == 0;
        if (append && d->n + 1 > d->room) {
            d->room = 2 * d->room + 64;
            d->y = (double *)xrealloc(d->y, (size_t)d->room, sizeof *d->y);
            d->z = (float *)xrealloc(d->z, (size_t)d->room * (size_t)d->k, sizeof *d->z);
        }
        if (append)
            d->y[d->n++] = y, memset(d->z + (d->n - 1) * d->k, 0, (size_t)d->k * sizeof *d->z);
        for (int i = 0; i < d->k; i++) {
            const BranchPlan *b = &plan->branch[i * (BRANCHES * run->layers / d->k)];
            d->z[(d->n - 1) * d->k + i] +=
                (float)(1 - (double)b->n / run->batch) / (float)(apart ? 1 : micros);
        }
        if (apart && !isfinite(y)) d->n--;               // a step with a loss that is not finite
    }
    if (!apart && !isfinite(loss)) d->n = first;
    if (d->n > first) d->begin[++d->steps] = d->n;
    return NULL;
}

// The observations of the log's last `last` steps that have a plan. Returns NULL, or what is wrong,
// with the record in *at.
static inline const char *effects_read(EffectsData *d, const EffectsRun *run, const MetricsLog *log,
                                       int64_t last, int64_t *at) {
    DropPath policy;
    DropPlan plan = drop_plan_new(run->layers, run->batch);
    const char *error = NULL;
    memset(&policy, 0, sizeof policy);
    memset(d, 0, sizeof *d);
    policy.layers = run->layers, policy.branches = run->branches, policy.steps = 1;
    d->k = (run->branches == BRANCHES_TIED ? 1 : BRANCHES) * run->layers;
    d->begin = (int64_t *)xcalloc((size_t)log->n + 1, sizeof *d->begin);
    for (int64_t i = log->n > last ? log->n - last : 0; i < log->n && !error; i++) {
        *at = i;
        if (log->record[i].plan) error = effects_add_step(d, run, &log->record[i], &plan, &policy);
    }
    drop_plan_free(&plan);
    return error;
}

#endif
