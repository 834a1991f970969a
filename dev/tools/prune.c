// prune.c: permanently removes layers from a checkpoint and writes the rest as a plain GPT-2 for
// transformers, generate, evaluate and --init-from.
//
//     # the three that cost least; the given ones; three, by a linear map; and training the rest
//     build/prune runs/gpt/latest --out runs/gpt-9 --n 3 --val 'data/text/val_*.bin'
//     build/prune runs/gpt/latest --out runs/gpt-9 --drop 7-9
//     build/prune runs/gpt/latest --out runs/gpt-9 --n 3 --select replace --method replace ...
//     build/train_gpt --init-from runs/gpt-9 --train ... --out runs/healed
//
// A layer that is removed whole is absent from the new model. A branch that is removed alone
// becomes a projection of zeros, since the format has no layer without attention or MLP: that
// changes the model's function, but saves nothing. prune.json records what was removed, why, and at
// what cost. The directory is written completely or not at all.

#include "../check.h"
#include "../files/files.h"
#include "../files/json.h"
#include "../model/engines.h"
#include "../model/layer_list.h"
#include "../run/options.h"
#include "layers.h"
#include "load.h"
#include "replace_fit.h"
#include "write.h"

//  OPTION(field, name, type, default, domain, help)
#define PRUNE_OPTIONS(HEADING, OPTION)                                                             \
    HEADING("Layers to remove: one of these four")                                                 \
    OPTION(drop, "drop", TEXT, "", "LIST",                                                         \
           "remove these, counted from 0: 3,5-7; single branches as 3.attn,4.mlp")                 \
    OPTION(keep, "keep", TEXT, "", "LIST", "remove all but these")                                 \
    OPTION(n, "n", INTEGER, "0", "[0,1024]", "remove this many layers, chosen by --select")        \
    OPTION(fraction, "fraction", NUMBER, "0", "[0,1)",                                             \
           "remove this fraction of the layers, rounded")                                          \
    OPTION(select, "select", CHOICE, "greedy", "angular|bi|ablation|greedy|random|replace",        \
           "angular: the consecutive layers that change the stream least; bi: the lowest Block "   \
           "Influence; ablation: the smallest cost of removing each alone; greedy: one after the " \
           "other, each time the one that costs least; replace: for --method replace, the "        \
           "consecutive layers whose map gives the lowest loss. build/layers prints these scores") \
    OPTION(seed, "seed", INTEGER, "1337", "[0,inf)", "of --select random")                         \
    HEADING("Method")                                                                              \
    OPTION(method, "method", CHOICE, "delete", "delete|replace|replace-cosine",                    \
           "delete: without replacement; replace: by a linear map, folded into the preceding MLP " \
           "(ReplaceMe), fitted by least squares; replace-cosine: by one that keeps the stream's " \
           "direction, fitted by Adam")                                                            \
    OPTION(blocks, "blocks", INTEGER, "1", "[1,512]",                                              \
           "for --select angular: this many blocks of consecutive layers, equally long")           \
    HEADING("For --method replace and replace-cosine")                                             \
    OPTION(calib, "calib", TEXT, "", "GLOB",                                                       \
           "token shards to fit the map on; default: those that the run was trained on")           \
    OPTION(calib_tokens, "calib-tokens", INTEGER, "262144", "[1,1e15]",                            \
           "tokens of these, in whole rows, evenly spaced")                                        \
    OPTION(ridge, "ridge", TEXT, "auto", "auto|inf|NUMBER",                                        \
           "for replace: the regularization, relative to the mean square of the map's input; "     \
           "auto: the best of 0, 0.1, 1, 10 and inf on --val, or none")                            \
    OPTION(ridge_to, "ridge-to", CHOICE, "identity", "identity|zero",                              \
           "its target; the identity is plain deletion")                                           \
    OPTION(affine, "affine", FLAG, "1", "0|1",                                                     \
           "the map has a constant term, folded into the bias")                                    \
    HEADING("Data: for all selections but --drop, --keep and random, and for the losses before "   \
            "and after")                                                                           \
    OPTION(val, "val", TEXT, "", "GLOB", "token shards; quote a pattern: 'data/val_*.bin'")        \
    OPTION(tokens, "tokens", INTEGER, "65536", "[0,1e15]",                                         \
           "tokens of --val to read, from the first on, rounded up to whole rows; 0: all")         \
    LOAD_SEQ_LEN(OPTION)                                                                           \
    OPTION(batch, "batch", INTEGER, "4", "[1,65536]", "rows per batch")                            \
    LOAD_THREADS(OPTION)                                                                           \
    OPTION(skip_first, "skip-first", INTEGER, "1", "[0,1048576]",                                  \
           "leave the first positions of each row out of cosines and angles")                      \
    HEADING("Output")                                                                              \
    OPTION(out, "out", TEXT, "", "DIR", "the directory to create; it must not exist yet")          \
    WRITE_TOKENIZER(OPTION)

OPTION_TABLE(PRUNE_OPTIONS, PruneOptions, prune_options)

enum {
    SELECT_ANGULAR,
    SELECT_BI,
    SELECT_ABLATION,
    SELECT_GREEDY,
    SELECT_RANDOM,
    SELECT_REPLACE,
    SELECT_LIST
};
static const char *const select_name[] = {"angular", "bi", "ablation", "greedy", "random",
                                          "replace", "list"};

// A method's change to layer l's last projection, y = x W + b: y T + shift, where T is (C,C) and
// shift (C). NULL: unchanged.
typedef struct { double *T, *shift; } PruneMap;

typedef struct {
    const PruneOptions *o;
    Loaded m;
    Weights weights;
    int select, n;           // SELECT_*, and the number of layers it chooses
    unsigned char *removed;  // (2L) branches
    int *from;               // (remaining layers) original numbers
    PruneMap *map;           // (L) by original number
    Shards shards;
    LayersModel model;       // on --val; rows 0: none
    LayersLosses losses;
    Text why;                // JSON that explains the choice
    double distance;         // angular, the largest over a chosen block
    double before, after;    // losses; NaN without --val
    ReplaceFit fit;          // n 0: no replacement
    char *calib;             // the shards it was fitted on
    Shards calib_shards;
    ModelOut out;
} Prune;

// ---- Methods, one row each ----
// To add one, write a function that sets p->map, and add its name to --method's domain in the same
// place.

typedef struct {
    const char *name;
    int needs_data;                                      // whether it needs --val
    void (*fit)(Prune *p); // after the layers are chosen, before writing; or NULL
} PruneMethod;

static void fit_replace(Prune *p);

static const PruneMethod prune_methods[] = {
    {"delete", 0, NULL},
    {"replace", 1, fit_replace},
    {"replace-cosine", 1, fit_replace},
};
enum { METHOD_DELETE, METHOD_REPLACE, METHOD_COSINE };

// ---- Maps that replace layers ----

// Once: the settings of the fit, and its shards.
static void open_fit(Prune *p) {
    const PruneOptions *o = p->o;
    ReplaceFit *f = &p->fit;
    if (f->model) return;
    f->model = &p->model;
    f->zero = o->ridge_to, f->affine = o->affine, f->cosine = o->method == METHOD_COSINE;
    f->seed = (uint64_t)o->seed;
    replace_ridge_read(&f->ridge, o->ridge);             // checked by check_options
    replace_fit_begin(f);
    p->calib = *o->calib ? xstrdup(o->calib) : replace_run_train(p->m.run);
    if (!p->calib)
        die("--calib is missing: the training data of %s is unknown\n"
            "  hint: --calib 'data/train_*.bin'", p->m.dir);
    shards_open(&p->calib_shards, p->calib, p->shards.T, p->m.config.V);
    f->calib = &p->calib_shards;
    f->rows = shards_rows(&p->calib_shards, o->calib_tokens);
}

static void fit_replace(Prune *p) {
    const GptConfig *c = &p->m.config;
    const size_t C = (size_t)c->C;
    ReplaceFit *f = &p->fit;
    unsigned char *kept = (unsigned char *)xcalloc((size_t)(BRANCHES * c->L), 1);
    for (int i = 0; i < BRANCHES * c->L; i++) kept[i] = !p->removed[i];
    open_fit(p);
    if (f->n) memcpy(f->kept, kept, (size_t)(BRANCHES * c->L));  // --select replace has left one
    else replace_fit_blocks(f, kept);
    f->deleted = layers_loss(&p->model, &p->losses, kept)->mean;
    replace_fit(f);
    for (int i = 0; i < f->n; i++) {
        PruneMap *map = &p->map[f->block[i].first - 1];
        map->T = (double *)xcalloc(C * C, sizeof *map->T);
        map->shift = (double *)xcalloc(C, sizeof *map->shift);
        memcpy(map->T, f->map[i].t, C * C * sizeof *map->T);
        memcpy(map->shift, f->map[i].c, C * sizeof *map->shift);
    }
    free(kept);
}

// ---- The choice ----

static void why_number(Prune *p, const char *name, double value) {
    text_printf(&p->why, ", \"%s\": ", name);
    json_write_number(&p->why, value);
}

static void remove_layer(Prune *p, int l, const char *name, double value) {
    layers_keep(p->removed, l, 1);
    text_printf(&p->why, "%s{\"layer\": %d", p->why.n ? ", " : "", l);
    if (name) why_number(p, name, value);
    text_printf(&p->why, "}");
}

// Chooses --blocks blocks of consecutive layers, one after the other: of the remaining ones, the
// one that changes the stream least. A map needs a layer before its block.
static void choose_rows(Prune *p, const LayersStream *s) {
    const int L = p->m.config.L, rows = (int)p->o->blocks, n = p->n / rows;
    const int least = p->o->method != METHOD_DELETE;
    p->distance = 0;
    for (int k = 0; k < rows; k++) {
        int best = -1;
        for (int l = least; l + n <= L; l++) {
            int whole = 1;
            for (int i = l; i < l + n; i++) whole = whole && !p->removed[BRANCHES * i];
            if (whole && (best < 0 || s->angle[l * L + n - 1] < s->angle[best * L + n - 1]))
                best = l;
        }
        if (best < 0)
            die("there is no place for %d block%s of %d layers%s\n  hint: fewer --blocks, or a "
                "smaller --n",
                rows, rows > 1 ? "s" : "", n, least ? ", the first layer left out" : "");
        for (int l = best; l < best + n; l++) remove_layer(p, l, NULL, 0);
        p->distance = fmax(p->distance, s->angle[best * L + n - 1]);
    }
}

static void choose_by_stream(Prune *p) {
    const int L = p->m.config.L, n = p->n;
    LayersStream s = layers_stream(&p->model, &p->losses);
    unsigned char *lowest = (unsigned char *)xcalloc((size_t)L, 1);
    if (p->select == SELECT_ANGULAR) choose_rows(p, &s);
    else {
        layers_lowest(lowest, s.influence, L, n);
        for (int l = 0; l < L; l++)
            if (lowest[l]) remove_layer(p, l, "block_influence", s.influence[l]);
    }
    free(lowest);
    layers_stream_free(&s);
}

static void choose_by_loss(Prune *p) {
    const int L = p->m.config.L;
    unsigned char *kept = (unsigned char *)xcalloc((size_t)(BRANCHES * L), 1),
                  *lowest = (unsigned char *)xcalloc((size_t)L, 1);
    double *loss = (double *)xcalloc((size_t)L, sizeof *loss);
    int *order = (int *)xcalloc((size_t)L, sizeof *order);
    memset(kept, 1, (size_t)(BRANCHES * L));
    if (p->select == SELECT_GREEDY) {
        layers_greedy(&p->model, &p->losses, p->n, order, loss);
        for (int k = 0; k < p->n; k++) remove_layer(p, order[k], "loss", loss[k]);
    } else {
        for (int l = 0; l < L; l++) {
            layers_keep(kept, l, 0);
            loss[l] = layers_loss(&p->model, &p->losses, kept)->mean;
            layers_keep(kept, l, 1);
        }
        layers_lowest(lowest, loss, L, p->n);
        for (int l = 0; l < L; l++)
            if (lowest[l]) remove_layer(p, l, "loss", loss[l]);
    }
    free(kept), free(lowest), free(loss), free(order);
}

static void choose_by_replacing(Prune *p) {
    double *loss = (double *)xcalloc((size_t)p->m.config.L, sizeof *loss);
    open_fit(p);
    const int first = replace_fit_scan(&p->fit, p->n, loss);
    for (int l = first; l < first + p->n; l++) remove_layer(p, l, NULL, 0);
    text_printf(&p->why, ", {\"loss_by_first_layer\": [");
    for (int l = 1; l + p->n <= p->m.config.L; l++) {
        text_printf(&p->why, l > 1 ? ", " : "");
        json_write_number(&p->why, loss[l]);
    }
    text_printf(&p->why, "]}");
    free(loss);
}

static void choose_at_random(Prune *p) {
    int *order = (int *)xcalloc((size_t)p->m.config.L, sizeof *order);
    drop_path_order(order, p->m.config.L, (uint64_t)p->o->seed, 0, 0);
    for (int k = 0; k < p->n; k++) remove_layer(p, order[k], NULL, 0);
    free(order);
}

static void choose_from_list(Prune *p) {
    const char *list = *p->o->drop ? p->o->drop : p->o->keep,
               *error = layer_list_parse(p->removed, p->m.config.L, list);
    if (error)
        die("--%s %s: %s\n  hint: the model's layers are 0 to %d", *p->o->drop ? "drop" : "keep",
            list, error, p->m.config.L - 1);
    for (int i = 0; i < BRANCHES * p->m.config.L && *p->o->keep; i++)
        p->removed[i] = !p->removed[i];
}

static void choose(Prune *p) {
    Progress progress = progress_begin("prune", 0);
    p->model.progress = &progress;
    if (p->select == SELECT_GREEDY) progress.total = layers_greedy_work(&p->model, p->n, 1);
    else if (p->select == SELECT_ABLATION) progress.total = layers_greedy_work(&p->model, 1, 1);
    else if (p->model.rows && p->select != SELECT_REPLACE)       // which reports itself
        progress.total = gpt_row_flops(&p->m.config, p->shards.T) * (double)p->model.rows;
    if (p->select == SELECT_LIST) choose_from_list(p);
    else if (p->select == SELECT_RANDOM) choose_at_random(p);
    else if (p->select == SELECT_REPLACE) choose_by_replacing(p);
    else if (p->select == SELECT_GREEDY || p->select == SELECT_ABLATION) choose_by_loss(p);
    else choose_by_stream(p);
    progress_clear(&progress);
    p->model.progress = NULL;
    int left = 0;
    for (int l = 0; l < p->m.config.L; l++)
        if (!p->removed[BRANCHES * l + ATTN] || !p->removed[BRANCHES * l + MLP])
            p->from[left++] = l;
    if (!left) die("nothing would be left of %s\n  hint: a model has at least one layer", p->m.dir);
    p->out.config.L = left;
}

// ---- Writing ----

// host (rows,C) times T (C,C), in double precision.
static void multiply_map(real *host, const double *T, size_t rows, size_t C) {
#ifdef _OPENMP
#pragma omp parallel for
#endif
    for (size_t r = 0; r < rows; r++) {
        double *y = (double *)xcalloc(C, sizeof *y);
        for (size_t k = 0; k < C; k++)
            for (size_t c = 0; c < C; c++) y[c] += (double)host[r * C + k] * T[k * C + c];
        for (size_t c = 0; c < C; c++) host[r * C + c] = (real)y[c];
        free(y);
    }
}

// For write.h: a parameter of layer `l` of the new model.
static void prune_tensor(void *self, int param, int l, real *host) {
    const Prune *p = (const Prune *)self;
    const GptConfig *c = &p->m.config;
    const int branch = gpt_param[param].branch, old = branch == NO_BRANCH ? 0 : p->from[l],
              i = BRANCHES * old + branch;
    const size_t n = gpt_param_size(c, param), C = (size_t)c->C;
    weights_read(&p->weights, c, p->weights.prefix, param, old, host);
    if (!gpt_param_ends_branch(param)) return;
    if (p->m.scale[i] != 1)
        for (size_t k = 0; k < n; k++) host[k] = (real)((double)host[k] * p->m.scale[i]);
    if (p->removed[i]) memset(host, 0, n * sizeof *host);
    if (branch != MLP || !p->map[old].T) return;
    multiply_map(host, p->map[old].T, n / C, C);
    for (size_t k = 0; k < C && param == P_fcprojb && p->map[old].shift; k++)
        host[k] = (real)((double)host[k] + p->map[old].shift[k]);
}

// The loss of the written directory, on the same data.
static double loss_of(const Prune *p, const char *dir) {
    Loaded m;
    LayersLosses losses = {NULL, 0};
    LayersModel model = p->model;
    load_config(&m, dir);
    load_model(&m, engine_default(), p->model.B, p->shards.T, (int)p->o->threads);
    model.engine = m.engine, model.model = m.model, model.config = m.config, model.plan = &m.plan,
    model.scale = m.scale;
    unsigned char *kept = (unsigned char *)xcalloc((size_t)(BRANCHES * m.config.L), 1);
    memset(kept, 1, (size_t)(BRANCHES * m.config.L));
    const double loss = layers_loss(&model, &losses, kept)->mean;
    layers_losses_free(&losses);
    load_close(&m);
    free(kept);
    return loss;
}

// "3, 5, 8.attn"; in JSON as lists of layers and of branches.
static void text_removed(Text *t, const Prune *p) {
    for (int l = 0, n = 0; l < p->m.config.L; l++) {
        const unsigned char *r = p->removed + BRANCHES * l;
        if (r[ATTN] || r[MLP])
            text_printf(t, "%s%d%s%s", n++ ? ", " : "", l, r[ATTN] && r[MLP] ? "" : ".",
                        r[ATTN] && r[MLP] ? "" : layer_list_branch[r[MLP]]);
    }
    if (!t->n) text_printf(t, "nothing");
}

static void json_at(Text *t, const char *name, double value) {
    text_printf(t, ",\n  \"%s\": ", name);
    json_write_number(t, value);
}

static void write_report(const Prune *p, const char *dir) {
    const int L = p->m.config.L;
    Text t = {NULL, 0, 0};
    const char *comma = "";
    text_printf(&t, "{\n  \"from\": ");
    json_write_string(&t, p->m.dir);
    text_printf(&t,
                ",\n  \"method\": \"%s\",\n  \"select\": \"%s\",\n  \"layers_before\": %d,\n  "
                "\"layers_after\": %d,\n"
                "  \"removed_layers\": [",
                prune_methods[p->o->method].name, select_name[p->select], L, p->out.config.L);
    for (int l = 0; l < L; l++)
        if (p->removed[BRANCHES * l + ATTN] && p->removed[BRANCHES * l + MLP])
            text_printf(&t, "%s%d", comma, l), comma = ", ";
    text_printf(&t, "],\n  \"zeroed_branches\": [");
    comma = "";
    for (int i = 0; i < BRANCHES * L; i++)
        if (p->removed[i] && !p->removed[i ^ 1])
            text_printf(&t, "%s{\"layer\": %d, \"branch\": \"%s\"}", comma, i / BRANCHES,
                        layer_list_branch[i % BRANCHES]),
                comma = ", ";
    text_printf(&t, "],\n  \"kept_layers\": [");
    for (int l = 0; l < p->out.config.L; l++) text_printf(&t, "%s%d", l ? ", " : "", p->from[l]);
    text_printf(&t, "],\n  \"why\": [%s]", p->why.n ? p->why.s : "");
    if (p->select == SELECT_ANGULAR) json_at(&t, "angular_distance", p->distance);
    if (p->select == SELECT_RANDOM) text_printf(&t, ",\n  \"seed\": %lld", (long long)p->o->seed);
    if (p->model.rows) {
        text_printf(&t, ",\n  \"val\": ");
        json_write_string(&t, p->o->val);
        text_printf(&t, ",\n  \"tokens\": %lld,\n  \"seq_len\": %d",
                    (long long)p->model.rows * p->shards.T, p->shards.T);
        json_at(&t, "loss_before", p->before), json_at(&t, "loss_after", p->after);
    }
    if (p->fit.n) {
        json_at(&t, "loss_deleted", p->fit.deleted);
        text_printf(&t, ",\n  \"replace\": ");
        replace_fit_json(&t, &p->fit, p->calib);
    }
    text_printf(&t, "\n}\n");
    write_text(dir, "prune.json", &t);
    text_free(&t);
}

static void write_all(Prune *p) {
    char *parent, *temporary = write_temporary(p->o->out, &parent);
    directory_make(parent);
    write_clean(temporary);
    char *error = write_huggingface(&p->out, temporary);
    if (error) {
        write_clean(temporary);
        die("%s", error);
    }
    p->after = p->model.rows ? loss_of(p, temporary) : NAN;
    write_report(p, temporary);
    directory_sync(temporary);
    write_commit(temporary, p->o->out, parent);
    free(temporary), free(parent);
}

// ---- The program ----

// Which of the four selections was given, and the number of layers, if --select chooses.
static void check_options(Prune *p, Options *options, const char *path) {
    const PruneOptions *o = p->o;
    const struct {
        const void *field;
        const char *name;
    } ways[] = {{&o->drop, "drop"}, {&o->keep, "keep"}, {&o->n, "n"}, {&o->fraction, "fraction"}};
    const char *given = NULL;
    if (!*o->out)
        die("--out is missing\n  hint: prune %s --out runs/pruned --n 1 --val GLOB", path);
    if (path_exists(o->out))
        die("--out %s exists already\n  hint: choose another; nothing is overwritten", o->out);
    for (int i = 0; i < 4; i++) {
        if (options_from(options, ways[i].field) == FROM_DEFAULT) continue;
        if (given) die("--%s and --%s exclude each other", given, ways[i].name);
        given = ways[i].name;
    }
    if (!given)
        die("nothing says which layers to remove\n  hint: --n 3, --fraction 0.25, --drop 3,5-7 or "
            "--keep 0-5");
    p->select = *given == 'n' || *given == 'f' ? o->select : SELECT_LIST;
    if (p->select == SELECT_LIST && options_from(options, &o->select) != FROM_DEFAULT)
        die("--select chooses layers for --n or --fraction; --%s names them", given);
    double ridge;
    const struct {
        const void *field;
        const char *name;
    } of_replace[] = {{&o->calib, "calib"},
                      {&o->calib_tokens, "calib-tokens"},
                      {&o->ridge, "ridge"},
                      {&o->ridge_to, "ridge-to"},
                      {&o->affine, "affine"}};
    for (int i = 0; i < 5; i++) {
        const int of_ridge = i == 2 || i == 3,
                  given_so = options_from(options, of_replace[i].field);
        if (given_so == FROM_DEFAULT) continue;
        if (o->method == METHOD_DELETE || (of_ridge && o->method == METHOD_COSINE))
            die("--%s is for --method replace\n  hint: --method replace, or leave it out",
                of_replace[i].name);
    }
    if (!replace_ridge_read(&ridge, o->ridge))
        die("--ridge %s is none of auto, inf and numbers from 0 on", o->ridge);
    if (p->select == SELECT_REPLACE && o->method != METHOD_REPLACE)
        die("--select replace is for --method replace");
    if (o->blocks > 1 && (p->select != SELECT_ANGULAR || o->fraction > 0))
        die("--blocks is for --n with --select angular");
    if (o->blocks > 1 && o->n % o->blocks)
        die("--blocks %lld: --n %lld is no multiple of it", (long long)o->blocks, (long long)o->n);
    const int needs = prune_methods[o->method].needs_data ||
                      (p->select != SELECT_LIST && p->select != SELECT_RANDOM);
    if (needs && !*o->val)
        die("--val is missing: %s needs data\n  hint: --val 'data/val_*.bin'; --select random and "
            "--drop need none",
            prune_methods[o->method].needs_data ? "this --method" : "this --select");
}

static void check_number(Prune *p) {
    const int L = p->m.config.L;
    if (p->select == SELECT_LIST) return;
    p->n = p->o->fraction > 0 ? (int)lround(p->o->fraction * L) : (int)p->o->n;
    if (p->n < 1) die("no layer would be removed of %d\n  hint: --n 1, or a larger --fraction", L);
    if (p->n >= L)
        die("nothing would be left: the model has %d layers\n  hint: at most --n %d", L, L - 1);
}

static void open_data(Prune *p) {
    const PruneOptions *o = p->o;
    const int T = o->seq_len ? (int)o->seq_len : p->m.config.T;
    if (T > p->m.config.T) die("--seq-len %d: %s has %d positions", T, p->m.dir, p->m.config.T);
    if (o->skip_first >= T)
        die("--skip-first %lld: rows have %d tokens, so that none is left",
            (long long)o->skip_first, T);
    shards_open(&p->shards, o->val, T, p->m.config.V);
    const int64_t rows = shards_rows(&p->shards, o->tokens);
    const int B = rows < o->batch ? (int)rows : (int)o->batch;
    load_model(&p->m, engine_default(), B, T, (int)o->threads);
    const LayersModel model = {p->m.engine, p->m.model, p->m.config, &p->m.plan,
                               p->m.scale,  p->m.tied,  B,           (int)o->skip_first,
                               &p->shards,  rows,       NULL};
    p->model = model;
}

static void print_result(const Prune *p) {
    char before[32], after[32];
    Text removed = {NULL, 0, 0};
    int zeroed = 0, folded = 0;
    for (int i = 0; i < BRANCHES * p->m.config.L; i++) {
        zeroed += p->removed[i] && !p->removed[i ^ 1];
        folded |= p->m.scale[i] != 1;
    }
    text_removed(&removed, p);
    metrics_grouped(before, (double)gpt_params_count(&p->m.config)),
        metrics_grouped(after, (double)gpt_params_count(&p->out.config));
    printf("wrote %s: %d of %d layers of %s%s%s\n", p->o->out, p->out.config.L, p->m.config.L,
           p->m.dir, folded ? ", survival scaling folded in" : "",
           p->out.tokenizer.n ? ", with its tokenizer" : "");
    printf("removed:    %s\n", removed.s);
    if (zeroed)
        printf("            %d single branch%s: projections of zeros, which save no parameter and "
               "no time in this format\n",
               zeroed, zeroed > 1 ? "es are" : " is");
    printf("parameters: %s, of %s\n", after, before);
    for (int i = 0; i < p->fit.n; i++) {
        Text t = {NULL, 0, 0};
        replace_fit_text(&t, &p->fit, i);
        printf("replaced:   %s\n", t.s);
        text_free(&t);
    }
    if (p->model.rows)
        printf("loss:       %.6f, was %.6f (%+.6f), on %lld tokens of %s\n", p->after, p->before,
               p->after - p->before, (long long)p->model.rows * p->shards.T, p->o->val);
    if (p->fit.n)
        printf("            %.6f without the map%s, fitted on %lld tokens of %s\n", p->fit.deleted,
               p->fit.n > 1 ? "s" : "", (long long)p->fit.rows * p->shards.T, p->calib);
    if (p->fit.n && p->fit.deleted > p->before)
        printf("            %.0f%% of what deletion loses is recovered\n",
               100 * (p->fit.deleted - p->after) / (p->fit.deleted - p->before));
    text_free(&removed);
}

static void prune(Prune *p, const char *path) {
    const size_t L = (size_t)p->m.config.L;
    for (size_t i = 0; i < BRANCHES * L && p->m.tied; i++)
        if (p->m.scale[i] != 1)
            die("%s was trained with --drop-scale survival and --drop-branches tied: no weights "
                "can express such factors\n"
                "  hint: evaluate --keep-layers runs it without layers; for prune train with "
                "--drop-branches separate",
                path);
    check_number(p);
    p->removed = (unsigned char *)xcalloc(BRANCHES * L, 1);
    p->from = (int *)xcalloc(L, sizeof *p->from);
    p->map = (PruneMap *)xcalloc(L, sizeof *p->map);
    const ModelOut out = {.config = p->m.config,
                          .to = &write_dtypes[0],
                          .from = p->m.dir,
                          .base = strcmp(p->m.base, p->m.dir) ? p->m.base : NULL,
                          .run = p->m.run,
                          .given = p->o->tokenizer,
                          .self = p,
                          .tensor = prune_tensor,
                          .eot = write_eot(p->m.base, p->m.config.V)};
    p->out = out;
    weights_open(&p->weights, p->m.dir);
    if (*p->o->val) open_data(p);
    choose(p);
    write_tokenizer(&p->out);
    unsigned char *kept = (unsigned char *)xcalloc(BRANCHES * L, 1);
    memset(kept, 1, BRANCHES * L);
    p->before = p->model.rows ? layers_loss(&p->model, &p->losses, kept)->mean : NAN;
    if (prune_methods[p->o->method].fit) prune_methods[p->o->method].fit(p);
    if (p->model.rows) p->m.engine->close(p->m.model);   // before the new one is opened
    write_all(p);
    print_result(p);
    free(kept);
}

int main(int argc, char **argv) {
    PruneOptions o;
    Options options;
    Prune p;
    program_begin(argv);
    memset(&p, 0, sizeof p);
    p.o = &o;
    options_init(&options, "prune CHECKPOINT --out DIR --n K --val GLOB [options]");
    options.engine = engine_default_name();
    options_add(&options, prune_options(), &o);
    options.max_arguments = 1;
    options_parse(&options, argc, argv);
    if (options.n_arguments < 1)
        die("the checkpoint is missing\n  hint: prune runs/gpt/latest --out runs/pruned --n 1 "
            "--val GLOB");
    check_options(&p, &options, options.arguments[0]);
    load_config(&p.m, options.arguments[0]);
    prune(&p, options.arguments[0]);
    for (int l = 0; l < p.m.config.L; l++) free(p.map[l].T), free(p.map[l].shift);
    if (p.model.rows) shards_close(&p.shards), drop_plan_free(&p.m.plan);
    if (p.fit.n) replace_fit_free(&p.fit), shards_close(&p.calib_shards);
    free(p.calib);
    layers_losses_free(&p.losses);
    weights_close(&p.weights);
    write_free(&p.out), text_free(&p.why);
    free(p.removed), free(p.from), free(p.map), free(p.m.dir), free(p.m.base);
    free(p.m.scale), free(p.m.run);
    options_free(&options);
    if (fflush(stdout) || ferror(stdout)) die("cannot write the results: %s", strerror(errno));
    return 0;
}
