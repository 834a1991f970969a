// seeds.h: small valid inputs for every parser, mostly from our own writers, as files
// CORPUS/PARSER/NAME.
#ifndef SEEDS_H
#define SEEDS_H

#include "parsers.h"
#include "../files/files.h"

static void seed_write(const char *corpus, const char *parser, const char *name, const void *bytes,
                       size_t n) {
    char *dir = xprintf("%s/%s", corpus, parser), *path = xprintf("%s/%s", dir, name);
    directory_make(dir);
    FILE *f = file_open(path, "wb");
    file_write(f, path, bytes, n);
    if (fclose(f)) die("cannot write %s: %s", path, strerror(errno));
    free(dir), free(path);
}

static void seed_text(const char *corpus, const char *parser, const char *name, const char *text) {
    seed_write(corpus, parser, name, text, strlen(text));
}

// Writes a text and frees it.
static void seed_take(const char *corpus, const char *parser, const char *name, Text *t) {
    seed_write(corpus, parser, name, t->s, t->n);
    text_free(t);
}

static void seed_words(Text *t, const uint32_t *words, int n) {
    unsigned char header[LLMC_HEADER_BYTES];
    llmc_header(header, words, n);
    text_append(t, header, sizeof header);
}

// ---- Tokens ----

static void seeds_shards(const char *corpus) {
    Text t = {NULL, 0, 0};
    for (int i = 0; i < 2; i++) {
        const uint32_t words[3] = {shard_formats[i].magic, shard_formats[i].version, 5};
        seed_words(&t, words, 3);
        text_append(&t, "\1\0\0\0\2\0\0\0\3\0\0\0\4\0\0\0\377\377\0\0",
                    (size_t)(5 * shard_formats[i].width));
        seed_take(corpus, "shards", i ? "words" : "halves", &t);
    }
    seed_words(&t, (uint32_t[3]){SHARD_EVAL_MAGIC, 1, 0}, 3);
    seed_take(corpus, "shards", "eval", &t);
}

// Two questions, with two and three choices.
static void seeds_choices(const char *corpus) {
    enum { EXAMPLE = 14 };                               // words of each
    static const uint32_t words[2][EXAMPLE] = {{0, 0, 0, 1, 2, 3, 10, 11, 12, 1, 20, 2, 21, 22},
                                               {0, 0, 1, 0, 3, 1, 13, 1, 30, 1, 31, 2, 32, 33}};
    for (uint32_t version = 1; version <= 2; version++) {
        Text t = {NULL, 0, 0};
        const uint32_t width = 2 * version;
        seed_words(&t, (uint32_t[4]){SHARD_EVAL_MAGIC, version, 2, EXAMPLE * width}, 4);
        for (int i = 0; i < 2 * EXAMPLE; i++) {
            const int at = i % EXAMPLE;
            const uint32_t w = at == 0 ? UINT32_MAX : at ==
                1 ? EXAMPLE * width : words[i / EXAMPLE][at];
            const char little[4] = {(char)w, (char)(w >> 8), (char)(w >> 16), (char)(w >> 24)};
            text_append(&t, little, width);
        }
        FUZZ_REQUIRE(fuzz_choices((const unsigned char *)t.s, t.n));
        seed_take(corpus, "choices", version == 1 ? "halves" : "words", &t);
    }
}

static void seeds_tokenizer(const char *corpus) {
    Text t = {NULL, 0, 0};
    tokenizer_bytes_file(&t);
    seed_take(corpus, "tokenizer", "bytes", &t);
    seed_words(&t, (uint32_t[4]){TOKENIZER_MAGIC, 2, 6, 5}, 4);
    text_append(&t, "\1a\1b\2ab\1 \3 ab\3end", 17);
    seed_take(corpus, "tokenizer", "merges", &t);
    seed_text(corpus, "tokenizer", "vocab",
              "{\"a\": 0, \"b\": 1, \"\\u0120\": 2, \"\\u0120a\": 3, \"ab\": 4, \"{\": 6, "
              "\"<|endoftext|>\": 5}");
    for (int leads_out = 0; leads_out < 2; leads_out++) {
        text_printf(&t, "{\"format\": \"droppath.c token shards 1\", \"tokenizer\": {\"name\": "
                    "\"bytes\", \"vocab_size\": 257, \"end_of_text\": 256, \"file\": "
                    "\"tokenizer.bin\", \"sha256\": "
                    "\"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\"}, "
                    "\"splits\": {\"train\": {\"tokens\": 12, \"bytes\": 11, \"shards\": "
                    "[{\"file\": \"%strain_000000.bin\", \"tokens\": 7}, {\"file\": "
                    "\"train_000001.bin\", \"tokens\": 5}]}, \"val\": {\"tokens\": 0, \"bytes\": "
                    "0, \"shards\": []}}}", leads_out ? "../" : "");
        seed_take(corpus, "manifest", leads_out ? "leads_out" : "two_sides", &t);
    }
}

// ---- Tensors ----

static void seeds_safetensors(const char *corpus) {
    static const unsigned char data[64] = {0, 0, 0x80, 0x3f, 0xff, 0xff, 0x7f, 0x7f, 0, 0x7c, 1, 0};
    static const char *const dtype[4] = {"F32", "F16", "I64", "BOOL"};
    char *dir = xprintf("%s/safetensors", corpus), *path = xprintf("%s/four", dir);
    SafetensorsWriter w;
    directory_make(dir);
    FILE *f = file_open(path, "wb");
    safetensors_writer_init(&w);
    for (int i = 0; i < 4; i++)
        safetensors_declare(&w, &"wte.weight"[i], dtype[i], i % 3, (int64_t[2]){1 + i % 2, i});
    safetensors_begin(&w, f, path);
    for (int i = 0; i < 4; i++) safetensors_append(&w, data, w.entry[i].bytes);
    safetensors_end(&w);
    if (fclose(f)) die("cannot write %s", path);
    free(dir), free(path);
    Text t = {NULL, 0, 0};
    static const char twice[] = "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
                                "\"\\u0061\":{\"dtype\":\"U8\",\"shape\":[1],"
                                "\"data_offsets\":[1,2]}}";
    const uint64_t header = sizeof twice - 1;
    text_append(&t, &header, sizeof header), text_append(&t, twice, sizeof twice - 1),
        text_append(&t, "xy", 2);
    seed_take(corpus, "safetensors", "twice", &t);
    seed_text(corpus, "index", "leads_out",
              "{\"weight_map\": {\"wte.weight\": \"../model.safetensors\"}}");
    seed_text(corpus, "index", "hidden", "{\"weight_map\": {\"wte.weight\": \"..safetensors\"}}");
    seed_text(corpus, "index", "two_files",
              "{\"metadata\": {\"total_size\": 8}, \"weight_map\": {\"wte.weight\": "
              "\"model-00001-of-00002.safetensors\", \"wpe.weight\": "
              "\"model-00002-of-00002.safetensors\", \"ln_f.bias\": "
              "\"model-00001-of-00002.safetensors\"}}");
}

static void seeds_models(const char *corpus) {
    const GptConfig c = {3, 2, 2, 1, 2};
    double scale[4] = {1, 1, 0.75, 0.75};
    Text t = {NULL, 0, 0};
    CheckpointState s;
    CheckpointSums sums;
    for (int i = 0; i < 2; i++) {
        const int dtype = i ? SAFETENSORS_BF16 : SAFETENSORS_F32;
        unsigned char header[LLMC_HEADER_BYTES];
        const GptConfig one = {3, 2, 1, 1, 1}, padded = {4, 2, 1, 1, 1};
        llmc_model_header(header, &one, dtype);
        // Vp: one row of padding is enough for a fuzzer
        header[4 * 7] = 4;
        text_append(&t, header, sizeof header);
        for (size_t k = 0; k < gpt_params_count(&padded); k++)
            text_append(&t, "\1\2\3\4", safetensors_dtype[dtype].size);
        seed_take(corpus, "llmc", i ? "bf16" : "fp32", &t);
    }
    memset(&s, 0, sizeof s);
    s.step = 100, s.tokens = 1 << 20, s.eval_scale = scale, s.tied = 1, s.eot = 2;
    s.options = "# Data\ntrain = data/x_*.bin\nsteps = 200\nprompt = \"a b\\n\"\ndrop-recipe = "
        "huang2016\n";
    checkpoint_config_json(&t, &c, &s, "float32");
    seed_take(corpus, "config", "ours", &t);
    seed_text(corpus, "config", "factors",
              "{\"n_embd\": 2, \"n_head\": 1, \"n_layer\": 1, \"n_positions\": 2, \"vocab_size\": "
              "3, \"drop_path_eval_scale\": [0.5, 1]}");
    seed_text(corpus, "config", "past_an_int",
              "{\"n_embd\": 2, \"n_head\": 1, \"n_layer\": 1, \"n_positions\": 2, \"vocab_size\": "
              "4294967299}");
    seed_text(corpus, "config", "gpt2",
              "{\"activation_function\": \"gelu_new\", \"architectures\": [\"GPT2LMHeadModel\"], "
              "\"attn_pdrop\": 0.1, \"layer_norm_epsilon\": 1e-05, \"model_type\": \"gpt2\", "
              "\"n_ctx\": 1024, \"n_embd\": 768, \"n_head\": 12, \"n_inner\": null, \"n_layer\": "
              "12, \"n_positions\": 1024, \"task\": {}, \"vocab_size\": 50257}");
    const LoraConfig lora = {16, 15, 1, 32, 0.1, (char *)(uintptr_t)"runs/base/step_00001000"};
    lora_write(&t, &lora);
    seed_take(corpus, "adapter", "ours", &t);
    seed_text(corpus, "adapter", "peft",
              "{\"alora_invocation_tokens\": null, \"alpha_pattern\": {}, "
              "\"base_model_name_or_path\": \"gpt2\", \"bias\": \"none\", \"exclude_modules\": "
              "null, \"fan_in_fan_out\": true, \"init_lora_weights\": true, "
              "\"layers_to_transform\": null, \"lora_alpha\": 16, \"lora_dropout\": 0.0, "
              "\"modules_to_save\": [\"ln_f\", \"ln_1\", \"ln_2\"], \"peft_type\": \"LORA\", "
              "\"r\": 8, \"rank_pattern\": {}, \"target_modules\": [\"c_proj\", "
              "\"transformer.h.0.mlp.c_fc\"], \"use_dora\": false}");
    seed_text(corpus, "exits", "learned",
              "{\"confidence\": \"learned\", \"layers\": [1, 3], \"of\": 4, \"lambda\": 0.5, "
              "\"tau\": 4, \"risk\": 0.05, \"error\": 0.05, \"weights\": [0.5, -1e-3]}");
    seed_text(corpus, "exits", "saturation",
              "{\"confidence\": \"saturation\", \"layers\": [2], \"of\": 3, \"lambda\": 2, "
              "\"tau\": 0, \"risk\": 0.9, \"error\": 0.5, \"weights\": []}");
    memset(&sums, 0, sizeof sums);
    for (int i = 0; i < CHECKPOINT_FILES; i++) sha256_hex(sums.file[i].hex, &i, 1);
    checkpoint_trainer_json(&t, &s, &sums);
    seed_write(corpus, "trainer", "whole", t.s, t.n);
    const size_t tail = strlen(CHECKPOINT_SELF) + SHA256_HEX - 1 + strlen("\"\n}\n");
    seed_write(corpus, "trainer", "body", t.s, t.n - tail);
    text_free(&t);
}

// ---- Texts ----

static void seeds_text(const char *corpus) {
    TrainOptions values;
    Options o;
    Text t = {NULL, 0, 0};
    options_init(&o, "");
    options_add(&o, train_options(), &values);
    options_dump(&o, &t);
    options_free(&o);
    seed_take(corpus, "options", "all", &t);
    seed_text(corpus, "options", "some",
              "# a run\r\nsteps = 10\nlr = 6e-4 # peak\nwarmup=5%\n  prompt = \"a # \\\"b\\\" \\\\ "
              "\\n\"\n"
              "drop_path = 0.1\ndrop-recipe = pld2020\nreduce-fp32 = 1\n");
    seed_text(corpus, "json", "all",
              " {\"a\": [1, -2.5e3, \"\\uD83D\\uDE00\\n\xE2\x82\xAC\", 0.0, 9223372036854775807], "
              "\"b\": {\"c\": null, \"d\": true}, \"\": false, \"\\u0061\": [[[]]], \"z\": "
              "\"\\u0000\"}\n");
}

static void seeds_depth(const char *corpus) {
    for (int more = 0; more < 2; more++) {
        Text t = {NULL, 0, 0};
        for (int i = 0; i < JSON_MAX_DEPTH + more; i++) text_append(&t, "[", 1);
        for (int i = 0; i < JSON_MAX_DEPTH + more; i++) text_append(&t, "]", 1);
        seed_take(corpus, "json", more ? "too_deep" : "deepest", &t);
    }
}

static void seeds_replay(const char *corpus) {
    Text t = {NULL, 0, 0}, line = {NULL, 0, 0};
    for (int unit = 0; unit < 2; unit++) {
        DropPath d;
        DropPlan plan = drop_plan_new(2, 5);
        Metrics r = metrics_new();
        fuzz_drop_path(&d, 2, BRANCHES_SEPARATE);
        d.unit = unit;
        for (int m = 0; m < 2; m++) {
            drop_plan_sample(&plan, &d, 5, m, 2, 1, 5);
            if (m) text_append(&t, " ", 1);
            drop_plan_write(&t, &plan, unit);
        }
        r.step = 1 + unit, r.loss = 2.5, r.lr = 1e-4, r.flops = 1e12;
        r.plan = t.s;
        metrics_write(&line, &r);
        Text with = {NULL, 0, 0};
        text_append(&with, (unsigned char[3]){1, 4, (unsigned char)unit}, 3);
        text_append(&with, t.s, t.n);
        seed_take(corpus, "plan", unit ? "rows" : "batch", &with);
        text_free(&t);
        drop_plan_free(&plan);
    }
    seed_take(corpus, "metrics", "two_steps", &line);
    Metrics depths = metrics_new();
    const MetricsDepth depth[2] = {{0.25, {3.5, 3.25}}, {0.5, {2.5, 2.25}}};
    depths.step = 1, depths.val_loss = 2, depths.depth = depth, depths.depths = 2;
    metrics_write(&line, &depths);
    seed_take(corpus, "metrics", "depths", &line);
    for (int step = 1; step <= 150; step++) text_printf(&line, "{\"step\": %d}\n", step);
    seed_take(corpus, "metrics", "many_steps", &line);
}

// ---- Ranks ----

static void seeds_comm(const char *corpus) {
    CommHello h;
    unsigned char bytes[COMM_ANSWER], nonce[COMM_NONCE] = {0};
    memset(&h, 0, sizeof h);
    h.kind = COMM_WATCH, h.world = 4, h.rank = 3;
    memcpy(h.nonce, "a number used once, by the guest", COMM_NONCE);
    strcpy(h.host, "node7");
    comm_write_hello(bytes, &h);
    seed_write(corpus, "hello", "rank_3", bytes, COMM_HELLO);
    comm_prove(bytes + COMM_HELLO, fuzz_token, "guest", bytes, nonce);
    bytes[COMM_PROOF] = 0;
    seed_write(corpus, "admit", "rank_3", bytes, COMM_ACK);
    bytes[COMM_HELLO] ^= 1;
    seed_write(corpus, "admit", "stranger", bytes, COMM_ACK);
    h.kind = COMM_DATA, h.rank = 0;
    comm_write_hello(bytes, &h);
    comm_prove(bytes + COMM_HELLO, fuzz_token, "guest", bytes, nonce);
    seed_write(corpus, "admit", "rank_0", bytes, COMM_ACK);
    seed_text(corpus, "admit", "http", "GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    comm_write_answer(bytes, COMM_REFUSED, NULL, "it has another job token");
    seed_write(corpus, "answer", "refused", bytes, COMM_ANSWER);
    comm_write_answer(bytes, COMM_CHALLENGE, h.nonce, NULL);
    seed_write(corpus, "answer", "challenge", bytes, COMM_ANSWER);
    Text t = {NULL, 0, 0};
    seed_text(corpus, "place", "two", "droppath rendezvous 1\n4321\n10.0.0.1\n::1\n");
    text_printf(&t, "droppath rendezvous 1\n4321\n");
    for (int i = 0; i < 2 * COMM_ADDRESSES; i++) text_printf(&t, "10.0.0.%d\n", i);
    seed_take(corpus, "place", "many", &t);
    memset(bytes, 0, sizeof bytes);
    memcpy(bytes, "Drank 2 is gone", 15);
    text_append(&t, "HHH", 3), text_append(&t, bytes, COMM_ANSWER), text_append(&t, "HB", 2);
    seed_take(corpus, "watch", "dead", &t);
    seed_text(corpus, "watch", "signs", "HHHHHB");
    seed_text(corpus, "launch", "torchrun",
              "tcp://[::1]:29500\nRANK=3\nWORLD_SIZE=8\nLOCAL_RANK=1\nDROPPATH_JOB_TOKEN=t\n");
    seed_text(corpus, "launch", "slurm",
              "\nSLURM_PROCID=5\nSLURM_STEP_NUM_TASKS=8\nSLURM_LOCALID=2\nSLURM_JOB_ID=5\n"
              "MASTER_ADDR=h\n");
    seed_text(corpus, "launch", "directory",
              "dir:/x\nOMPI_COMM_WORLD_RANK=0\nOMPI_COMM_WORLD_SIZE=2\n"
              "OMPI_COMM_WORLD_LOCAL_RANK=0\nPMIX_NAMESPACE=p\nMASTER_PORT=7\n");
}

// ---- Lists of layers, plans of studies ----

static void seeds_lists(const char *corpus) {
    seed_text(corpus, "layers", "layers", "\14" "0,3-5,7.attn,11.mlp");
    seed_text(corpus, "layers", "shares", "\14" "0.25, 0.5,0.75");
    seed_text(corpus, "layers", "both", "\2" "0");
    seed_text(corpus, "scores", "three", "\3" "# three\n1 -2.5e-1 # two\n\t0\n");
    seed_text(corpus, "study", "two_arms",
              "[study]\nseeds = 4\n[all]\ntrain = t\nval = v\nsteps = 9\n[arm none]\n[arm drop]\n"
              "drop-path = 0.1\n");
    seed_text(corpus, "study", "all_of_it",
              "# a study\n[study]\nequal = steps\nbaseline = b\ncurve = 0.5, 1.4\nmargin = 1%\n"
              "note = \"a # b\"\n[all]   # for every arm\ntrain = t\nval = v\n"
              "eval-depths = .5,0.25\n"
              "[grid]\nlr = 1e-3 3e-3\n[arm a]\nlayers = 3\n[grid b]\nlr = 2e-3, 1e-3\n"
              "warmup = 1% 5\nlr-schedule = wsd cosine\n[arm b]\ndrop-recipe = elhoushi2026\n");
    seed_text(corpus, "study", "seconds",
              "[study]\nequal = seconds\n[all]\ntrain = t\nval = v\n[grid]\nweight-decay = 0 1\n"
              "[arm a]\n[arm b]\ndropout = 0.1\nlora = 0\n");
}

static void seeds_matmuls(const char *corpus) {
    static const MatmulChoice both[] = {
        {{32768, 3072, 768, 768, 3072, 3072, 0, 0, 0, 0, 164, 1, 0, 0, 0}, 1, {0.302, 0.2513},
         {0x4c74, 1}},
        {{256, 64, 32, 32, 32, 64, 0, 1, 1, 0, 1, 12, 8192, 2048, 16384}, 0, {0.004, -1}, {7}}};
    MatmulChoices c = {NULL, 0, 0};
    Text t = matmul_choices_text(&c, fuzz_where);
    seed_take(corpus, "matmuls", "none", &t);
    for (int i = 0; i < 2; i++) matmul_choices_add(&c, &both[i]);
    t = matmul_choices_text(&c, fuzz_where);
    seed_take(corpus, "matmuls", "two", &t);
    matmul_choices_free(&c);
}

static void seeds_write(const char *corpus) {
    seeds_matmuls(corpus);
    seeds_lists(corpus);
    seeds_shards(corpus), seeds_choices(corpus), seeds_tokenizer(corpus), seeds_safetensors(corpus),
        seeds_models(corpus);
    seeds_text(corpus), seeds_depth(corpus), seeds_replay(corpus), seeds_comm(corpus);
}

#endif
