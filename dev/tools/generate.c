// generate.c: text from a checkpoint. Standard output is the text alone: each text is the prompt
// and its continuation, up to --tokens or the end of the text; a line "---" separates two texts.
// Text is printed as it is generated.
//
//     build/generate runs/gpt/latest --prompt "Once upon a time" --temperature 0.8 --top-p 0.95
//     build/generate runs/gpt/latest --prompts questions.txt --samples 3 --batch 8 > answers.txt
//     build/generate path/to/a/hugging-face/gpt2 --tokenizer vocab.json # prompts from a terminal

#include "../check.h"
#include "../model/engines.h"
#include "../run/adaptive.h"
#include "../run/options.h"
#include "../run/sample.h"
#include "../run/speculate.h"
#include "load.h"

//  OPTION(field, name, type, default, domain, help)
#define GENERATE_OPTIONS(HEADING, OPTION)                                                         \
  HEADING("Text")                                                                                 \
    OPTION(prompt, "prompt", TEXT, "", "TEXT",                                                    \
           "the start of the text; empty: the start of a line")                                   \
    OPTION(prompt_file, "prompt-file", TEXT, "", "FILE",                                          \
           "a file with the start of the text, without its last newline; -: standard input")      \
    OPTION(prompts, "prompts", TEXT, "", "FILE",                                                  \
           "a file of prompts, one per line; empty lines are skipped; -: standard input")         \
    OPTION(interactive, "interactive", FLAG, "0", "0|1",                                          \
           "each line of standard input is a prompt; the default at a terminal without a prompt") \
    OPTION(tokens, "tokens", INTEGER, "200", "[0,1e9]",                                           \
           "most tokens to generate after the prompt")                                            \
    OPTION(samples, "samples", INTEGER, "1", "[1,1e9]", "texts per prompt")                       \
    OPTION(batch, "batch", INTEGER, "1", "[1,4096]",                                              \
           "texts generated together: higher throughput, higher latency; the same texts up to "   \
               "rounding, on the CPU bit for bit")                                                \
    OPTION(seed, "seed", INTEGER, "1337", "[0,inf)", "determines all randomness")                 \
  HEADING("Sampling")                                                                             \
    OPTION(temperature, "temperature", NUMBER, "0.8", "[0,inf)",                                  \
           "divides the logits; 0: always the most likely token")                                 \
    OPTION(top_k, "top-k", INTEGER, "0", "[0,16777216]",                                          \
           "sample from the k most likely tokens; 0: from all")                                   \
    OPTION(top_p, "top-p", NUMBER, "1", "(0,1]",                                                  \
           "sample from the fewest tokens whose probabilities add up to this")                    \
  HEADING("Speed: the first layers draft, all of them verify: the full model's text; or fewer "   \
          "layers for easy tokens")                                                               \
    OPTION(exit_layer, "exit-layer", TEXT, "", "LAYERS|auto",                                     \
           "how many layers draft; a model trained with --exit-scale drafts well; auto: observes "\
               "how often each layer is right, and chooses")                                      \
    OPTION(speculate, "speculate", INTEGER, "4", "[1,64]",                                        \
           "tokens drafted at a time; with --exit-layer")                                         \
    OPTION(adaptive, "adaptive", TEXT, "", "FILE",                                                \
           "a policy that build/exits made: tokens that it is sure of leave after some layers, "  \
               "so this may be another text")                                                     \
  HEADING("Model")                                                                                \
    OPTION(tokenizer, "tokenizer", TEXT, "", "FILE",                                              \
           "default: next to the checkpoint's files, otherwise the training run's")               \
    OPTION(dtype, "dtype", CHOICE, "fp32", "fp32|bf16|auto|tf32",                                 \
           "operands of matmuls; bf16 halves the memory traffic per token, where the processor "  \
               "has it; tf32 for GPUs; auto: the engine's default")                               \
    LOAD_THREADS(OPTION)

OPTION_TABLE(GENERATE_OPTIONS, GenerateOptions, generate_options)

// A whole file, or standard input for "-".
static Text read_all(const char *path) {
    Text all = {NULL, 0, 0};
    char part[1 << 14];
    FILE *f = strcmp(path, "-") ? fopen(path, "rb") : stdin;
    if (!f) die("cannot read %s: %s", path, strerror(errno));
    for (size_t n; (n = fread(part, 1, sizeof part, f)) > 0;) text_append(&all, part, n);
    if (ferror(f)) die("cannot read %s: %s", path, strerror(errno));
    if (f != stdin) fclose(f);
    if (all.n >= 2 && !memcmp(all.s, "\x1F\x8B", 2))
        die("%s is compressed\n  hint: zcat FILE | generate ... -", path);
    // a byte-order mark
    if (all.n >= 3 && !memcmp(all.s, "\xEF\xBB\xBF", 3)) memmove(all.s, all.s + 3, all.n -= 3);
    return all;
}

// The length of a line without its newline, "\n" or "\r\n".
static size_t line_length(const char *s, size_t n) {
    if (n && s[n - 1] == '\n') n--;
    return n && s[n - 1] == '\r' ? n - 1 : n;
}

static void one_prompt(Sampler *s, const GenerateOptions *o, Text prompt) {
    sample_texts(stdout, s, &prompt, 1, o->samples, o->tokens);
}

// The lines of a file; `all` owns their bytes.
static void many_prompts(Sampler *s, const GenerateOptions *o, Text all) {
    Text *line = NULL;
    int64_t n = 0, capacity = 0;
    for (size_t at = 0; at < all.n;) {
        const char *end = (const char *)memchr(all.s + at, '\n', all.n - at);
        const size_t size = end ? (size_t)(end - all.s) + 1 - at : all.n - at,
            length = line_length(all.s + at, size);
        if (length) {
            if (n == capacity)
                line = (Text *)xrealloc(line, (size_t)(capacity = 2 * capacity + 16), sizeof *line);
            line[n].s = all.s + at, line[n].n = line[n].capacity = length, n++;
        }
        at += size;
    }
    if (!n) die("%s has no prompt\n  hint: one a line", o->prompts);
    sample_texts(stdout, s, line, n, o->samples, o->tokens);
    free(line);
}

// Each line of standard input, as it arrives. The prompt mark goes to standard error, so output can
// be redirected.
static void prompt_line(Sampler *s, const GenerateOptions *o) {
    const int terminal = isatty(STDIN_FILENO);
    char *line = NULL;
    size_t capacity = 0;
    if (terminal) fputs("Each line is a prompt; Ctrl-D ends.\n", stderr);
    for (ssize_t n;; s->round++) {
        if (terminal) fputs("> ", stderr);
        if ((n = getline(&line, &capacity, stdin)) < 0) break;
        if (!s->round && n >= 3 && !memcmp(line, "\xEF\xBB\xBF", 3))
            memmove(line, line + 3, (size_t)(n -= 3) + 1);
        const Text prompt = {line, line_length(line, (size_t)n), capacity};
        one_prompt(s, o, prompt);
    }
    if (terminal) fputc('\n', stderr);
    free(line);
}

// Selects the source of prompts; dies if several are given.
static void generate(Sampler *s, Options *options, const GenerateOptions *o) {
    const int named = options_from(options, &o->prompt) != FROM_DEFAULT;
    if (named + (*o->prompt_file != 0) + (*o->prompts != 0) + o->interactive > 1)
        die("two sources of prompts\n  hint: one of --prompt, --prompt-file, --prompts, "
            "--interactive");
    if (*o->prompt_file || *o->prompts) {
        Text all = read_all(*o->prompts ? o->prompts : o->prompt_file), prompt = all;
        prompt.n = line_length(all.s, all.n);
        if (*o->prompts) many_prompts(s, o, all);
        else one_prompt(s, o, prompt);
        text_free(&all);
    } else if (o->interactive || (!named && isatty(STDIN_FILENO))) prompt_line(s, o);
    else {
        const Text prompt = {o->prompt, strlen(o->prompt), 0};
        one_prompt(s, o, prompt);
    }
}

enum { PROBED = 64 };                                    // tokens that --exit-layer auto observes

// Reads --exit-layer and --speculate.
static void speculate_open(Speculation *k, Sampler *s, const GenerateOptions *o,
                           const GptConfig *c) {
    const int L = c->L, automatic = !strcmp(o->exit_layer, "auto");
    char *end;
    const long layer = strtol(o->exit_layer, &end, 10);
    memset(k, 0, sizeof *k);
    k->drafts = (int)o->speculate, k->config = c, s->self = k;
    k->accept = (double *)xcalloc((size_t)L, sizeof *k->accept);
    if (!*o->exit_layer) return;
    if (!automatic && (*end || end == o->exit_layer))
        die("--exit-layer %s: a number of layers, or auto", o->exit_layer);
    if (!automatic && (layer < 1 || layer >= L))
        die("--exit-layer %ld: the model has %d layers; 1 to %d can draft", layer, L, L - 1);
    if (L < 2) die("--exit-layer auto: the model has 1 layer, and all are needed to verify");
    k->layer = automatic ? 0 : (int)layer, k->enough = PROBED;
    if (automatic) s->decode = speculate_probe;
    else s->round_of = speculate_round;
}

static void speculate_report(const Speculation *k, const char *option) {
    if (!strcmp(option, "auto") && k->probed < k->enough)
        fprintf(stderr, "exit layer: not chosen, texts had only %lld of %lld tokens to observe\n",
                (long long)k->probed, (long long)k->enough);
    else if (!strcmp(option, "auto") && !k->layer)
        fprintf(stderr, "exit layer: none, as drafts would not be faster\n");
    else if (!strcmp(option, "auto"))
        fprintf(stderr, "exit layer: %d of %d, whose drafts were right in %.0f%% of %lld tokens\n",
                k->layer, k->config->L, 100 * k->accept[k->layer - 1] / (double)k->probed,
                (long long)k->probed);
    if (k->drafted)
        fprintf(stderr, "drafts: %lld by %d layers, %.1f%% accepted; %.2f tokens a round\n",
                (long long)k->drafted, k->layer, 100 * (double)k->accepted / (double)k->drafted,
                1 + (double)k->accepted / (double)k->rounds);
}

// Sampler.decode: single tokens under the policy, prompts through all layers.
static void adaptive_tokens(Sampler *s, const DecodeArgs *a) {
    int *left = (int *)xcalloc((size_t)s->plan.batch, sizeof *left);
    if (a->n > 1) s->engine->decode(s->model, a, &s->plan);
    else adaptive_step((AdaptiveRun *)s->self, s->plan.batch, a->tokens, a->seq, a->at, a->logits,
                       left);
    free(left);
}

// What the options ask for beside plain decoding.
typedef struct { Speculation speculation; Adaptive policy; AdaptiveRun run; } Faster;

static void faster_open(Faster *f, Sampler *s, const GenerateOptions *o, const Loaded *m) {
    memset(f, 0, sizeof *f);
    if (*o->exit_layer && *o->adaptive)
        die("--exit-layer and --adaptive exclude each other: drafts are verified by all layers");
    speculate_open(&f->speculation, s, o, &m->config);
    if (!*o->adaptive) return;
    f->policy = adaptive_open(o->adaptive, &m->config);
    const AdaptiveRun run = {.engine = m->engine, .model = m->model, .policy = &f->policy,
                             .config = &m->config, .scale = m->scale, .tied = m->tied,
                             .T = m->config.T,
                             .plan = drop_plan_new(m->config.L, s->batch)};
    f->run = run;
    s->self = &f->run, s->decode = adaptive_tokens;
}

static void faster_close(Faster *f, const GenerateOptions *o) {
    const AdaptiveRun *r = &f->run;
    speculate_report(&f->speculation, o->exit_layer);
    if (*o->adaptive && r->tokens)
        fprintf(stderr, "adaptive: %.2f of %d layers a token, %.1f%% of the FLOPs\n",
                r->layers / (double)r->tokens, r->config->L, 100 * adaptive_flops(r));
    free(f->speculation.accept);
    if (!*o->adaptive) return;
    adaptive_free(&f->policy), drop_plan_free(&f->run.plan);
}

static void report(const char *what, int64_t tokens, double seconds) {
    fprintf(stderr, "%s %lld tokens", what, (long long)tokens);
    if (tokens > 0 && seconds > 0) fprintf(stderr, " at %.1f per second", (double)tokens / seconds);
}

int main(int argc, char **argv) {
    GenerateOptions o;
    Options options;
    Loaded m;
    program_begin(argv);
    options_init(&options, "generate CHECKPOINT [options]");
    options.engine = engine_default_name();
    options_add(&options, generate_options(), &o);
    options.max_arguments = 1;
    options_parse(&options, argc, argv);
    if (options.n_arguments < 1) die("the checkpoint is missing\n  hint: generate runs/gpt/latest");
    load_config(&m, options.arguments[0]);
    load_tokenizer(&m, o.tokenizer, NULL);
    if (!m.has_tokenizer)
        die("found no tokenizer for %s\n  hint: --tokenizer FILE, a tokenizer.bin or GPT-2's "
            "vocab.json", m.dir);
    const Engine *engine = engine_default();
    // for a text's prompt, or one token of each text
    const int T = m.config.T, batch = (int)o.batch;
    const int64_t together = (int64_t)batch * (*o.exit_layer ? o.speculate + 1 : 1);
    const EngineArgs args = {.B = (int)((together + T - 1) / T), .T = T, .threads = (int)o.threads,
                             .cache = batch,
                             .dtype = o.dtype == DTYPE_AUTO ? engine->dtype : o.dtype};
    load_model_as(&m, engine, &args);

    Sampler s = {.engine = engine, .model = m.model, .cached = 1, .layers = m.config.L,
                 .V = m.config.V, .T = T,
                 .batch = batch, .scale = m.scale, .tied = m.tied, .tokenizer = &m.tokenizer,
                 .args = {o.temperature, (int)o.top_k, o.top_p, (uint64_t)o.seed}};
    Faster faster;
    faster_open(&faster, &s, &o, &m);
    generate(&s, &options, &o);
    fprintf(stderr, "%s: ", m.dir);
    report("prompt", s.prompt_tokens, s.prompt_seconds);
    report("; text", s.made, 0);
    if (s.decoded && s.seconds > 0)
        fprintf(stderr, " at %.1f per second", (double)s.decoded / s.seconds);
    fputc('\n', stderr);
    faster_close(&faster, &o);
    load_close(&m);
    options_free(&options);
    return 0;
}
