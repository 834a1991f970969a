// export.c: a checkpoint's weights in formats of other programs.
//
//     build/export runs/gpt/latest --out runs/gpt-hf
//         a directory for transformers: weights, configuration, tokenizer
//     build/export runs/gpt/latest --out gpt_bf16.bin --format llmc --dtype bf16
//         a file for llm.c
//     build/export runs/healed/latest --out runs/healed-hf
//         a run with --lora: its adapters merged into the base
//     build/export runs/healed/latest --out adapter --adapter 1
//         or unchanged, for peft
//
// The factors of survival scaling are folded into the last projections of their branches, since
// s * (x W + b) = x (s W) + s b. The output is written completely or not at all.

#include "../check.h"
#include "../files/files.h"
#include "../run/options.h"
#include "write.h"

//  OPTION(field, name, type, default, domain, help)
#define EXPORT_OPTIONS(HEADING, OPTION)                                                            \
    HEADING("Output")                                                                              \
    OPTION(out, "out", TEXT, "", "PATH",                                                           \
           "the directory, or llm.c's file, to create; it must not exist yet")                     \
    OPTION(format, "format", CHOICE, "huggingface", "huggingface|llmc",                            \
           "a directory for transformers, or a model file of llm.c (version 3 in f32, 5 in bf16)") \
    OPTION(dtype, "dtype", CHOICE, "f32", "f32|f16|bf16",                                          \
           "number format of the weights, rounded to nearest; overflow is an error")  \
    OPTION(adapter, "adapter", FLAG, "0", "0|1",                                                   \
           "of a run with --lora: copy the adapter for peft, instead of merging it into its base") \
    WRITE_TOKENIZER(OPTION)

OPTION_TABLE(EXPORT_OPTIONS, ExportOptions, export_options)

enum { FORMAT_HUGGINGFACE, FORMAT_LLMC };

typedef struct {
    const ExportOptions *o;
    Loaded m;                                            // its sizes and factors; no engine
    Weights weights;
    int folded;                                          // whether a factor is not 1
    ModelOut out;
} Export;

// For write.h: the checkpoint's weights, with the factors of survival scaling.
static void export_tensor(void *self, int p, int l, real *host) {
    const Export *x = (const Export *)self;
    const size_t n = gpt_param_size(&x->m.config, p);
    const int branch = gpt_param[p].branch;
    weights_read(&x->weights, &x->m.config, x->weights.prefix, p, l, host);
    if (gpt_param_ends_branch(p) && x->m.scale[BRANCHES * l + branch] != 1)
        for (size_t i = 0; i < n; i++)
            host[i] = (real)((double)host[i] * x->m.scale[BRANCHES * l + branch]);
}

static char *export_llmc(const Export *x, const char *temporary) {
    unsigned char header[LLMC_HEADER_BYTES];
    FILE *f = file_open(temporary, "wb");
    llmc_model_header(header, &x->out.config, x->out.to->dtype);
    file_write(f, temporary, header, sizeof header);
    char *error = write_tensors(&x->out, NULL, f, temporary);
    if (!error) file_sync_close(f, temporary);
    return error;
}

// The adapter unchanged, without what only a run needs.
static void export_adapter(const Export *x, const char *temporary) {
    static const char *const names[] = {LORA_MODEL, LORA_CONFIG};
    directory_make(temporary);
    for (int i = 0; i < 2; i++) {
        char *path = xprintf("%s/%s", x->m.dir, names[i]);
        Text t = write_read(path);
        write_text(temporary, names[i], &t);
        text_free(&t), free(path);
    }
    write_tokenizer_files(&x->out, temporary);
    directory_sync(temporary);
}

// All checks that can fail before anything is written.
static void export_open(Export *x, const ExportOptions *o, const char *path) {
    memset(x, 0, sizeof *x);
    x->o = o;
    if (!*o->out) die("--out is missing\n  hint: export %s --out runs/gpt-hf", path);
    if (path_exists(o->out))
        die("--out %s exists already\n  hint: choose another; nothing is overwritten", o->out);
    if (o->format == FORMAT_LLMC && write_dtypes[o->dtype].dtype == SAFETENSORS_F16)
        die("--dtype f16: llm.c has no such model files\n  hint: --dtype bf16 or f32");
    load_config(&x->m, path);
    if (o->adapter && !lora_is_adapter(x->m.dir))
        die("--adapter 1: %s has no adapter\n  hint: --adapter 0 writes its weights", x->m.dir);
    if (o->adapter && (o->format == FORMAT_LLMC || o->dtype != 0))
        die("--adapter 1 copies the adapter as it is\n  hint: leave out --format and --dtype");
    for (int i = 0; i < BRANCHES * x->m.config.L; i++) x->folded |= x->m.scale[i] != 1;
    if (x->m.tied && x->folded)
        die("%s was trained with --drop-scale survival and --drop-branches tied, which cannot be "
            "folded into weights: the "
            "factor scales the sum of both branches, after the MLP has read it unscaled\n"
            "  hint: generate and evaluate apply it; for an export train with --drop-branches "
            "separate",
            x->m.dir);
    const ModelOut out = {.config = x->m.config,
                          .to = &write_dtypes[o->dtype],
                          .from = x->m.dir,
                          .base = strcmp(x->m.base, x->m.dir) ? x->m.base : NULL,
                          .run = x->m.run,
                          .given = o->tokenizer,
                          .llmc = o->format == FORMAT_LLMC,
                          .self = x,
                          .tensor = export_tensor,
                          .eot = write_eot(x->m.base, x->m.config.V)};
    x->out = out;
    if (o->format == FORMAT_HUGGINGFACE) write_tokenizer(&x->out);
    weights_open(&x->weights, x->m.dir);
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
    if (options.n_arguments < 1)
        die("the checkpoint is missing\n  hint: export runs/gpt/latest --out runs/gpt-hf");
    export_open(&x, &o, options.arguments[0]);
    char *temporary = write_temporary(o.out, &parent);
    directory_make(parent);
    write_clean(temporary);
    char *error = NULL;
    if (o.adapter) export_adapter(&x, temporary);
    else if (o.format == FORMAT_LLMC) error = export_llmc(&x, temporary);
    else error = write_huggingface(&x.out, temporary);
    if (error) {
        write_clean(temporary);
        die("%s", error);
    }
    write_commit(temporary, o.out, parent);
    printf("wrote %s: %s %s of %s%s%s%s\n", o.out, x.out.to->name,
           o.adapter ? "adapter" : "weights", x.m.dir,
           x.weights.lora.rank && !o.adapter ? ", its adapters merged in" : "",
           x.folded ? ", survival scaling folded in" : "",
           x.out.tokenizer.n ? ", with its tokenizer" : "");
    weights_close(&x.weights);
    write_free(&x.out);
    free(temporary), free(parent), free(x.m.dir), free(x.m.base), free(x.m.scale), free(x.m.run);
    options_free(&options);
    return 0;
}
