// parsers.h: every parser of untrusted bytes, called as a fuzzer does: with n bytes at p, and
// nothing after them. What a parser accepts is then used as the programs use it, and what we can
// write is written and parsed again.
#ifndef PARSERS_H
#define PARSERS_H

#include "fuzz.h"

#include "../run/adaptive.h"
#include "../run/checkpoint.h"
#include "../files/choices.h"
#include "../run/comm.h"
#include "../model/drop_path.h"
#include "../model/layer_list.h"
#include "../run/attribution.h"
#include "../files/json.h"
#include "../files/llmc.h"
#include "../files/manifest.h"
#include "../files/matmul_choices.h"
#include "../run/metrics.h"
#include "../run/options.h"
#include "../files/safetensors.h"
#include "../files/shards.h"
#include "../files/tokenizer.h"
#include "../files/tokenizer_json.h"
#include "../run/weights.h"
#include "../tools/study_plan.h"

// ---- json.h ----

// A JSON string is unchanged when written and parsed again.
static void fuzz_json_string(const Json *d, int node) {
    size_t size;
    char *whole = json_string(d, node, &size), *s = json_string(d, node, NULL);
    FUZZ_REQUIRE(whole && !whole[size] && (s ? strlen(s) == size : strlen(whole) < size));
    if (s) {
        Text t = {NULL, 0, 0};
        Json again;
        json_write_string(&t, s);
        FUZZ_REQUIRE(!json_parse(&again, t.s, t.n) && json_equals(&again, 0, s) &&
                     json_equals(d, node, s));
        json_free(&again);
        text_free(&t);
    }
    free(whole), free(s);
}

static int fuzz_json(const unsigned char *p, size_t n) {
    Json d;
    const char *error = json_parse(&d, p, n);
    FUZZ_REQUIRE(!error || (*error && strlen(error) < sizeof d.error));
    if (error) return 0;
    for (int i = 0, depth = 0, end[JSON_MAX_DEPTH]; i < d.n; i++) {
        const JsonNode *node = &d.node[i];
        while (depth && node->begin >= end[depth - 1]) depth--;
        FUZZ_REQUIRE(node->type < JSON_ARRAY || depth < JSON_MAX_DEPTH);
        if (node->type >= JSON_ARRAY) end[depth++] = node->end;
        int64_t integer;
        double number = 0;
        int count = 0, twice = json_duplicate(&d, i);
        FUZZ_REQUIRE(0 <= node->begin && node->begin <= node->end && (size_t)node->end <= n &&
                     node->next < d.n);
        if (json_int64(&d, i, &integer))
            FUZZ_REQUIRE(json_number(&d, i, &number) && number == (double)integer);
        if (node->type == JSON_STRING) fuzz_json_string(&d, i);
        for (int k = json_first(&d, i); k >= 0; k = json_next(&d, k)) count++;
        FUZZ_REQUIRE(count == json_count(&d, i) && twice < d.n);
    }
    json_free(&d);
    return 1;
}

// ---- shards.h ----

static int fuzz_shards(const unsigned char *p, size_t n) {
    Shard s;
    if (shard_parse(&s, p, n)) return 0;
    FUZZ_REQUIRE(s.count > 0 && s.tokens + s.count * s.width == p + n);
    uint64_t sum = 0;
    for (int64_t i = 0; i < s.count; i++) sum += shard_token(&s, i);
    FUZZ_REQUIRE(sum <= (uint64_t)s.count << 8 * s.width);
    return 1;
}

// ---- choices.h ----

// Every example has its own choices, a valid right one, and all its tokens can be read.
static int fuzz_choices(const unsigned char *p, size_t n) {
    Choices c;
    if (choices_parse(&c, p, n)) return 0;
    int64_t rows = 0;
    for (int64_t e = 0; e < c.examples; e++) {
        const ChoicesExample *x = &c.example[e];
        FUZZ_REQUIRE(x->first == rows && x->n > 0 && 0 <= x->label && x->label < x->n);
        rows += x->n;
    }
    FUZZ_REQUIRE(rows == c.rows);
    for (int64_t r = 0; r < c.rows; r++) {
        const ChoicesRow *row = &c.row[r];
        FUZZ_REQUIRE(row->context_n >= 0 && row->choice_n > 0);
        for (int i = 0; i < row->context_n + row->choice_n; i++)
            FUZZ_REQUIRE(c.width == 4 || choices_token(&c, row, i) <= 65535);
    }
    choices_limit(&c, 1);
    FUZZ_REQUIRE(c.examples == 1 && c.rows == c.example[0].n);
    choices_free(&c);
    return 1;
}

// ---- safetensors.h, weights.h, llmc.h ----

static int fuzz_safetensors(const unsigned char *p, size_t n) {
    Safetensors t;
    size_t data = 0;
    const char *error = safetensors_parse(&t, p, n);
    FUZZ_REQUIRE(!error || (*error && strlen(error) < sizeof t.error));
    if (error) return 0;
    for (int i = 0; i < t.n; i++) {
        const SafetensorsEntry *e = &t.entry[i];
        FUZZ_REQUIRE(e->data >= p && e->bytes <= n && e->data + e->bytes <= p + n &&
                     safetensors_find(&t, e->name) == e);
        real *x = (real *)xcalloc(e->count, sizeof *x);
        int64_t *k = (int64_t *)xcalloc(e->count, sizeof *k);
        FUZZ_REQUIRE(!!safetensors_to_real(e, x) != !!(e->dtype <= SAFETENSORS_BF16));
        safetensors_to_int64(e, k);
        if (e->dtype <= SAFETENSORS_BF16 && e->count)
            safetensors_from_real(SAFETENSORS_BF16, x, e->count, k);
        free(x), free(k);
        data += e->bytes;
    }
    FUZZ_REQUIRE(8 + llmc_word(p, 0) + data == n);
    safetensors_free(&t);
    return 1;
}

// No name leads out of the directory.
static int fuzz_index(const unsigned char *p, size_t n) {
    WeightsIndex x;
    const char *error = weights_index_parse(&x, p, n);
    FUZZ_REQUIRE(!error || (*error && strlen(error) < 256));
    if (error) return 0;
    for (int i = 0; i < x.n; i++) {
        const WeightsPlace *place = &x.place[i];
        FUZZ_REQUIRE(weights_index_find(&x, place->tensor) == place &&
                     !strcmp(x.file[place->file], place->name));
        FUZZ_REQUIRE(!strpbrk(place->name, "/\\") && *place->name != '.' &&
                     strstr(place->name, ".safetensors"));
    }
    weights_index_free(&x);
    return 1;
}

static int fuzz_llmc(const unsigned char *p, size_t n) {
    LlmcModel m;
    const char *error = llmc_model_parse(&m, p, n);
    FUZZ_REQUIRE(!error || (*error && strlen(error) < sizeof m.error));
    if (error) return 0;
    for (int param = 0; param < N_PARAMS; param++)
        for (int l = 0; l < gpt_param_layers(&m.config, param); l++) {
            real *host = (real *)xcalloc(gpt_param_size(&m.config, param), sizeof *host);
            llmc_model_read(&m, param, l, host);
            free(host);
        }
    return 1;
}

// ---- checkpoint.h ----

static void fuzz_config_sizes(const GptConfig *c, const unsigned char *p, size_t n) {
    static const char *const key[5] = {"vocab_size", "n_positions", "n_layer", "n_head", "n_embd"};
    const int size[5] = {c->V, c->T, c->L, c->NH, c->C};
    Json d;
    FUZZ_REQUIRE(!gpt_config_error(c) && !json_parse(&d, p, n));
    for (int i = 0; i < 5; i++) {
        int64_t v = 0;
        FUZZ_REQUIRE(json_int64(&d, json_get(&d, 0, key[i]), &v) && v == size[i]);
    }
    json_free(&d);
}

static int fuzz_config(const unsigned char *p, size_t n) {
    GptConfig c, again;
    CheckpointState s;
    Text t = {NULL, 0, 0};
    double *scale;
    int tied;
    memset(&s, 0, sizeof s);
    s.eot = -1;
    char *error = checkpoint_parse_config(&c, &s.eval_scale, &s.tied, p, n);
    FUZZ_REQUIRE(!!error == !s.eval_scale && (!error || *error));
    free(error);
    if (!s.eval_scale) return 0;
    fuzz_config_sizes(&c, p, n);
    if (c.L > 64) {                                      // the rest takes time proportional to L
        free(s.eval_scale);
        return 1;
    }
    checkpoint_config_json(&t, &c, &s, "float32");
    FUZZ_REQUIRE(!checkpoint_parse_config(&again, &scale, &tied, t.s, t.n) &&
                 !memcmp(&again, &c, sizeof c));
    for (int i = 0; i < BRANCHES * c.L; i++)
        FUZZ_REQUIRE(scale[i] == s.eval_scale[i] && scale[i] >= 0 && scale[i] <= 1);
    text_free(&t);
    free(scale), free(s.eval_scale);
    return 1;
}

static int fuzz_adapter(const unsigned char *p, size_t n) {
    LoraConfig c, again;
    Text t = {NULL, 0, 0};
    char *error = lora_parse(&c, p, n);
    FUZZ_REQUIRE(!error || *error);
    free(error);
    if (error) return 0;
    FUZZ_REQUIRE(c.rank >= 1 && c.rank <= 1024 && c.targets && c.targets < 16);
    FUZZ_REQUIRE(isfinite(c.alpha) && c.dropout >= 0 && c.dropout < 1);
    lora_write(&t, &c);
    error = lora_parse(&again, t.s, t.n);
    FUZZ_REQUIRE(!error && again.rank == c.rank && again.targets == c.targets);
    FUZZ_REQUIRE(again.norms == c.norms && again.alpha == c.alpha && again.dropout == c.dropout);
    FUZZ_REQUIRE(!strcmp(again.base, c.base));
    free(c.base), free(again.base), text_free(&t);
    return 1;
}

static int fuzz_exits(const unsigned char *p, size_t n) {
    Adaptive a, again;
    Text t = {NULL, 0, 0};
    const char *error = adaptive_parse(&a, p, n);
    if (error) return 0;
    FUZZ_REQUIRE(a.n > 0 && a.layer[0] > 0 && a.layer[a.n - 1] < a.of && a.of <= 1024);
    FUZZ_REQUIRE(isfinite(a.lambda) && a.tau >= 0 && a.risk > 0 && a.risk < 1);
    adaptive_write(&t, &a);
    error = adaptive_parse(&again, t.s, t.n);
    FUZZ_REQUIRE(!error && again.n == a.n && again.weights == a.weights && again.of == a.of);
    FUZZ_REQUIRE(again.lambda == a.lambda && again.tau == a.tau && again.error == a.error);
    for (int i = 0; i < a.weights; i++) FUZZ_REQUIRE(again.weight[i] == a.weight[i]);
    adaptive_free(&a), adaptive_free(&again), text_free(&t);
    return 1;
}

// The options that a checkpoint names, parsed as by the tools.
static void fuzz_trainer_options(const char *text) {
    TrainOptions t;
    Options o;
    options_init(&o, "");
    options_add(&o, train_options(), &t);
    free(options_config(&o, text, strlen(text), FROM_CONFIG, "trainer.json"));
    options_free(&o);
}

// The bytes unchanged, and as the beginning of a trainer.json with a correct checksum.
static int fuzz_trainer(const unsigned char *p, size_t n) {
    char hex[SHA256_HEX];
    int accepted = 0;
    for (int summed = 0; summed < 2; summed++) {
        CheckpointState s;
        Text t = {NULL, 0, 0};
        text_append(&t, n ? (const void *)p : "", n);
        sha256_hex(hex, t.s, t.n);
        if (summed) text_printf(&t, CHECKPOINT_SELF "%s\"\n}\n", hex);
        char *exact = (char *)xcalloc(t.n, 1);           // lets a sanitizer see its end
        memcpy(exact, t.s, t.n);
        if (!checkpoint_parse_state(&s, exact, t.n)) {
            FUZZ_REQUIRE(s.step >= 0 && s.tokens >= 0 && s.step + ((int64_t)1 << 60) > 0 &&
                         s.options);
            FUZZ_REQUIRE(s.consumed >= -1 && s.seq_len >= 0 &&
                         (s.consumed < 1 || s.seq_len <= ((int64_t)1 << 60) / s.consumed));
            fuzz_trainer_options(s.options);
            free((char *)(uintptr_t)s.options);
            accepted = 1;
        }
        free(exact);
        text_free(&t);
    }
    return accepted;
}

// ---- tokenizer.h, manifest.h ----

static int fuzz_tokenizer(const unsigned char *p, size_t n) {
    enum { LONGEST = 1024 };                             // encoding is quadratic in this
    Tokenizer t;
    char *name;
    int64_t last;
    char *wrong = tokenizer_json_read(n ? (const void *)p : "", n, 1, &last, &name);
    FUZZ_REQUIRE(!wrong || (*wrong && !name));
    free(wrong ? wrong : name);
    const char *error = tokenizer_parse(&t, p, n);
    FUZZ_REQUIRE(!error || (*error && strlen(error) < sizeof t.error));
    if (error) return 0;
    const size_t length = n < 256 ? n : 256;
    int *tokens = (int *)xcalloc(length, sizeof *tokens), bytes;
    Text text = {NULL, 0, 0}, json = {NULL, 0, 0};
    FUZZ_REQUIRE(t.V > 0 && t.eot < t.V);
    const int64_t count = tokenizer_encode(&t, (const char *)p, length, tokens);
    for (int64_t i = 0; i < count; i++) {
        const char *s = tokenizer_bytes(&t, tokens[i], &bytes);
        text_append(&text, s, (size_t)bytes);
    }
    if (count > 0) FUZZ_REQUIRE(text.n == length && !memcmp(text.s, p, length));
    if (t.bytes.n <= LONGEST && !tokenizer_json_write(&json, &t)) {
        Json doc;
        FUZZ_REQUIRE(!json_parse(&doc, json.s, json.n));
        const int vocab = json_get(&doc, json_get(&doc, 0, "model"), "vocab");
        FUZZ_REQUIRE(json_count(&doc, vocab) == t.V && json_duplicate(&doc, vocab) < 0);
        json_free(&doc);
    }
    free(tokens), text_free(&text), text_free(&json);
    tokenizer_free(&t);
    return 1;
}

static int fuzz_manifest(const unsigned char *p, size_t n) {
    Manifest m;
    const char *error = manifest_parse(&m, p, n);
    FUZZ_REQUIRE(!error || (*error && strlen(error) < sizeof m.error));
    if (error) return 0;
    int64_t left = m.tokens[MANIFEST_TRAIN];
    FUZZ_REQUIRE(m.V > 0 && m.eot >= 0 && m.eot < m.V && strlen(m.sha256) == SHA256_HEX - 1 &&
                 !strchr(m.file, '/'));
    for (int i = 0; i < m.shards; i++) {
        FUZZ_REQUIRE(m.shard[i].tokens > 0 && !strchr(m.shard[i].file, '/'));
        if (left == 0) left = m.tokens[MANIFEST_VAL];
        left -= m.shard[i].tokens;
    }
    manifest_bits_per_byte(&m, MANIFEST_VAL, 1);
    manifest_free(&m);
    return 1;
}

// ---- options.h ----

// given: what a config has set, as a config
typedef struct { TrainOptions values; Options options; Text given; } FuzzOptions;

static char *fuzz_options_read(FuzzOptions *o, const void *mem, size_t n) {
    memset(&o->given, 0, sizeof o->given);
    text_append(&o->given, "", 0);
    options_init(&o->options, "");
    options_add(&o->options, train_options(), &o->values);
    char *error = options_config(&o->options, mem, n, FROM_CONFIG, "fuzz");
    for (int k = 1; k < o->options.n_sets; k++)          // 0: --help and --config
        for (int i = 0; i < o->options.set[k].n; i++) {
            const OptionRef r = {&o->options.set[k], &o->options.set[k].specs[i]};
            if (*options_source(r) != FROM_CONFIG) continue;
            text_printf(&o->given, "%s = ", r.spec->name);
            options_print(&o->given, r);
            text_append(&o->given, "\n", 1);
        }
    return error;
}

static void fuzz_options_free(FuzzOptions *o) {
    options_free(&o->options);
    text_free(&o->given);
}

// What is set is unchanged when written and parsed again.
static int fuzz_options(const unsigned char *p, size_t n) {
    FuzzOptions a, b;
    char *error = fuzz_options_read(&a, p, n);
    const int accepted = !error;
    FUZZ_REQUIRE(!error || *error);
    FUZZ_REQUIRE(!fuzz_options_read(&b, a.given.s, a.given.n) && !strcmp(a.given.s, b.given.s));
    const TrainOptions *t = &a.values;
    FUZZ_REQUIRE(t->steps >= 1 && t->batch >= 1 && t->batch <= 65536 && t->keep >= 0 &&
                 t->seed >= 0 && t->lr >= 0);
    FUZZ_REQUIRE(t->drop_path >= 0 && t->drop_path < 1 && t->eps > 0 && isfinite(t->eps) &&
                 t->warmup.value >= 0);
    options_apply_recipe(&a.options, t);
    fuzz_options_free(&a), fuzz_options_free(&b);
    free(error);
    return accepted;
}

// ---- drop_path.h, metrics.h: --drop-replay ----

static void fuzz_drop_path(DropPath *d, int layers, int branches) {
    memset(d, 0, sizeof *d);
    d->layers = layers, d->branches = branches, d->steps = 10, d->p_max = 0.5;
}

// A plan that was read is written as the same text.
static int fuzz_plan_text(const char *text, const DropPath *d, int m, int batch) {
    DropPlan plan = drop_plan_new(d->layers, batch);
    Text t = {NULL, 0, 0};
    const int accepted = !drop_plan_read(&plan, d, 3, text, m, batch);
    if (accepted) {
        for (; m > 0; m--) text = strchr(text, ' ') + 1;
        const size_t n = strcspn(text, " ");
        drop_plan_write(&t, &plan, memchr(text, '.', n) ? UNIT_ROW : UNIT_BATCH);
        FUZZ_REQUIRE(t.n == n && !memcmp(t.s, text, n));
    }
    text_free(&t);
    drop_plan_free(&plan);
    return accepted;
}

// The first three bytes select the model, the rows and the micro-batch.
static int fuzz_plan(const unsigned char *p, size_t n) {
    DropPath d;
    if (n < 3) return 0;
    char *text = (char *)xcalloc(n - 2, 1);
    memcpy(text, p + 3, n - 3);
    fuzz_drop_path(&d, 1 + p[0] % 8, p[0] / 8 % 4);
    const int accepted = fuzz_plan_text(text, &d, p[2] % 4, 1 + p[1] % 40);
    free(text);
    return accepted;
}

static int fuzz_metrics_same(double a, double b) { return a == b || (isnan(a) && isnan(b)); }

// The lines up to a step that a resumed run keeps: keeping them again changes nothing.
static void fuzz_metrics_kept(const unsigned char *p, size_t n, int64_t done) {
    Text once = {NULL, 0, 0}, twice = {NULL, 0, 0};
    Metrics last;
    size_t at;
    int64_t number;
    metrics_keep(&once, (const char *)p, n, done, &last, &at, &number);
    FUZZ_REQUIRE(at <= once.n && once.n <= n && (isnan(last.step) || last.step == (double)done));
    metrics_free(&last);
    metrics_keep(&twice, once.s, once.n, done, &last, &at, &number);
    FUZZ_REQUIRE(twice.n == once.n && (!once.n || !memcmp(twice.s, once.s, once.n)));
    metrics_free(&last);
    text_free(&once), text_free(&twice);
}

static int fuzz_metrics(const unsigned char *p, size_t n) {
    MetricsLog log;
    DropPath d;
    fuzz_metrics_kept(p, n, n % 4);
    const char *error = metrics_log_parse(&log, p, n);
    fuzz_drop_path(&d, 2, BRANCHES_SEPARATE);
    for (int64_t i = 0; !error && i < log.n; i++) {
        const Metrics *r = &log.record[i];
        Metrics again;
        Text line = {NULL, 0, 0};
        metrics_write(&line, r);
        FUZZ_REQUIRE(!metrics_parse(&again, line.s, line.n - 1) && !r->plan == !again.plan);
#define X(name) FUZZ_REQUIRE(fuzz_metrics_same(r->name, again.name));
        METRICS(X)
#undef X
        if (r->plan) FUZZ_REQUIRE(!strcmp(r->plan, again.plan));
        for (int m = 0; r->plan && m < 2; m++) fuzz_plan_text(r->plan, &d, m, 5);
        FUZZ_REQUIRE(r->depths == again.depths);
        for (int k = 0; k < r->depths; k++)
            FUZZ_REQUIRE(r->depth[k].share == again.depth[k].share &&
                         fuzz_metrics_same(r->depth[k].loss[0], again.depth[k].loss[0]) &&
                         fuzz_metrics_same(r->depth[k].loss[1], again.depth[k].loss[1]));
        metrics_free(&again);
        text_free(&line);
    }
    const int accepted = !error && log.n;
    metrics_log_free(&log);
    return accepted;
}

// ---- layer_list.h ----

// The first byte is the number of layers; the rest a list of layers, and of shares. A list that is
// accepted is the same when it is written and read again.
static int fuzz_layers(const unsigned char *p, size_t n) {
    unsigned char chosen[2 * 32] = {0}, again[2 * 32] = {0};
    DepthShares shares, same;
    if (!n) return 0;
    const int L = 1 + p[0] % 32;
    char *list = (char *)xcalloc(n, 1);
    memcpy(list, p + 1, n - 1);
    Text text = {NULL, 0, 0};
    const int layers = !layer_list_parse(chosen, L, list);
    if (layers) {
        int some = 0;
        for (int i = 0; i < 2 * 32; i++) {
            FUZZ_REQUIRE(chosen[i] <= (i < 2 * L));
            some += chosen[i];
        }
        layer_list_write(&text, chosen, L);
        FUZZ_REQUIRE(some && !layer_list_parse(again, L, text.s) &&
                     !memcmp(chosen, again, sizeof chosen));
        text.n = 0;
    }
    const int depths = !depth_shares_parse(&shares, list);
    FUZZ_REQUIRE(shares.n >= 0 && shares.n <= DEPTH_SHARES);
    for (int i = 0; depths && i < shares.n; i++) {
        FUZZ_REQUIRE(shares.share[i] > (i ? shares.share[i - 1] : 0) && shares.share[i] < 1);
        for (int kind = 0; kind < KEEP_KINDS; kind++) {
            const int kept = layer_list_share(again, L, kind, shares.share[i]);
            int branches = 0;
            for (int k = 0; k < 2 * L; k++) branches += again[k];
            FUZZ_REQUIRE(kept >= 1 && kept <= L && branches == 2 * kept);
        }
        text_printf(&text, "%s%g", i ? "," : "", shares.share[i]);
    }
    if (depths && shares.n)
        FUZZ_REQUIRE(!depth_shares_parse(&same, text.s) && !memcmp(&same, &shares, sizeof(int)) &&
                     !memcmp(same.share, shares.share, (size_t)shares.n * sizeof(double)));
    free(list), text_free(&text);
    return layers || (depths && shares.n);
}

// ---- study_plan.h ----

// A plan that is accepted has arms with names, grids in ascending order of at least one value, and
// a baseline; what is refused says so in one line.
static int fuzz_study(const unsigned char *p, size_t n) {
    Study s;
    memset(&s, 0, sizeof s);
    char *error = study_parse(&s, p, n);
    FUZZ_REQUIRE(!error || *error);
    if (!error) {
        FUZZ_REQUIRE(s.n_arms >= 2 && s.n_arms <= STUDY_ARMS && s.base >= 0 && s.base < s.n_arms);
        FUZZ_REQUIRE(s.n_curve >= 0 && s.n_curve <= STUDY_CURVE);
        for (int k = 0; k < s.n_arms; k++) {
            const StudyArm *a = &s.arm[k];
            FUZZ_REQUIRE(a->name && *a->name && study_find_arm(&s, a->name) == a);
            FUZZ_REQUIRE(a->grids >= 0 && a->grids <= STUDY_GRIDS);
            for (int g = 0; g < a->grids; g++) {
                FUZZ_REQUIRE(a->grid[g].n > 0 && a->grid[g].n == a->grid[g].given);
                for (int i = 1; study_grid_is_numeric(&a->grid[g]) && i < a->grid[g].n; i++)
                    FUZZ_REQUIRE(strtod(a->grid[g].value[i - 1], NULL) <
                                 strtod(a->grid[g].value[i], NULL));
            }
        }
    }
    const int accepted = !error;
    free(error);
    study_close(&s);
    return accepted;
}

// ---- comm.h ----

static int fuzz_printable(const char *s, size_t capacity) {
    for (size_t i = 0; i < capacity; i++) {
        if (!s[i]) return 1;
        if (s[i] < ' ' || s[i] > '~') return 0;
    }
    return 0;
}

static int fuzz_hello(const unsigned char *p, size_t n) {
    CommHello h, again;
    unsigned char bytes[COMM_HELLO];
    if (comm_parse_hello(&h, p, n)) return 0;
    FUZZ_REQUIRE(h.kind <= COMM_WATCH && h.rank < h.world && h.world <= COMM_MOST_RANKS &&
                 fuzz_printable(h.host, 64));
    comm_write_hello(bytes, &h);
    FUZZ_REQUIRE(!comm_parse_hello(&again, bytes, sizeof bytes));
    FUZZ_REQUIRE(!memcmp(again.nonce, h.nonce, COMM_NONCE) && !strcmp(again.host, h.host));
    return 1;
}

static const char fuzz_token[] = "the job";

// Rank 0 of four evaluates a newcomer: only one that knows the token gets in, and only in its own
// place. The nonce of the challenge is all zeros here, so that an input can contain the proof.
static int fuzz_admit(const unsigned char *p, size_t n) {
    static CommLinks k;
    CommPending newcomer;
    unsigned char answer[COMM_ANSWER], proof[SHA256_BYTES];
    memset(&newcomer, 0, sizeof newcomer);
    k.world = 4;
    for (int r = 0; r < k.world; r++) k.data[r] = k.watch[r] = -1;
    newcomer.fd = 1000;
    newcomer.need = COMM_HELLO;
    char *error = NULL;
    int taken = 0, answers = 0;
    while (!error && !taken) {
        const size_t got = n < newcomer.need ? n : newcomer.need;
        if (got) memcpy(newcomer.bytes, p, got);
        newcomer.got = got;
        if (got < newcomer.need && answers) break;       // it is silent
        error = comm_admit(&k, &newcomer, fuzz_token, answer, &taken);
        answers += !error && !taken;
    }
    int places = 0;
    for (int r = 0; r < k.world; r++) places += (k.data[r] == 1000) + (k.watch[r] == 1000);
    FUZZ_REQUIRE(places == taken && k.data[0] < 0 && k.watch[0] < 0);
    if (answers > 1) {                                   // it was told that it has joined
        comm_prove(proof, fuzz_token, "guest", newcomer.bytes, newcomer.nonce);
        FUZZ_REQUIRE(!memcmp(proof, newcomer.bytes + COMM_HELLO, sizeof proof));
    }
    FUZZ_REQUIRE(!taken || answers == 2);
    free(error);
    return taken;
}

static int fuzz_answer(const unsigned char *p, size_t n) {
    CommAnswer a;
    if (comm_parse_answer(&a, p, n)) return 0;
    FUZZ_REQUIRE(a.status >= COMM_JOINED && a.status <= COMM_CHALLENGE);
    FUZZ_REQUIRE(fuzz_printable(a.text, sizeof a.text));
    return 1;
}

static int fuzz_place(const unsigned char *p, size_t n) {
    CommPlace place;
    if (comm_parse_place(&place, p, n)) return 0;
    FUZZ_REQUIRE(place.port > 0 && place.port < 65536 && place.n > 0 && place.n <= COMM_ADDRESSES);
    for (int i = 0; i < place.n; i++) FUZZ_REQUIRE(fuzz_printable(place.address[i], 64));
    return 1;
}

// What a peer sends on the heartbeat connection, in pieces.
static int fuzz_watch(const unsigned char *p, size_t n) {
    CommPeer peer;
    char text[COMM_ANSWER];
    const char *news = NULL;
    memset(&peer, 0, sizeof peer);
    for (size_t at = 0, piece; at < n && !news; at += piece) {
        piece = (size_t)1 + p[at] % 61;
        if (piece > n - at) piece = n - at;
        news = comm_hear(&peer, p + at, piece, text);
        FUZZ_REQUIRE(peer.n < COMM_ANSWER);
        if (news == text) FUZZ_REQUIRE(fuzz_printable(text, sizeof text));
    }
    return !news;
}

// Variables as "NAME=value\n"; a value lives until the seventh one after it.
static const char *fuzz_look(const void *vars, const char *name) {
    static char value[8][400];
    static int next;
    const size_t n = strlen(name);
    for (const char *at = (const char *)vars; at; at = strchr(at, '\n')) {
        at += *at == '\n';
        if (strncmp(at, name, n) || at[n] != '=') continue;
        char *v = value[next++ % 8];
        snprintf(v, sizeof value[0], "%.*s", (int)strcspn(at + n + 1, "\n"), at + n + 1);
        return v;
    }
    return NULL;
}

// A launcher's variables; the first line is --rendezvous.
static int fuzz_launch(const unsigned char *p, size_t n) {
    CommLaunch l;
    char *text = (char *)xcalloc(n + 1, 1);
    if (n) memcpy(text, p, n);
    char *line = strchr(text, '\n');
    if (line) *line = 0;
    char *error = comm_launch(&l, text, "", fuzz_look, line ? line + 1 : "");
    const int accepted = !error && l.world > 1;
    if (accepted) {
        FUZZ_REQUIRE(l.rank >= 0 && l.rank < l.world && l.local_rank >= 0 &&
                     l.local_rank < l.world);
        FUZZ_REQUIRE((*l.directory || (*l.host && l.port > 0 && l.port < 65536)) && *l.token);
    }
    free(error), free(text);
    return accepted;
}

// ---- matmul_choices.h ----

static const char fuzz_where[] = "a GPU, compute capability 9.0, cublasLt 130100, bf16";

// A file is accepted only if writing it again gives the same bytes.
static int fuzz_matmuls(const unsigned char *p, size_t n) {
    MatmulChoices c = {NULL, 0, 0};
    const int accepted = !matmul_choices_parse(&c, fuzz_where, p, n);
    if (accepted) {
        Text again = matmul_choices_text(&c, fuzz_where);
        FUZZ_REQUIRE(again.n == n && !memcmp(again.s, p, n));
        text_free(&again);
        for (int i = 0; i < c.n; i++)
            FUZZ_REQUIRE(matmul_choices_find(&c, c.all[i].key) == &c.all[i]);
    } else FUZZ_REQUIRE(!c.n && !c.all);
    matmul_choices_free(&c);
    return accepted;
}

// ---- attribution.h ----

// The first byte is the number of tokens; the rest their scores.
static int fuzz_scores(const unsigned char *p, size_t n) {
    double score[256];
    if (!n) return 0;
    const int V = p[0], accepted = !scores_parse(score, V, p + 1, n - 1);
    for (int v = 0; accepted && v < V; v++) FUZZ_REQUIRE(fabs(score[v]) <= SCORE_MOST);
    return accepted;
}

// ---- The table ----

#define FUZZ_PARSERS(X)                                                                            \
    X(json) X(shards) X(choices) X(safetensors) X(index) X(llmc) X(config) X(trainer) X(tokenizer) \
    X(manifest) X(options) X(adapter) X(layers) X(study) X(exits)                                  \
    X(metrics) X(plan) X(hello) X(admit) X(answer) X(place) X(watch) X(launch) X(scores)           \
    X(matmuls)

static const FuzzParser fuzz_parsers[] = {
#define X(name) {#name, fuzz_##name},
    FUZZ_PARSERS(X)
#undef X
};
enum { N_FUZZ_PARSERS = sizeof fuzz_parsers / sizeof fuzz_parsers[0] };

static inline const FuzzParser *fuzz_find(const char *name) {
    for (int i = 0; i < N_FUZZ_PARSERS; i++)
        if (!strcmp(fuzz_parsers[i].name, name)) return &fuzz_parsers[i];
    return NULL;
}

#endif
