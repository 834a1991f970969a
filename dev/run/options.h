// options.h: options from the command line and config files, and the table of the trainer's
// options.
//
// A table is an X-macro that states each option once: it expands to the fields of a struct and to
// the specs that drive the parser, --help and the dump. Tables chain, so a tool can add options of
// its own to the trainer's:
//
//     TrainOptions t;
//     Options o;
//     options_init(&o, "train_gpt [options]");
//     options_add(&o, train_options(), &t);             // fills in the defaults
//     options_parse(&o, argc, argv); // or exits: --help, an error
//     options_apply_recipe(&o, &t);
//     ...
//     options_free(&o);
//
// Command line: --name value or --name=value; '_' and '-' are the same; names are never
// abbreviated; the last of equal names wins; an integer may be written 1e6. Config files: lines
// `name = value`, '#' starts a comment, later lines win; a value with blanks at its ends or with
// '#' is written in double quotes, with the escapes \" \\ \n \r \t. The command line overrides
// every config.
#ifndef OPTIONS_H
#define OPTIONS_H

#include "../check.h"
#include "../files/files.h"
#include "program.h"
#include "synonyms.h"
#include <limits.h>
#include <math.h>
#include <stddef.h>

// ---- Tables ----

// A number of optimizer steps, or a percentage of the run.
typedef struct { double value; int percent; } Span;

// The steps of a span in a run of `total` steps, rounded to the nearest. May exceed total.
static inline int64_t span_steps(Span s, int64_t total) {
    return (int64_t)llround(s.percent ? s.value * (double)total / 100 : s.value);
}

// Reads a span at the beginning of text. Returns what follows it, or NULL if there is none.
static inline const char *span_read(Span *s, const char *text) {
    // no nan, inf, hexadecimal numbers, blanks
    const char *stop = text + strspn(text, "0123456789+-.eE");
    char *end;
    s->value = strtod(text, &end);
    s->percent = *end == '%';
    if (end == text || end != stop || s->value < 0) return NULL;
    if (s->percent) return s->value <= 100 ? end + 1 : NULL;
    return s->value <= 1e15 && s->value == floor(s->value) ? end : NULL;
}

// Types, their fields, and the meaning of `domain`, which is both checked and shown in --help.
//     INTEGER  int64_t   an interval: "[1,1024]", "[0,inf)"
//     NUMBER   double    an interval: "[0,1)"
//     TEXT     char *    the kind of value: "FILE"; in "PATH=latest", latest is the value of the
//                        bare option
//     CHOICE   int       the words "a|b|c"; the field is the index of one
//     SPAN     Span      ""
//     FLAG     int       "0|1"; without a value it means 1
// The others belong to the parser and have no field.
enum { OPTION_INTEGER, OPTION_NUMBER, OPTION_TEXT, OPTION_CHOICE, OPTION_SPAN, OPTION_FLAG,
       OPTION_HEADING, OPTION_CONFIG, OPTION_HELP, OPTION_VERSION };
#define OPTION_FIELD_INTEGER int64_t
#define OPTION_FIELD_NUMBER  double
#define OPTION_FIELD_TEXT    char *
#define OPTION_FIELD_CHOICE  int
#define OPTION_FIELD_SPAN    Span
#define OPTION_FIELD_FLAG    int

typedef struct {
    const char *name;                     // with '-'; of a heading, its title
    int type;
    size_t offset;                        // of the field in the struct of values
    const char *initial, *domain, *help;  // the default, as text; see above; one sentence with
                                          // units
} OptionSpec;

typedef struct { const OptionSpec *specs; int n; } OptionTable;

// Generates from a table, #define TABLE(HEADING, OPTION), the struct of its values and a function
// that returns its specs.
#define OPTION_FIELD(field, name, type, initial, domain, help) OPTION_FIELD_##type field;
#define OPTION_NO_FIELD(title)
#define OPTION_SPEC(field, name, type, initial, domain, help) \
    {name, OPTION_##type, offsetof(Values, field), initial, domain, help},
#define OPTION_HEADING_SPEC(title) {title, OPTION_HEADING, 0, "", "", ""},
#define OPTION_TABLE(TABLE, Struct, function)                                                     \
    typedef struct { TABLE(OPTION_NO_FIELD, OPTION_FIELD) } Struct;                               \
    static inline OptionTable function(void) {                                                    \
        typedef Struct Values;                                                                    \
        static const OptionSpec specs[] = {TABLE(OPTION_HEADING_SPEC, OPTION_SPEC)};              \
        const OptionTable table = {specs, sizeof specs / sizeof specs[0]};                        \
        return table;                                                                             \
    }

// ---- The trainer's options ----

// Published settings of drop path: each is a config of the options that the paper's method fixes;
// p_max is the user's. PLD's gamma is 100/steps, so that our exp ramp, which ends at gamma * t = ln
// 100, takes 4.6% of the run.
#define DROP_RECIPES(X)                                                                     \
    X(huang2016,                                                                            \
      "drop-unit=batch\ndrop-branches=tied\ndrop-depth=linear\ndrop-scale=survival\n"       \
      "drop-ramp-up=0")                                                                     \
    X(pld2020,                                                                              \
      "drop-unit=batch\ndrop-branches=tied\ndrop-depth=linear\ndrop-scale=inverted-each\n"  \
      "drop-ramp-shape=exp\ndrop-ramp-up=4.6%")                                             \
    X(layerdrop2019,                                                                        \
      "drop-unit=batch\ndrop-branches=tied\ndrop-depth=uniform\ndrop-scale=none\n"          \
      "drop-ramp-up=0")                                                                     \
    X(layerskip2024,                                                                        \
      "drop-unit=row\ndrop-branches=tied\ndrop-depth=exp\ndrop-scale=none\n"                \
      "drop-ramp-shape=exp2\ndrop-ramp-up=100%")                                            \
    X(early2023,                                                                            \
      "drop-unit=row\ndrop-depth=linear0\ndrop-scale=inverted\ndrop-ramp-up=0\n"            \
      "drop-ramp-down=17%\ndrop-recover=83%")                                               \
    X(elhoushi2026,                                                                         \
      "drop-unit=row\ndrop-branches=tied\ndrop-depth=linear0\ndrop-scale=inverted-each\n"   \
      "drop-ramp-shape=linear\ndrop-ramp-up=0\ndrop-ramp-down=100%")                        \
    X(best2026,                                                                             \
      "drop-unit=row\ndrop-branches=separate\ndrop-depth=linear0\ndrop-scale=inverted\n"    \
      "drop-ramp-shape=linear\ndrop-ramp-up=0\ndrop-ramp-down=100%")                        \
    X(bu2026,                                                                               \
      "grow=1:0,all:80%\ngrow-init=random\nlr-schedule=wsd\nwarmup=2%\nlr-decay=10%")
#define OPTION_RECIPE_NAME(name, config) "|" #name

// The words of a choice are in the order of their enum: gpt_presets (gpt.h), SCHEDULE_*
// (schedule.h), DEPTH_*, SHAPE_*, UNIT_*, BRANCHES_*, SAMPLING_*, SCALE_* (drop_path.h), DTYPE_*,
// RECOMPUTE_* and ROUNDING_* (engine.h), and those below.
enum { ADAM_DENSE, ADAM_SKIP };
enum { ON_ERROR_CONTINUE, ON_ERROR_STOP };

//  OPTION(field, name, type, default, domain, help)
#define TRAIN_OPTIONS(HEADING, OPTION)                                                             \
  HEADING("Data")                                                                                  \
    OPTION(train, "train", TEXT, "", "GLOB",                                                       \
           "token shards to train on; quote a pattern: 'data/train_*.bin'")                        \
    OPTION(val, "val", TEXT, "", "GLOB", "token shards to evaluate on")                            \
    OPTION(tokenizer, "tokenizer", TEXT, "", "FILE",                                               \
           "the shards' tokenizer; default: the one next to --train")                              \
    OPTION(out, "out", TEXT, "runs/gpt", "DIR",                                                    \
           "directory of this run's checkpoints, metrics.jsonl and config.txt")                    \
  HEADING("Model")                                                                                 \
    OPTION(preset, "preset", CHOICE, "tiny", "tiny|small|gpt2|gpt2-medium|gpt2-large|gpt2-xl",     \
           "model sizes, which the next options override individually")                            \
    OPTION(layers, "layers", INTEGER, "0", "[0,1024]", "layers; 0: the preset's")                  \
    OPTION(heads, "heads", INTEGER, "0", "[0,65536]",                                              \
           "attention heads, a divisor of the channels; 0: the preset's")                          \
    OPTION(channels, "channels", INTEGER, "0", "[0,65536]",                                        \
           "width of the residual stream; 0: the preset's")                                        \
    OPTION(seq_len, "seq-len", INTEGER, "0", "[0,1048576]", "tokens per row; 0: the preset's")     \
    OPTION(vocab_size, "vocab-size", INTEGER, "0", "[0,16777216]",                                 \
           "vocabulary size; 0: the tokenizer's if there is one, otherwise the preset's")          \
    OPTION(init_from, "init-from", TEXT, "", "PATH",                                               \
           "start from these weights at step 0: a checkpoint directory, ours or a Hugging Face "   \
               "GPT-2, a run's directory, for its latest, or a model file of llm.c")               \
  HEADING("Run")                                                                                   \
    OPTION(batch, "batch", INTEGER, "8", "[1,65536]", "rows per micro-batch")                      \
    OPTION(total_batch, "total-batch", INTEGER, "0", "[0,1e12]",                                   \
           "tokens per optimizer step; 0: one micro-batch")                                        \
    OPTION(steps, "steps", INTEGER, "1000", "[1,1e12]", "optimizer steps in the run")              \
    OPTION(epochs, "epochs", NUMBER, "0", "[0,1e6]",                                               \
           "length of the run in passes over --train; 0: use --steps")                             \
    OPTION(resume, "resume", TEXT, "", "PATH=latest",                                              \
           "continue from this checkpoint; without PATH, from the latest in --out")                \
    OPTION(seed, "seed", INTEGER, "1337", "[0,inf)", "determines all randomness of the run")       \
    OPTION(threads, "threads", INTEGER, "0", "[0,4096]",                                           \
           "CPU threads; 0: all that the machine offers")                                          \
    OPTION(dtype, "dtype", CHOICE, "auto", "fp32|bf16|auto|tf32",                                  \
           "number format to which matmul operands are rounded; sums and weights stay fp32. "      \
               "auto: fp32 on the CPU, bf16 on the GPU; tf32 is for GPUs")                         \
    OPTION(recompute, "recompute", CHOICE, "gelu", "gelu|none|branch",                             \
           "GPU: what the backward pass recomputes instead of saving it: the outputs of "          \
               "LayerNorm and GELU, nothing, or all of a branch but its input")                    \
    OPTION(graphs, "graphs", FLAG, "0", "0|1",                                                     \
           "GPU: launch each branch as a CUDA graph, for small models whose kernels are shorter "  \
               "than their launches; the same bits. Not yet measured on a GPU")                    \
    OPTION(max_bad_steps, "max-bad-steps", INTEGER, "10", "[1,1e9]",                               \
           "stop after this many consecutive steps whose loss or gradient is not finite; such "    \
               "steps change nothing")                                                             \
    OPTION(skip_loss_zscore, "skip-loss-zscore", NUMBER, "0", "[0,inf)",                           \
           "skip a step whose loss is this many standard deviations above the last 128; 0: never") \
    OPTION(skip_norm_zscore, "skip-norm-zscore", NUMBER, "0", "[0,inf)",                           \
           "the same for its gradient norm; 0: never")                                             \
    OPTION(selfcheck, "selfcheck", FLAG, "1", "0|1",                                               \
           "at start, compare a tiny training run with stored results")                            \
    OPTION(dry_run, "dry-run", FLAG, "0", "0|1",                                                   \
           "report sizes, memory, FLOPs, and the expected saving and time, without training or "   \
               "writing files")                                                                    \
    OPTION(device, "device", TEXT, "", "NAME",                                                     \
           "with --dry-run: predict the time of a step on h100, a100 or rtx4090, or on several, "  \
               "as 8xh100; none needs to be present")                                              \
  HEADING("Optimizer (AdamW)")                                                                     \
    OPTION(lr, "lr", NUMBER, "6e-4", "[0,inf)", "peak learning rate")                              \
    OPTION(lr_schedule, "lr-schedule", CHOICE, "cosine", "cosine|linear|wsd|constant",             \
           "shape after the warm-up; wsd: constant, then linear over --lr-decay")                  \
    OPTION(warmup, "warmup", SPAN, "2%", "", "linear warm-up of the learning rate")                \
    OPTION(lr_final, "lr-final", NUMBER, "0.1", "[0,1]",                                           \
           "final learning rate as a fraction of --lr")                                            \
    OPTION(lr_decay, "lr-decay", SPAN, "20%", "",                                                  \
           "length of the final decay of --lr-schedule wsd")                                       \
    OPTION(weight_decay, "weight-decay", NUMBER, "0.1", "[0,inf)",                                 \
           "decoupled weight decay, for matrices only")                                            \
    OPTION(beta1, "beta1", NUMBER, "0.9", "[0,1)", "decay of the first moment, per step")          \
    OPTION(beta2, "beta2", NUMBER, "0.95", "[0,1)", "decay of the second moment, per step")        \
    OPTION(eps, "eps", NUMBER, "1e-8", "(0,inf)", "added to the root of the second moment")        \
    OPTION(grad_clip, "grad-clip", NUMBER, "1", "[0,inf)",                                         \
           "largest norm of the whole gradient, with 1e-6 added as in PyTorch's clip_grad_norm_; " \
               "0: no clipping")                                                                   \
    OPTION(train_last, "train-last", INTEGER, "0", "[0,1024]",                                     \
           "train only this many last layers, ln_f and wte; the rest stays as given by "           \
               "--init-from; 0: all")                                                              \
    OPTION(rounding, "rounding", CHOICE, "nearest", "nearest|stochastic",                          \
           "GPU, --dtype bf16: how the fp32 weights are rounded to bf16 for forward and "          \
               "backward; stochastic: up or down at random, so that the mean is exact")            \
  HEADING("Adapters (LoRA): all other weights stay as given by --init-from; checkpoints are "      \
          "peft's")                                                                                \
    OPTION(lora, "lora", INTEGER, "0", "[0,1024]",                                                 \
           "rank of the adapters; 0: none. With adapters, the default of --drop-path is 0.05")     \
    OPTION(lora_alpha, "lora-alpha", NUMBER, "0", "[0,inf)",                                       \
           "adapters are scaled by alpha / rank; 0: twice the rank")                               \
    OPTION(lora_dropout, "lora-dropout", NUMBER, "0", "[0,1)", "dropout of the adapters' inputs")  \
    OPTION(lora_targets, "lora-targets", TEXT, "qkv,attproj,fc,fcproj", "LIST",                    \
           "the matmuls with adapters")                                                            \
    OPTION(lora_norms, "lora-norms", FLAG, "0", "0|1", "train ln_1, ln_2 and ln_f as well")        \
  HEADING("Dropout and label smoothing: combined regularizers should each be weaker")              \
    OPTION(dropout, "dropout", NUMBER, "0", "[0,1)",                                               \
           "rate of dropout at GPT-2's places: sets the next three. GPT-2 used 0.1; for text "     \
               "that is seen once, 0 is better")                                                   \
    OPTION(dropout_embd, "dropout-embd", NUMBER, "0", "[0,1)", "for the sum of the embeddings")    \
    OPTION(dropout_attn, "dropout-attn", NUMBER, "0", "[0,1)", "for attention's probabilities")    \
    OPTION(dropout_resid, "dropout-resid", NUMBER, "0", "[0,1)", "for each branch's output")       \
    OPTION(dropout_start, "dropout-start", SPAN, "0", "",                                          \
           "steps before the ramp, without dropout")                                               \
    OPTION(dropout_ramp_up, "dropout-ramp-up", SPAN, "0", "",                                      \
           "steps in which the rates rise; with a start: late dropout")                            \
    OPTION(dropout_ramp_down, "dropout-ramp-down", SPAN, "0", "",                                  \
           "steps in which they fall to 0, before --dropout-recover")                              \
    OPTION(dropout_recover, "dropout-recover", SPAN, "0", "",                                      \
           "final steps of the run, without dropout; early dropout: 80%, say")                     \
    OPTION(label_smoothing, "label-smoothing", NUMBER, "0", "[0,1)",                               \
           "this share of a target's weight is spread over all tokens; val_loss is unaffected")    \
  HEADING("Early exits: the loss is also read after earlier layers, through the same head "        \
          "(LayerSkip)")                                                                           \
    OPTION(exit_scale, "exit-scale", NUMBER, "0", "[0,1]",                                         \
           "weight of the exits' losses, e_scale; 0: none. LayerSkip used 0.1 to 1. Each exit "    \
               "of a step costs a head, forward and backward")                                     \
    OPTION(exit_curriculum, "exit-curriculum", CHOICE, "rotational", "rotational|gradual|all",     \
           "which exits a step has: every R-th layer in turn; from the top down in the first "     \
               "half of the run; all")                                                             \
    OPTION(exit_every, "exit-every", INTEGER, "8", "[1,1024]", "R of rotational")                  \
  HEADING("AttentionDrop (arXiv 2504.12088) and consistency: unproven on language models")         \
    OPTION(attentiondrop, "attentiondrop", CHOICE, "none", "none|hard|blur",                       \
           "edits attention's scores in training: hard drops some of the largest of each query, "  \
               "blur averages them with their neighbours'")                                        \
    OPTION(attentiondrop_p, "attentiondrop-p", NUMBER, "0.1", "[0,1)",                             \
           "hard: the rate at which each of the largest scores is dropped")                        \
    OPTION(attentiondrop_k, "attentiondrop-k", INTEGER, "8", "[1,64]",                             \
           "hard: how many of a query's scores are candidates")                                    \
    OPTION(attentiondrop_mode, "attentiondrop-mode", CHOICE, "zero", "zero|mask",                  \
           "hard: a dropped score becomes 0, or its key is not seen at all")                       \
    OPTION(attentiondrop_sigma, "attentiondrop-sigma", NUMBER, "1", "(0,16]",                      \
           "blur: the largest deviation, in keys; each step draws one from 0 to this")             \
    OPTION(attentiondrop_width, "attentiondrop-width", INTEGER, "5", "[3,17]",                     \
           "blur: keys under the kernel, an odd number")                                           \
    OPTION(attentiondrop_layers, "attentiondrop-layers", TEXT, "all", "LIST",                      \
           "where: all, last, or layers from 0 on, as 0,3-5")                                      \
    OPTION(attentiondrop_warmup, "attentiondrop-warmup", SPAN, "0", "",                            \
           "steps in which the rate, or the largest deviation, rises from 0")                      \
    OPTION(consistency, "consistency", NUMBER, "0", "[0,inf)",                                     \
           "each row is read twice with its own noise, and this times the divergence of the two "  \
               "predictions is added to the loss; with --dropout alone this is R-Drop (Wu et al. " \
               "2021). A step costs twice as much")                                                \
    OPTION(consistency_kl, "consistency-kl", CHOICE, "forward", "forward|symmetric",               \
           "KL(first || second), or the mean of both directions")                                  \
  HEADING("A teacher: a trained model of the same tokens, of any depth and width")                 \
    OPTION(teacher, "teacher", TEXT, "", "PATH",                                                   \
           "a checkpoint directory, ours or a Hugging Face GPT-2, or a run's directory; it "       \
               "reads each batch, which costs a forward pass of it")                               \
    OPTION(distill, "distill", NUMBER, "0", "[0,1]",                                               \
           "distillation: this share of the loss is the divergence from the teacher's "            \
               "distribution of the next token (Hinton et al. 2015); 0.5 is usual")                \
    OPTION(distill_temperature, "distill-temperature", NUMBER, "1", "[0.01,100]",                  \
           "both distributions are softmaxes of the logits divided by this. DistilBERT used 2")    \
    OPTION(align, "align", CHOICE, "none", "none|attention|attribution",                           \
           "attention: compares the means over heads of both models' attention, layer by layer; "  \
               "attribution: what each token contributes to the loss, its gradient times its "     \
               "embedding (LAAT), at three times the cost. The distance is added to the loss")     \
    OPTION(align_gamma, "align-gamma", NUMBER, "1", "[0,inf)", "the distance's weight")            \
    OPTION(align_decay, "align-decay", NUMBER, "1", "(0,1]",                                       \
           "the weight is multiplied by this after each epoch")                                    \
    OPTION(align_loss, "align-loss", CHOICE, "cosine", "cosine|kl",                                \
           "distance of a query's two rows of probabilities: of their directions, 2(1 - cos), or " \
               "KL(teacher || student)")                                                           \
    OPTION(align_layers, "align-layers", TEXT, "all", "LIST",                                      \
           "which of the student's layers: all, last, or layers from 0 on, as 0,3-5; each has a "  \
               "partner at the same share of the teacher's depth")                                 \
    OPTION(align_scores, "align-scores", TEXT, "", "FILE",                                         \
           "with --align attribution, instead of a teacher: a text with a number from -20 to 20 "  \
               "for each token, in their order: how much a token should count, 0: no opinion")     \
  HEADING("Growing depth: layers that do not exist yet cost nothing")                              \
    OPTION(grow, "grow", TEXT, "", "LIST",                                                         \
           "phases LAYERS:STEP with ever more layers, as \"1:0,all:80%\"; STEP may be a "          \
               "percentage of the run")                                                            \
    OPTION(grow_init, "grow-init", CHOICE, "random", "random|copy|zero",                           \
           "how new layers start: with their initial weights, as copies of others, or with "       \
               "branches that end in 0")                                                           \
    OPTION(grow_at, "grow-at", CHOICE, "top", "top|spread",                                        \
           "where new layers go: on top, or between the others")                                   \
    OPTION(grow_warmup, "grow-warmup", SPAN, "0", "",                                              \
           "steps in which the new layers' scale rises from 0 to 1")                               \
  HEADING("Evaluation, samples, checkpoints")                                                      \
    OPTION(eval_every, "eval-every", INTEGER, "250", "[0,1e12]",                                   \
           "steps between evaluations; 0: only at the end")                                        \
    OPTION(eval_tokens, "eval-tokens", INTEGER, "131072", "[0,1e15]",                              \
           "tokens of --val per evaluation, rounded up to whole rows; 0: all")                     \
    OPTION(eval_depths, "eval-depths", TEXT, "", "LIST",                                           \
           "each evaluation also runs with only these shares of the layers, as 0.25,0.5,0.75: "    \
               "with the first ones (prefix) and with evenly spaced ones (even). Training is "     \
               "unaffected")                                                                       \
    OPTION(save_every, "save-every", INTEGER, "1000", "[0,1e12]",                                  \
           "steps between checkpoints; 0: only at the end")                                        \
    OPTION(keep, "keep", INTEGER, "2", "[0,1e9]",                                                  \
           "how many of the newest checkpoints to keep; 0: all")                                   \
    OPTION(on_save_error, "on-save-error", CHOICE, "continue", "continue|stop",                    \
           "if a checkpoint cannot be written: continue until the next one, or exit with code 1. " \
               "The last one must succeed")                                                        \
    OPTION(sample_every, "sample-every", INTEGER, "0", "[0,1e12]",                                 \
           "steps between samples of text; 0: never")                                              \
    OPTION(sample_tokens, "sample-tokens", INTEGER, "200", "[1,1e9]", "tokens per sample")         \
    OPTION(prompt, "prompt", TEXT, "", "TEXT", "the start of each sample")                         \
    OPTION(record_entropy, "record-entropy", FLAG, "0", "0|1",                                     \
           "at each evaluation, write the mean entropy of attention's probabilities to "           \
               "metrics.jsonl: low if queries look at few tokens")                                 \
    OPTION(record_micro, "record-micro", FLAG, "0", "0|1",                                         \
           "write each micro-batch's loss to metrics.jsonl, for statistics of which layers "       \
               "matter")                                                                           \
    OPTION(log_every, "log-every", INTEGER, "10", "[1,1e12]",                                      \
           "steps between lines on the console")                                                   \
  HEADING("Data parallel: processes share a step's micro-batches; on CPUs for tests and small "    \
          "clusters only")                                                                         \
    OPTION(rendezvous, "rendezvous", TEXT, "", "PLACE",                                            \
           "where processes meet: tcp://HOST:PORT of rank 0, or dir:/PATH that all see; default: " \
               "MASTER_ADDR and MASTER_PORT. mpirun, srun, torchrun and scripts/launch.sh give "   \
               "each process its rank")                                                            \
    OPTION(job_token, "job-token", TEXT, "", "TEXT",                                               \
           "distinguishes this job's processes from others; default: DROPPATH_JOB_TOKEN or the "   \
               "launcher's job number")                                                            \
    OPTION(zero, "zero", CHOICE, "0", "0|1",                                                       \
           "1: each GPU stores its share of the optimizer's moments, and with --dtype bf16 of "    \
               "the fp32 weights (ZeRO-1)")                                                        \
    OPTION(reduce_fp32, "reduce-fp32", FLAG, "0", "0|1",                                           \
           "sum gradients over the GPUs in fp32 instead of --dtype")                               \
  HEADING("Drop path: rate = drop-path * depth(layer) * ramp(step)")                               \
    OPTION(drop_path, "drop-path", NUMBER, "0", "[0,1)",                                           \
           "p_max, the largest rate at which a branch is dropped; 0: plain training. Warns if a "  \
               "run drops more than about 5% of the branches' work on average (10% from 250M "     \
               "parameters on, 20% from 600M; at least 16% if the rates fall to 0): "              \
               "dev/DROP_PATH.md gives the evidence. Rates are rounded to multiples of 2^-32")     \
    OPTION(drop_recipe, "drop-recipe", CHOICE, "none", "none" DROP_RECIPES(OPTION_RECIPE_NAME),    \
           "sets the options below as published; single options override it. Huang et al. "        \
               "2016, Deep Networks with Stochastic Depth; Zhang and He 2020, progressive "        \
               "layer dropping; Fan et al. 2019, LayerDrop; Elhoushi et al. 2024, LayerSkip; "     \
               "Liu et al. 2023, Dropout Reduces Underfitting; Don't Drop Dropout, ICML 2026; "    \
               "best2026, the best of our own dev/studies, with --drop-path 0.6; Bu et al. "       \
               "2511.04981, depth expansion, which grows and drops nothing")                       \
    OPTION(drop_depth, "drop-depth", CHOICE, "linear", "linear|linear0|uniform|exp|alternate",     \
           "depth of layer l = 1..L: l/L, (l-1)/(L-1), 1, 2^((l-1)/(L-1)) - 1, or 1 for even l "   \
               "and "                                                                              \
           "0 for odd l")                                                                          \
    OPTION(drop_rates, "drop-rates", TEXT, "", "LIST",                                             \
           "the largest rate of each layer, as 0,0,0.1,0.2: instead of --drop-path and "           \
               "--drop-depth")                                                                     \
    OPTION(drop_protect, "drop-protect", CHOICE, "none", "none|first|last|first,last",             \
           "layers that are never dropped")                                                        \
    OPTION(drop_start, "drop-start", SPAN, "0", "", "steps before the ramp, without drops")        \
    OPTION(drop_ramp_from, "drop-ramp-from", NUMBER, "0", "[0,1]",                                 \
           "where the ramp starts, as a fraction of the maximum")                                  \
    OPTION(drop_ramp_up, "drop-ramp-up", SPAN, "10%", "", "steps in which the ramp rises to 1")    \
    OPTION(drop_ramp_down, "drop-ramp-down", SPAN, "0", "",                                        \
           "steps in which it falls to 0, before --drop-recover")                                  \
    OPTION(drop_recover, "drop-recover", SPAN, "0", "", "final steps of the run, at full depth")   \
    OPTION(drop_ramp_shape, "drop-ramp-shape", CHOICE, "linear", "linear|cosine|exp|exp2",         \
           "how the ramp rises and falls; exp: 1 - e^(-gamma t), to 0.99; exp2: 2^u - 1, u from "  \
               "0 to 1")                                                                           \
    OPTION(drop_unit, "drop-unit", CHOICE, "batch", "batch|row",                                   \
           "one draw per micro-batch, or one per row")                                             \
    OPTION(drop_branches, "drop-branches", CHOICE, "separate", "separate|tied|attn|mlp",           \
           "attention and MLP drawn separately, as one block, or only one of them dropped")        \
    OPTION(drop_sampling, "drop-sampling", CHOICE, "systematic", "systematic|bernoulli",           \
           "the same rates; systematic draws nearly the same number of drops each time, "          \
               "bernoulli independently")                                                          \
    OPTION(drop_scale, "drop-scale", CHOICE, "inverted", "inverted|none|survival|inverted-each",   \
           "kept branches times 1/(1-p), never scaled, or times 1-p in evaluation. A tied block "  \
               "is scaled as one; inverted-each scales each of its branches, which is biased, "    \
               "but follows the papers of two recipes")                                            \
    OPTION(drop_sync, "drop-sync", FLAG, "1", "0|1",                                               \
           "with --drop-unit batch, all ranks drop the same branches")                             \
    OPTION(drop_adam, "drop-adam", CHOICE, "dense", "dense|skip",                                  \
           "a branch dropped in a whole step is updated with gradient 0, or not at all")           \
    OPTION(drop_adapt, "drop-adapt", NUMBER, "0", "[0,1]",                                         \
           "an experiment, with --drop-unit row: rows of frequent tokens are dropped up to this "  \
               "share more often, others less; the mean rate, the cost and the scale stay")        \
    OPTION(drop_replay, "drop-replay", TEXT, "", "FILE",                                           \
           "replay the plans of the steps from this metrics.jsonl")

OPTION_TABLE(TRAIN_OPTIONS, TrainOptions, train_options)

static const char *const drop_recipe_configs[] = {
    "",                                                  // none
#define X(name, config) config,
    DROP_RECIPES(X)
#undef X
};

// ---- The chain of tables ----

// The source of a value; a higher one wins. A recipe ranks just below its own source, so that a
// recipe on the command line also overrides single options of a config file, such as the config.txt
// of an earlier run.
enum { FROM_DEFAULT, FROM_CONFIG_RECIPE, FROM_CONFIG, FROM_COMMAND_RECIPE, FROM_COMMAND };

typedef struct {
    const OptionSpec *specs;
    int n;
    void *values;           // the struct whose fields the specs describe
    unsigned char *source;  // (n) FROM_*
} OptionSet;

enum { OPTIONS_MAX_SETS = 4 };

typedef struct {
    const char *usage;                // "generate CHECKPOINT [options]"
    const char *engine;               // the engine, for --version; NULL: none
    const char *notes;                // printed at the end of --help, or NULL
    OptionSet set[OPTIONS_MAX_SETS];  // the first is the parser's own
    int n_sets;
    int max_arguments, n_arguments;   // positional arguments: allowed (options_init says 0), given
    const char **arguments;           // (n_arguments) they point into argv
} Options;

typedef struct { OptionSet *set; const OptionSpec *spec; } OptionRef;

typedef union { int64_t integer; double number; const char *text; int choice; Span span;
                } OptionValue;

static inline void *options_field(OptionRef r) { return (char *)r.set->values + r.spec->offset; }

static inline unsigned char *options_source(OptionRef r) {
    return &r.set->source[r.spec - r.set->specs];
}

// ---- One value: text to field and back ----

static inline int options_inside(const char *interval, double x) {
    char *s;
    double low = strtod(interval + 1, &s), high = strtod(s + 1, &s);
    CHECK(*s == ')' || *s == ']', "bad interval %s", interval);
    return (*interval == '(' ? x > low : x >= low) && (*s == ')' ? x < high : x <= high);
}

// Word i of "a|b|c" and its length, or NULL if there are fewer.
static inline const char *options_word(const char *words, int i, size_t *length) {
    for (; i > 0; i--) {
        words = strchr(words, '|');
        if (!words) return NULL;
        words++;
    }
    *length = strcspn(words, "|");
    return words;
}

// Whether a number is in an interval, and still is when rounded to the type that computes with it:
// there 1e-46 is 0 and 0.9999999999 is 1.
static inline int options_inside_as_real(const char *interval, double x) {
    const double rounded = (double)(real)x;
    return options_inside(interval, x) && options_inside(interval, rounded) &&
           (rounded != 0) == (x != 0);
}

// Reads a value; returns whether the text matches the spec's type and domain. A text value is
// borrowed.
static inline int options_read(const OptionSpec *s, const char *text, OptionValue *v) {
    // no nan, inf, hexadecimal numbers, blanks
    const char *stop = text + strspn(text, "0123456789+-.eE");
    char *end;
    size_t length;
    switch (s->type) {
    case OPTION_INTEGER:
        return whole_read(&v->integer, text) == WHOLE_OK &&
            options_inside(s->domain, (double)v->integer);
    case OPTION_NUMBER:
        v->number = strtod(text, &end);
        return end > text && end == stop && !*end && options_inside_as_real(s->domain, v->number);
    case OPTION_SPAN:
        stop = span_read(&v->span, text);
        return stop && !*stop;
    case OPTION_CHOICE:
    case OPTION_FLAG:
        for (v->choice = 0;; v->choice++) {
            const char *word = options_word(s->domain, v->choice, &length);
            if (!word) return 0;
            if (strlen(text) == length && !memcmp(word, text, length)) return 1;
        }
    default:
        v->text = text;
        return 1;
    }
}

static inline void options_store(OptionRef r, OptionValue v) {
    void *field = options_field(r);
    switch (r.spec->type) {
    case OPTION_INTEGER: *(int64_t *)field = v.integer; break;
    case OPTION_NUMBER:  *(double *)field = v.number; break;
    case OPTION_SPAN:    *(Span *)field = v.span; break;
    case OPTION_CHOICE:
    case OPTION_FLAG:    *(int *)field = v.choice; break;
    default: {
        char *old = *(char **)field;
        *(char **)field = xstrdup(v.text);
        free(old);
    }
    }
}

// Whether a refused value is within the spec's interval, but too large for 64 bits.
static inline int options_too_large(const OptionSpec *s, const char *text) {
    int64_t ignored;
    return s->type == OPTION_INTEGER && whole_read(&ignored, text) == WHOLE_TOO_LARGE &&
           options_inside(s->domain, strtod(text, NULL));
}

// A description of the spec's values; from malloc.
static inline char *options_wanted(const OptionSpec *s) {
    switch (s->type) {
    case OPTION_INTEGER: return xprintf("a whole number in %s", s->domain);
    case OPTION_NUMBER:  return xprintf("a number in %s", s->domain);
    case OPTION_SPAN:
        return xprintf("a number of steps, or a percentage of the run up to 100%%");
    case OPTION_CHOICE:
    case OPTION_FLAG:    return xprintf("one of %s", s->domain);
    default:             return xstrdup(s->domain);
    }
}

// The value of the bare option, or NULL if it needs one.
static inline const char *options_bare(const OptionSpec *s) {
    if (s->type == OPTION_FLAG || s->type >= OPTION_HELP) return "1";
    const char *mark = s->type == OPTION_TEXT ? strchr(s->domain, '=') : NULL;
    return mark ? mark + 1 : NULL;
}

// A decimal that reads back as x: the original if it had at most 15 digits.
static inline void options_print_number(Text *out, double x) {
    char s[32];
    // 15 reproduce any decimal with no more digits
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(s, sizeof s, "%.*g", digits, x);
        if (strtod(s, NULL) == x) break;
    }
    text_printf(out, "%s", s);
}

// \n in quotes is a line feed
static const char options_escape[] = "\"\\nrt", options_escaped[] = "\"\\\n\r\t";

static inline void options_print_text(Text *out, const char *s) {
    if (*s && !strpbrk(s, " #\"\\\n\r\t")) {
        text_printf(out, "%s", s);
        return;
    }
    text_printf(out, "\"");
    for (; *s; s++) {
        const char *mark = strchr(options_escaped, *s);
        if (mark) text_printf(out, "\\%c", options_escape[mark - options_escaped]);
        else text_append(out, s, 1);
    }
    text_printf(out, "\"");
}

// Appends the value as in a config file.
static inline void options_print(Text *out, OptionRef r) {
    const void *field = options_field(r);
    size_t length;
    switch (r.spec->type) {
    case OPTION_INTEGER:
        text_printf(out, "%lld", (long long)*(const int64_t *)field);
        break;
    case OPTION_NUMBER:
        options_print_number(out, *(const double *)field);
        break;
    case OPTION_SPAN:
        options_print_number(out, ((const Span *)field)->value);
        if (((const Span *)field)->percent) text_printf(out, "%%");
        break;
    case OPTION_CHOICE:
    case OPTION_FLAG: {
        const char *word = options_word(r.spec->domain, *(const int *)field, &length);
        CHECK(word, "--%s holds %d, which is none of %s", r.spec->name, *(const int *)field,
              r.spec->domain);
        text_append(out, word, length);
        break;
    }
    default:
        options_print_text(out, *(char *const *)field);
    }
}

// ---- Names ----

// The edit distance of a and b (Levenshtein 1966); '_' is '-'.
static inline int options_distance(const char *a, const char *b) {
    enum { LONGEST = 64 };
    int row[LONGEST + 1], n = (int)strlen(b);            // row[j]: from the prefix of a to b[0..j)
    CHECK(n <= LONGEST, "option name %s is too long", b);
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 0; *a && i < LONGEST / 2; i++, a++) {   // nothing is close to a longer name
        int diagonal = row[0]++;
        for (int j = 1; j <= n; j++) {
            int replaced = diagonal + ((*a == '_' ? '-' : *a) != b[j - 1]);
            diagonal = row[j];
            row[j] = (row[j] < row[j - 1] ? row[j] : row[j - 1]) + 1;
            if (replaced < row[j]) row[j] = replaced;
        }
    }
    return row[n];
}

static inline int options_same_name(const char *a, const char *b) {
    for (; *a && (*a == '_' ? '-' : *a) == *b; a++) b++;
    return !*a && !*b;
}

// Whether one of the blank-separated words is that name; '_' is '-'.
static inline int options_among(const char *words, const char *name) {
    for (size_t n; *words; words += n + (words[n] == ' ')) {
        n = strcspn(words, " ");
        size_t i = 0;
        while (i < n && (name[i] == '_' ? '-' : name[i]) == words[i]) i++;
        if (i == n && !name[n]) return 1;
    }
    return 0;
}

// The option of exactly that name; found->spec is NULL if there is none.
static inline void options_named(Options *o, const char *name, OptionRef *found) {
    found->set = NULL;
    found->spec = NULL;
    for (int k = 0; k < o->n_sets; k++)
        for (int i = 0; i < o->set[k].n; i++) {
            const OptionSpec *s = &o->set[k].specs[i];
            if (s->type == OPTION_HEADING || !options_same_name(name, s->name)) continue;
            found->set = &o->set[k];
            found->spec = s;
        }
}

// The synonym of that name, if these tables have its option, or NULL.
static inline const Synonym *options_synonym(Options *o, const char *name) {
    OptionRef r;
    for (int i = 0; i < SYNONYMS; i++) {
        if (!options_among(synonyms[i].names, name)) continue;
        options_named(o, synonyms[i].ours, &r);
        if (r.spec) return &synonyms[i];
    }
    return NULL;
}

// The name with the smallest edit distance.
static inline const char *options_nearest(const Options *o, const char *name) {
    const char *best = NULL;
    int least = INT_MAX;
    for (int k = 0; k < o->n_sets; k++)
        for (int i = 0; i < o->set[k].n; i++) {
            const OptionSpec *s = &o->set[k].specs[i];
            const int distance = s->type == OPTION_HEADING ? INT_MAX : options_distance(name,
                s->name);
            if (distance < least) least = distance, best = s->name;
        }
    CHECK(best, "options_init was not called");
    return best;
}

// Finds an option by name. Returns NULL, or an error from malloc: its name here, or the nearest
// one.
static inline char *options_find(Options *o, const char *name, OptionRef *found) {
    options_named(o, name, found);
    if (found->spec) return NULL;
    const Synonym *s = options_synonym(o, name);
    if (s) return xprintf("unknown option --%.100s; here it is --%s%s", name, s->ours, s->note);
    return xprintf("unknown option --%.100s; the nearest is --%s", name, options_nearest(o, name));
}

// ---- Building the chain ----

static const OptionSpec options_own[] = {
    OPTION_HEADING_SPEC("General: --name value or --name=value; N may be 1e6; STEPS is such as 100 "
                        "or 10% of the run")
    {"config", OPTION_CONFIG, 0, "", "FILE",
     "read options from FILE, lines of name = value; the command line wins, then the later file"},
    {"help", OPTION_HELP, 0, "", "", "print this and exit; so does -h"},
    {"version", OPTION_VERSION, 0, "", "", "print version, commit, compiler and engine, and exit"},
};

static inline void options_init(Options *o, const char *usage) {
    memset(o, 0, sizeof *o);
    o->usage = usage;
    o->set[0].specs = options_own;
    o->set[0].n = sizeof options_own / sizeof options_own[0];
    o->n_sets = 1;
}

// Chains a table; values is the struct that it describes, which gets its defaults and must outlive
// o.
static inline void options_add(Options *o, OptionTable table, void *values) {
    CHECK(o->n_sets < OPTIONS_MAX_SETS, "more than %d tables of options", OPTIONS_MAX_SETS);
    OptionSet *set = &o->set[o->n_sets++];
    set->specs = table.specs;
    set->n = table.n;
    set->values = values;
    set->source = (unsigned char *)xcalloc((size_t)table.n, 1);
    for (int i = 0; i < table.n; i++) {
        OptionRef r = {set, &table.specs[i]};
        OptionValue v;
        if (r.spec->type == OPTION_HEADING) continue;
        CHECK(options_read(r.spec, r.spec->initial, &v), "bad default of --%s", r.spec->name);
        // nothing to free yet
        if (r.spec->type == OPTION_TEXT) *(char **)options_field(r) = NULL;
        options_store(r, v);
    }
}

// Frees the texts of all tables.
static inline void options_free(Options *o) {
    for (int k = 0; k < o->n_sets; k++) {
        for (int i = 0; i < o->set[k].n; i++) {
            OptionRef r = {&o->set[k], &o->set[k].specs[i]};
            if (r.spec->type == OPTION_TEXT) free(*(char **)options_field(r));
        }
        free(o->set[k].source);
    }
    free((void *)o->arguments);
    memset(o, 0, sizeof *o);
}

// The source of the option with this field, such as &t.steps: FROM_DEFAULT if it was not given.
static inline int options_from(Options *o, const void *field) {
    for (int k = 0; k < o->n_sets; k++)
        for (int i = 0; i < o->set[k].n; i++) {
            OptionRef r = {&o->set[k], &o->set[k].specs[i]};
            if (r.spec->type < OPTION_HEADING && options_field(r) == field)
                return *options_source(r);
        }
    CHECK(0, "not the field of an option");
    return 0;
}

// ---- Reading ----

// Sets one option, unless a higher source did. Returns NULL, or an error from malloc; then nothing
// has changed.
static inline char *options_set(Options *o, const char *name, const char *text, int source) {
    OptionRef r;
    OptionValue v;
    char *error = options_find(o, name, &r);
    if (error) return error;
    if (r.spec->type > OPTION_HEADING)
        return xprintf("--%s is for the command line only", r.spec->name);
    if (!options_read(r.spec, text, &v)) {
        char *wanted = options_wanted(r.spec);
        const int number = r.spec->type == OPTION_NUMBER &&
            options_inside(r.spec->domain, v.number);
        if (number && !options_inside_as_real(r.spec->domain, v.number))
            error = xprintf("--%s: '%.200s' is computed with in " REAL_NAME
                            ", where it is %g; wanted is %s%s", r.spec->name, text,
                            (double)(real)v.number, wanted,
                            (real)v.number == 0 ? " that does not become 0" : "");
        else
            error = xprintf("--%s: '%.200s' is not %s%s", r.spec->name, text, wanted,
                            options_too_large(r.spec, text) ? ", of at most 9223372036854775807"
                            : "");
        free(wanted);
        return error;
    }
    if (source >= *options_source(r)) {
        options_store(r, v);
        *options_source(r) = (unsigned char)source;
    }
    return NULL;
}

static inline const char *options_skip_blanks(const char *s, const char *end) {
    while (s < end && strchr(" \t\r", *s)) s++;
    return s;
}

// Reads the value of a config line, [s, end), into out. Returns NULL, or what is wrong.
static inline const char *options_config_value(Text *out, const char *s, const char *end) {
    if (s < end && *s == '"') {
        for (s++; s < end && *s != '"'; s++) {
            char c = *s;
            if (c == '\\') {
                const char *mark = ++s < end ? strchr(options_escape, *s) : NULL;
                if (!mark) return "a backslash in quotes must start \\\" \\\\ \\n \\r or \\t";
                c = options_escaped[mark - options_escape];
            }
            text_append(out, &c, 1);
        }
        if (s == end) return "the closing quote is missing";
        s = options_skip_blanks(s + 1, end);
        return s < end && *s != '#' ? "there is more after the closing quote" : NULL;
    }
    const char *comment = s;
    while (comment < end && *comment != '#') comment++;
    end = comment;
    while (end > s && strchr(" \t\r", end[-1])) end--;
    if (s == end) return "the value is missing (the empty text is \"\")";
    text_append(out, s, (size_t)(end - s));
    return NULL;
}

// One line of a config, [s, end), without zero bytes. Returns NULL, or an error from malloc.
static inline char *options_config_line(Options *o, const char *s, const char *end, int source) {
    s = options_skip_blanks(s, end);
    if (s == end || *s == '#') return NULL;
    const char *name = s;
    while (s < end && !strchr(" \t\r=#", *s)) s++;
    const char *name_end = s;
    s = options_skip_blanks(s, end);
    if (s == end || *s != '=' || name == name_end) return xstrdup("a line must be name = value");

    Text value;
    memset(&value, 0, sizeof value);
    text_append(&value, "", 0);
    const char *wrong = options_config_value(&value, options_skip_blanks(s + 1, end), end);
    char *name_text = xprintf("%.*s", (int)(name_end - name), name);
    char *error = wrong ? xprintf("%s: %s", name_text, wrong) : options_set(o, name_text, value.s,
        source);
    free(name_text);
    text_free(&value);
    return error;
}

enum { OPTIONS_MAX_CONFIG = 1 << 20 };                   // bytes; so every length in it fits an int

// Applies a config held in memory. Returns NULL, or an error from malloc that names the file and
// the line; the lines before it have been applied.
static inline char *options_config(Options *o, const void *mem, size_t size, int source,
                                   const char *file) {
    if (lfs_pointer_error(mem, size)) return xprintf("%s: %s", file, lfs_pointer_error(mem, size));
    if (size > OPTIONS_MAX_CONFIG)
        return xprintf("%s: not a config file: it is larger than 1 MiB", file);
    if (size && memchr(mem, 0, size))
        return xprintf("%s: not a config file: it has zero bytes", file);
    const char *s = (const char *)mem, *end = size ? s + size : s;
    // a byte-order mark, as some editors write
    if (size >= 3 && !memcmp(s, "\xEF\xBB\xBF", 3)) s += 3;
    for (int line = 1; s < end; line++) {
        const char *feed = (const char *)memchr(s, '\n', (size_t)(end - s)),
            *stop = feed ? feed : end;
        char *wrong = options_config_line(o, s, stop, source);
        if (wrong) {
            char *error = xprintf("%s:%d: %s", file, line, wrong);
            free(wrong);
            return error;
        }
        s = feed ? feed + 1 : end;
    }
    return NULL;
}

static inline char *options_config_file(Options *o, const char *path) {
    FileMap map;
    const char *wrong = file_map(&map, path);
    if (wrong) return xprintf("cannot read %s: %s", path, wrong);
    char *error = options_config(o, map.data, map.size, FROM_CONFIG, path);
    file_unmap(&map);
    return error;
}

static inline void options_help(const Options *o, Text *out);

// --help and --version: print and exit.
static inline void NORETURN options_print_and_exit(const Options *o, int type) {
    Text text;
    memset(&text, 0, sizeof text);
    if (type == OPTION_HELP) options_help(o, &text);
    else {
        char *name = xprintf("%.*s", (int)strcspn(o->usage, " "), o->usage);
        program_version(&text, name, o->engine);
        free(name);
    }
    fputs(text.s, stdout);
    exit(0);
}

// The error for an argument that is not an option, such as "-l"; from malloc.
static inline char *options_unexpected(Options *o, const char *argument) {
    const Synonym *s = *argument == '-' && strlen(argument) <= 3 ? options_synonym(o, argument + 1)
        : NULL;
    if (s)
        return xprintf("unexpected argument '%s'\n  hint: llm.c's %s is --%s%s here", argument,
                       argument, s->ours, s->note);
    return xprintf("unexpected argument '%s'\n  hint: options are --name value; quote patterns and "
                   "texts with blanks", argument);
}

// Applies `--NAME`; value is the text after '=', or NULL; next the next argument, or NULL. Sets
// *took_next.
static inline char *options_argument(Options *o, const char *name, const char *value,
                                     const char *next, int *took_next) {
    OptionRef r;
    OptionValue ignored;
    char *error = options_find(o, name, &r);
    if (error) return error;
    if (r.spec->type >= OPTION_HELP) options_print_and_exit(o, r.spec->type);
    if (!value && next && strncmp(next, "--", 2)) {
        *took_next = r.spec->type != OPTION_FLAG || options_read(r.spec, next, &ignored);
        if (*took_next) value = next;
    }
    if (!value) value = options_bare(r.spec);
    if (!value) {
        char *wanted = options_wanted(r.spec);
        error = xprintf("--%s needs a value: %s", r.spec->name, wanted);
        free(wanted);
        return error;
    }
    if (r.spec->type == OPTION_CONFIG) return options_config_file(o, value);
    return options_set(o, r.spec->name, value, FROM_COMMAND);
}

// Reads the command line. Returns NULL, or an error from malloc. Prints and exits on --help and
// --version.
static inline char *options_arguments(Options *o, int argc, char **argv) {
    free((void *)o->arguments);
    o->arguments = (const char **)xcalloc((size_t)argc, sizeof o->arguments[0]);
    o->n_arguments = 0;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "-h")) options_print_and_exit(o, OPTION_HELP);
        if (strncmp(argv[i], "--", 2)) {
            // "-" alone may be a file's name
            const int letter = argv[i][0] == '-' && argv[i][1];
            if (letter || o->n_arguments == o->max_arguments) return options_unexpected(o, argv[i]);
            o->arguments[o->n_arguments++] = argv[i];
            continue;
        }
        const char *equals = strchr(argv[i], '=');
        size_t length = equals ? (size_t)(equals - argv[i]) : strlen(argv[i]);
        char *name = xprintf("%.*s", (int)length - 2, argv[i] + 2);
        int took_next = 0;
        char *error = options_argument(o, name, equals ? equals + 1 : NULL,
                                       i + 1 < argc ? argv[i + 1] : NULL, &took_next);
        free(name);
        if (error) return error;
        i += took_next;
    }
    return NULL;
}

// Reads the command line or exits: with code 0 after --help or --version, with code 1 after an
// error.
static inline void options_parse(Options *o, int argc, char **argv) {
    files_begin();                                       // each program must before it opens a file
    char *error = options_arguments(o, argc, argv);
    if (error) die("%s", error);
}

// Reads "0,0,0.1,0.2" into rate (most). Returns their number, or 0 if the text is not a list of
// numbers in [0, 1).
static inline int rates_read(double *rate, int most, const char *text) {
    for (int n = 0; n < most; text++) {
        char *end;
        const size_t length = strspn(text, "0123456789.eE-+");
        rate[n] = strtod(text, &end);
        if (!length || end != text + length || !options_inside_as_real("[0,1)", rate[n])) return 0;
        n++, text = end;
        if (!*text) return n;
        if (*text != ',') return 0;
    }
    return 0;
}

// The largest of --drop-rates; NaN if they are not a list of rates.
static inline double rates_largest(const char *text) {
    double rate[1024], most = 0;
    const int n = rates_read(rate, 1024, text);
    for (int i = 0; i < n; i++) most = fmax(most, rate[i]);
    return n ? most : NAN;
}

// Sets --drop-path to the largest of --drop-rates, unless it was given; whether they agree is
// checked when a run is opened.
static inline void options_apply_rates(Options *o, const TrainOptions *t) {
    const double most = *t->drop_rates ? rates_largest(t->drop_rates) : NAN;
    if (isnan(most) || options_from(o, &t->drop_path) != FROM_DEFAULT) return;
    char *all = xprintf("drop-path=%.17g", most);
    char *error = options_config(o, all, strlen(all), FROM_COMMAND, "--drop-rates");
    CHECK(!error, "%s", error);
    free(all);
}

// Sets the options that --drop-recipe, --drop-rates, --lora and --dropout imply, except those that
// were given at least as directly. Call it after parsing.
static inline void options_apply_recipe(Options *o, const TrainOptions *t) {
    const char *config = drop_recipe_configs[t->drop_recipe];
    char *error = options_config(o, config, strlen(config), options_from(o, &t->drop_recipe) - 1,
                                 "recipe");
    CHECK(!error, "%s", error);
    options_apply_rates(o, t);
    if (t->lora && options_from(o, &t->drop_path) == FROM_DEFAULT && !*t->drop_replay) {
        error = options_set(o, "drop-path", "0.05", FROM_DEFAULT);
        CHECK(!error, "%s", error);
    }
    const int dropout = options_from(o, &t->dropout);
    if (dropout == FROM_DEFAULT) return;
    char *all = xprintf("dropout-embd=%.17g\ndropout-attn=%.17g\ndropout-resid=%.17g", t->dropout,
                        t->dropout, t->dropout);
    error = options_config(o, all, strlen(all), dropout - 1, "--dropout");
    CHECK(!error, "%s", error);
    free(all);
}

// ---- Writing ----

enum { OPTIONS_HELP_COLUMN = 28, OPTIONS_HELP_WIDTH = 100 };

// Appends words from a column on, wrapped.
static inline void options_wrap(Text *out, const char *words, int column) {
    for (int at = column; *words; words += strspn(words, " ")) {
        int length = (int)strcspn(words, " ");
        if (at > column) {
            int fits = at + 1 + length <= OPTIONS_HELP_WIDTH;
            text_printf(out, "%s%*s", fits ? "" : "\n", fits ? 1 : column, "");
            at = fits ? at + 1 : column;
        }
        text_append(out, words, (size_t)length);
        at += length;
        words += length;
    }
    text_printf(out, "\n");
}

// Appends an option and its choices, up to the column of the help: on a line of their own if they
// are long, broken after a bar if they are too wide.
static inline void options_help_left(Text *out, const char *left) {
    const int own = strlen(left) >= OPTIONS_HELP_COLUMN;
    while (strlen(left) > OPTIONS_HELP_WIDTH) {
        int length = OPTIONS_HELP_WIDTH;
        while (length > 1 && left[length - 1] != '|') length--;
        text_printf(out, "%.*s\n      ", length, left);
        left += length;
    }
    if (own) text_printf(out, "%s\n%*s", left, OPTIONS_HELP_COLUMN, "");
    else text_printf(out, "%-*s", OPTIONS_HELP_COLUMN, left);
}

// Appends the text of --help.
static inline void options_help(const Options *o, Text *out) {
    text_printf(out, "Usage: %s\n", o->usage);
    for (int k = 0; k < o->n_sets; k++) {
        for (int i = 0; i < o->set[k].n; i++) {
            const OptionSpec *s = &o->set[k].specs[i];
            if (s->type == OPTION_HEADING) {
                text_printf(out, "\n%s\n", s->name);
                continue;
            }
            int interval = s->type == OPTION_INTEGER || s->type == OPTION_NUMBER;
            const char *value = s->type == OPTION_INTEGER ? "N" : s->type == OPTION_NUMBER ? "X"
                              : s->type == OPTION_SPAN ? "STEPS" : s->domain;
            int length = (int)strcspn(value, "="), bare = s->type < OPTION_HELP && options_bare(s);
            char *left = xprintf(bare ? "  --%s [%.*s]" : "  --%s %.*s", s->name, length, value);
            char *right = xprintf(*s->initial ? "%s (default %s%s%s)" : "%s", s->help, s->initial,
                                  interval ? ", in " : "", interval ? s->domain : "");
            options_help_left(out, left);
            options_wrap(out, right, OPTIONS_HELP_COLUMN);
            free(left);
            free(right);
        }
    }
    if (!o->notes) return;
    text_printf(out, "\n");
    options_wrap(out, o->notes, 0);
}

// Appends all values as a config that reads back to the same values.
static inline void options_dump(Options *o, Text *out) {
    for (int k = 1; k < o->n_sets; k++) {
        for (int i = 0; i < o->set[k].n; i++) {
            OptionRef r = {&o->set[k], &o->set[k].specs[i]};
            if (r.spec->type == OPTION_HEADING) {
                text_printf(out, "%s# %s\n", out->n ? "\n" : "", r.spec->name);
                continue;
            }
            text_printf(out, "%s = ", r.spec->name);
            options_print(out, r);
            text_printf(out, "\n");
        }
    }
}

#endif
