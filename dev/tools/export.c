// export.c: a checkpoint's weights in a form that other programs open.
//
//     build/export runs/gpt/latest --out runs/gpt-hf                      a directory for transformers: weights, configuration,
//                                                                         tokenizer
//     build/export runs/gpt/latest --out gpt_bf16.bin --format llmc --dtype bf16      a file for llm.c
//
// The factors of survival scaling are folded into the last projections of their branches, since
// s * (x W + b) = x (s W) + s b. What is written is there whole or not at all.

#include "../check.h"
#include "../files/files.h"
#include "../files/llmc.h"
#include "../files/tokenizer_json.h"
#include "../run/checkpoint.h"
#include "../run/options.h"
#include "load.h"

//  OPTION(field, name, type, default, domain, help)
#define EXPORT_OPTIONS(HEADING, OPTION)                                                                              \
  HEADING("Output")                                                                                                  \
    OPTION(out, "out", TEXT, "", "PATH", "the directory, or llm.c's file, to make; it must not exist yet")           \
    OPTION(format, "format", CHOICE, "huggingface", "huggingface|llmc",                                              \
           "a directory for transformers, or a model file of llm.c (version 3 in f32, 5 in bf16)")                   \
    OPTION(dtype, "dtype", CHOICE, "f32", "f32|f16|bf16",                                                            \
           "numbers of the weights, rounded to nearest; a weight too large for them is an error")                    \
    OPTION(tokenizer, "tokenizer", TEXT, "", "FILE",                                                                 \
           "a tokenizer.json, or one of our tokenizer files, from which one is made; if not given: beside the "      \
           "checkpoint's files, else the one that the run was trained with")

OPTION_TABLE(EXPORT_OPTIONS, ExportOptions, export_options)

enum { FORMAT_HUGGINGFACE, FORMAT_LLMC };

typedef struct { const char *name, *torch; int dtype; } ExportDtype;
static const ExportDtype export_dtypes[3] = {{"f32", "float32", SAFETENSORS_F32}, {"f16", "float16", SAFETENSORS_F16},
                                             {"bf16", "bfloat16", SAFETENSORS_BF16}};

typedef struct {
    const ExportOptions *o;
    const ExportDtype *to;
    Loaded m;                                            // its sizes and factors; no engine
    Weights weights;
    int folded;                                          // whether a factor is not 1
    Text tokenizer, tokenizer_config;                    // the two files; empty: there is no tokenizer
    Text ours;                                           // the tokenizer file that our tools read, if it came from one
    const char *ours_name;
    int eot;                                             // the end-of-text token, or -1
} Export;

// ---- Weights ----

// One layer's part of a parameter as it is to be stored, from malloc; *bytes long. The file of llm.c has the transpose, and
// rows of zeros after the last token's. NULL after writing into *error, from malloc, what is wrong.
static void *export_tensor(const Export *x, int p, int l, size_t *bytes, char **error) {
    const GptConfig *c = &x->m.config;
    const int llmc = x->o->format == FORMAT_LLMC, branch = gpt_param[p].branch;
    const size_t n = gpt_param_size(c, p), width = safetensors_dtype[x->to->dtype].size;
    const size_t padding = llmc && p == P_wte ? (size_t)(llmc_vocab(c->V) - c->V) * (size_t)c->C : 0;
    real *host = xcalloc(n, sizeof *host), *turned = NULL;
    void *out = xcalloc(n + padding, width);
    weights_read(&x->weights, c, x->weights.prefix, p, l, host);
    if (gpt_param_ends_branch(p) && x->m.scale[BRANCHES * l + branch] != 1)
        for (size_t i = 0; i < n; i++) host[i] = (real)((double)host[i] * x->m.scale[BRANCHES * l + branch]);
    if (llmc && llmc_transposed(p)) {
        turned = xcalloc(n, sizeof *turned);
        llmc_transpose(turned, host, (size_t)gpt_param_rows(c, p), (size_t)gpt_param_cols(c, p));
    }
    const real *from = turned ? turned : host;
    const size_t bad = safetensors_from_real(x->to->dtype, from, n, out);
    if (bad < n) {
        char *name = gpt_param_name(p, l);
        *error = xprintf("%s: a weight of %s is %g, which is not finite in %s%s", x->m.dir, name, (double)from[bad],
                         x->to->name, isfinite(from[bad]) ? "\n  hint: --dtype bf16 has the range of f32" : "");
        free(name), free(out);
        out = NULL;
    }
    *bytes = (n + padding) * width;
    free(host), free(turned);
    return out;
}

// Writes all tensors to the open file of either format. NULL, or from malloc what is wrong.
static char *export_tensors(const Export *x, SafetensorsWriter *w, FILE *f, const char *path) {
    char *error = NULL;
    for (int p = 0; p < N_PARAMS; p++)
        for (int l = 0; l < gpt_param_layers(&x->m.config, p); l++) {
            size_t bytes;
            void *data = export_tensor(x, p, l, &bytes, &error);
            if (!data) return error;
            if (w) safetensors_append(w, data, bytes);
            else file_write(f, path, data, bytes);
            free(data);
        }
    return NULL;
}

static char *export_safetensors(const Export *x, const char *path) {
    const GptConfig *c = &x->m.config;
    SafetensorsWriter w;
    FILE *f = file_open(path, "wb");
    safetensors_writer_init(&w);
    for (int p = 0; p < N_PARAMS; p++)
        for (int l = 0; l < gpt_param_layers(c, p); l++) {
            int64_t shape[2];
            const int dims = gpt_param_shape(c, p, shape);
            char *name = gpt_param_name(p, l), *full = xprintf("transformer.%s", name);
            safetensors_declare(&w, full, safetensors_dtype[x->to->dtype].name, dims, shape);
            free(name), free(full);
        }
    safetensors_begin(&w, f, path);
    char *error = export_tensors(x, &w, f, path);
    if (error) return error;
    safetensors_end(&w);
    file_sync_close(f, path);
    return NULL;
}

// ---- Tokenizer ----

static Text export_read(const char *path) {
    FileMap map;
    Text t = {NULL, 0, 0};
    const char *error = file_map(&map, path);
    if (error) die("cannot read %s: %s", path, error);
    text_append(&t, map.data ? (const void *)map.data : "", map.size);
    file_unmap(&map);
    return t;
}

// Takes a tokenizer.json as it is, after checking that its tokens are the model's. Finds the name of end-of-text, from
// malloc, or NULL.
static char *export_take_json(Export *x, const char *path) {
    char *eot;
    int64_t last;
    x->tokenizer = export_read(path);
    char *error = tokenizer_json_read(x->tokenizer.s, x->tokenizer.n, x->eot, &last, &eot);
    if (error) die("%s: %s", path, error);
    if (last >= x->m.config.V)
        die("%s has a token %lld, the model only %d tokens\n  hint: --tokenizer FILE names another", path, (long long)last,
            x->m.config.V);
    return eot;
}

// Makes a tokenizer.json from one of our tokenizer files, and keeps that file too, for our own tools.
static char *export_make_json(Export *x, const char *path) {
    Tokenizer t;
    tokenizer_load(&t, path);
    if (t.V > x->m.config.V)
        die("%s has %d tokens, the model only %d\n  hint: --tokenizer FILE names another", path, t.V, x->m.config.V);
    const char *error = tokenizer_json_write(&x->tokenizer, &t);
    if (error) die("%s: no tokenizer.json can be made of it: %s\n  hint: --tokenizer names a tokenizer.json", path, error);
    x->ours = export_read(path);
    x->ours_name = x->ours.s[0] == '{' ? "vocab.json" : "tokenizer.bin";
    if (x->eot < 0) x->eot = t.eot;
    char *eot = tokenizer_json_eot_name(&t);
    tokenizer_free(&t);
    return eot;
}

// Whether the file is a tokenizer.json, which has a "model", and no vocab.json, which has none that is an object.
static int export_is_json(const char *path) {
    FileMap map;
    Json doc;
    int is = 0;
    if (file_map(&map, path)) return 0;
    if (map.size && map.data[0] == '{' && !json_parse(&doc, map.data, map.size)) {
        is = json_type(&doc, json_get(&doc, 0, "model")) == JSON_OBJECT;
        json_free(&doc);
    }
    file_unmap(&map);
    return is;
}

// The tokenizer of the checkpoint: a tokenizer.json wherever there is one, since it says more than our files. From malloc,
// or NULL.
static char *export_find_tokenizer(const Export *x) {
    if (*x->o->tokenizer) return xstrdup(x->o->tokenizer);
    char *json = xprintf("%s/tokenizer.json", x->m.dir), *inside = xprintf("%s/", x->m.dir);
    char *ours = path_exists(json) ? NULL : tokenizer_find(inside);
    if (!path_exists(json) && !ours && x->m.run) ours = load_run_tokenizer(x->m.run);
    if (ours) {
        const char *slash = strrchr(ours, '/');
        free(json);
        json = xprintf("%.*stokenizer.json", slash ? (int)(slash + 1 - ours) : 0, ours);
    }
    free(inside);
    if (export_is_json(json)) {
        free(ours);
        return json;
    }
    free(json);
    return ours;
}

// The file that our own tools read, where it stands beside the tokenizer.json.
static void export_keep_ours(Export *x, const char *json) {
    char *beside = xprintf("%.*s/", (int)(strrchr(json, '/') - json), json), *path = tokenizer_find(beside);
    if (path) x->ours = export_read(path), x->ours_name = x->ours.s[0] == '{' ? "vocab.json" : "tokenizer.bin";
    free(beside), free(path);
}

static void export_tokenizer(Export *x) {
    char *path = export_find_tokenizer(x), *eot;
    if (!path) {
        warn("found no tokenizer for %s: the output has none\n  hint: --tokenizer FILE", x->m.dir);
        return;
    }
    eot = export_is_json(path) ? export_take_json(x, path) : export_make_json(x, path);
    if (!x->ours.n && !*x->o->tokenizer) export_keep_ours(x, path);
    tokenizer_json_config(&x->tokenizer_config, x->m.config.T, eot);
    free(eot), free(path);
}

// ---- The two formats ----

// The end-of-text token that config.json names, or -1.
static int export_eot(const char *dir, int V) {
    char *path = xprintf("%s/config.json", dir);
    FileMap map;
    Json doc;
    int64_t eot = -1;
    if (path_is_directory(dir) && !file_map(&map, path)) {
        if (!json_parse(&doc, map.data, map.size)) {
            if (!json_int64(&doc, json_get(&doc, 0, "eos_token_id"), &eot) || eot < 0 || eot >= V) eot = -1;
            json_free(&doc);
        }
        file_unmap(&map);
    }
    free(path);
    return (int)eot;
}

static const char *const export_files[] = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
                                           "tokenizer_config.json", "tokenizer.bin", "vocab.json"};
enum { N_EXPORT_FILES = sizeof export_files / sizeof export_files[0] };

// Removes what an export has left behind under its temporary name.
static void export_clean(const char *temporary) {
    for (int i = 0; path_is_directory(temporary) && i < N_EXPORT_FILES; i++) {
        char *path = xprintf("%s/%s", temporary, export_files[i]);
        unlink(path);
        free(path);
    }
    if (path_exists(temporary) && (path_is_directory(temporary) ? rmdir(temporary) : unlink(temporary)))
        die("cannot remove %s: %s", temporary, strerror(errno));
}

static void export_text(const char *dir, const char *name, const Text *t) {
    char *path = xprintf("%s/%s", dir, name);
    FILE *f = file_open(path, "wb");
    file_write(f, path, t->s, t->n);
    file_sync_close(f, path);
    free(path);
}

static char *export_huggingface(Export *x, const char *temporary) {
    const GptConfig *c = &x->m.config;
    CheckpointState s;
    Text config = {NULL, 0, 0}, generation = {NULL, 0, 0};
    char *weights = xprintf("%s/model.safetensors", temporary);
    memset(&s, 0, sizeof s);
    s.eot = x->eot;
    s.eval_scale = xcalloc((size_t)(BRANCHES * c->L), sizeof *s.eval_scale);
    for (int i = 0; i < BRANCHES * c->L; i++) s.eval_scale[i] = 1;       // they are in the weights now
    directory_make(temporary);
    char *error = export_safetensors(x, weights);
    if (!error) {
        checkpoint_config_json(&config, c, &s, x->to->torch);
        export_text(temporary, "config.json", &config);
        text_printf(&generation, "{\n");
        if (x->eot >= 0)
            text_printf(&generation, "  \"bos_token_id\": %d,\n  \"eos_token_id\": %d,\n", x->eot, x->eot);
        text_printf(&generation, "  \"_from_model_config\": true\n}\n");
        export_text(temporary, "generation_config.json", &generation);
        if (x->tokenizer.n) export_text(temporary, "tokenizer.json", &x->tokenizer);
        if (x->tokenizer.n) export_text(temporary, "tokenizer_config.json", &x->tokenizer_config);
        if (x->ours.n) export_text(temporary, x->ours_name, &x->ours);
        directory_sync(temporary);
    }
    text_free(&config), text_free(&generation);
    free(weights), free(s.eval_scale);
    return error;
}

static char *export_llmc(const Export *x, const char *temporary) {
    unsigned char header[LLMC_HEADER_BYTES];
    FILE *f = file_open(temporary, "wb");
    llmc_model_header(header, &x->m.config, x->to->dtype);
    file_write(f, temporary, header, sizeof header);
    char *error = export_tensors(x, NULL, f, temporary);
    if (!error) file_sync_close(f, temporary);
    return error;
}

// Everything that can be refused before anything is written.
static void export_open(Export *x, const ExportOptions *o, const char *path) {
    memset(x, 0, sizeof *x);
    x->o = o;
    x->to = &export_dtypes[o->dtype];
    if (!*o->out) die("--out is missing\n  hint: export %s --out runs/gpt-hf", path);
    if (path_exists(o->out)) die("--out %s exists already\n  hint: name another; nothing is overwritten", o->out);
    if (o->format == FORMAT_LLMC && x->to->dtype == SAFETENSORS_F16)
        die("--dtype f16: llm.c has no such model files\n  hint: --dtype bf16 or f32");
    load_config(&x->m, path);
    for (int i = 0; i < BRANCHES * x->m.config.L; i++) x->folded |= x->m.scale[i] != 1;
    if (x->m.tied && x->folded)
        die("%s was trained with --drop-scale survival and --drop-branches tied, which cannot be folded into weights: the "
            "factor scales the sum of both branches, after the MLP has read it unscaled\n"
            "  hint: generate and evaluate apply it; for an export train with --drop-branches separate", x->m.dir);
    x->eot = export_eot(x->m.dir, x->m.config.V);
    if (o->format == FORMAT_HUGGINGFACE) export_tokenizer(x);
    weights_open(&x->weights, x->m.dir);
}

// "a/b" -> "a/.b.tmp": on the same disk, so that a rename moves it into place. Makes a, or takes ".". From malloc.
static char *export_temporary(const char *out, char **parent) {
    char *name = xstrdup(out);
    for (size_t n = strlen(name); n > 1 && name[n - 1] == '/'; n--) name[n - 1] = 0;
    char *slash = strrchr(name, '/');
    *parent = slash ? xprintf("%.*s", slash > name ? (int)(slash - name) : 1, name) : xstrdup(".");
    char *temporary = xprintf("%s/.%s.tmp", *parent, slash ? slash + 1 : name);
    free(name);
    return temporary;
}

int main(int argc, char **argv) {
    ExportOptions o;
    Options options;
    Export x;
    char *parent;
    options_init(&options, "export CHECKPOINT --out PATH [options]");
    options_add(&options, export_options(), &o);
    options.max_arguments = 1;
    options_parse(&options, argc, argv);
    if (options.n_arguments < 1) die("the checkpoint is missing\n  hint: export runs/gpt/latest --out runs/gpt-hf");
    export_open(&x, &o, options.arguments[0]);
    char *temporary = export_temporary(o.out, &parent);
    directory_make(parent);
    export_clean(temporary);
    char *error = o.format == FORMAT_LLMC ? export_llmc(&x, temporary) : export_huggingface(&x, temporary);
    if (error) {
        export_clean(temporary);
        die("%s", error);
    }
    file_rename(temporary, o.out);
    directory_sync(parent);
    printf("wrote %s: %s weights of %s%s%s\n", o.out, x.to->name, x.m.dir, x.folded ? ", survival scaling folded in" : "",
           x.tokenizer.n ? ", with its tokenizer" : "");
    weights_close(&x.weights);
    text_free(&x.tokenizer), text_free(&x.tokenizer_config), text_free(&x.ours);
    free(temporary), free(parent), free(x.m.dir), free(x.m.scale), free(x.m.run);
    options_free(&options);
    return 0;
}
