// generate.c: text from a checkpoint. Standard output is the text alone: each sample is the prompt and what follows it, up
// to --tokens or the end of the text; a line "---" stands between two samples.
//
//     build/generate runs/gpt/latest --prompt "Once upon a time" --tokens 100 --temperature 0.8 --top-p 0.95
//     build/generate path/of/a/hugging-face/gpt2 --tokenizer vocab.json --prompt "Once upon a time"

#include "../check.h"
#include "../options.h"
#include "../sample.h"
#include "load.h"

//  OPTION(field, name, type, default, domain, help)
#define GENERATE_OPTIONS(HEADING, OPTION)                                                                            \
  HEADING("Text")                                                                                                    \
    OPTION(prompt, "prompt", TEXT, "", "TEXT", "what the text begins with; empty: the start of a line")              \
    OPTION(tokens, "tokens", INTEGER, "200", "[0,1e9]", "most tokens that follow the prompt")                        \
    OPTION(samples, "samples", INTEGER, "1", "[1,1e9]", "how many texts")                                            \
    OPTION(seed, "seed", INTEGER, "1337", "[0,inf)", "names all randomness of the texts")                            \
  HEADING("The choice of a token")                                                                                   \
    OPTION(temperature, "temperature", NUMBER, "0.8", "[0,inf)", "divides the logits; 0: always the likeliest token")\
    OPTION(top_k, "top-k", INTEGER, "0", "[0,16777216]", "only among the k likeliest tokens; 0: among all")          \
    OPTION(top_p, "top-p", NUMBER, "1", "(0,1]", "only among the fewest tokens whose probabilities add up to this")  \
  HEADING("Model")                                                                                                   \
    OPTION(tokenizer, "tokenizer", TEXT, "", "FILE",                                                                 \
           "if not given: beside the checkpoint's files, else the one that the run was trained with")                \
    OPTION(threads, "threads", INTEGER, "0", "[0,4096]", "CPU threads; 0: as many as the machine offers")

OPTION_TABLE(GENERATE_OPTIONS, GenerateOptions, generate_options)

// Writes the samples to stdout; returns the tokens made.
static int64_t generate(Loaded *m, const GenerateOptions *o) {
    const SampleArgs args = {o->temperature, (int)o->top_k, o->top_p, (uint64_t)o->seed};
    int64_t made = 0;
    drop_plan_keep_all(&m->plan, m->scale, m->tied, 1);
    for (int64_t i = 0; i < o->samples; i++) {
        if (i) puts("---");
        fputs(o->prompt, stdout);
        made += sample_text(stdout, m->engine, m->model, m->config.V, m->config.T, &m->plan, &m->tokenizer, o->prompt,
                            o->tokens, &args, (uint32_t)i);
        puts("");
    }
    if (fflush(stdout) || ferror(stdout)) die("cannot write to standard output: %s", strerror(errno));
    return made;
}

int main(int argc, char **argv) {
    GenerateOptions o;
    Options options;
    Loaded m;
    options_init(&options, "generate CHECKPOINT [options]");
    options_add(&options, generate_options(), &o);
    options.max_arguments = 1;
    options_parse(&options, argc, argv);
    if (options.n_arguments < 1) die("the checkpoint is missing\n  hint: generate runs/gpt/latest");
    load_config(&m, options.arguments[0]);
    load_tokenizer(&m, o.tokenizer, NULL);
    if (!m.has_tokenizer)
        die("found no tokenizer for %s\n  hint: --tokenizer FILE, a tokenizer.bin or GPT-2's vocab.json", m.dir);
    load_model(&m, engine_default(), 1, m.config.T, (int)o.threads);

    const double from = clock_seconds();
    const int64_t made = generate(&m, &o);
    const double seconds = clock_seconds() - from;
    fprintf(stderr, "%s: %lld tokens, %.1f per second\n", m.dir, (long long)made, (double)made / seconds);
    load_close(&m);
    options_free(&options);
    return 0;
}
