// test_interop.h: weights written by others and read by others: llm.c's model files, sharded
// safetensors, build/export. make test-interop tests with transformers itself.
#ifndef TEST_INTEROP_H
#define TEST_INTEROP_H

#include "../run/checkpoint.h"
#include "../files/files.h"
#include "../files/llmc.h"
#include "../files/tokenizer_json.h"
#include "../run/weights.h"
#include "test.h"
#include "test_checkpoint.h"
#include "test_tools.h"

#define INTEROP_TESTS(X)                                                                       \
    X(interop_narrow) X(interop_llmc_layout) X(interop_llmc_damaged)                           \
    X(interop_llmc_cut_and_flipped)                                                            \
    X(interop_index) X(interop_index_damaged) X(interop_sharded) X(interop_sharded_refuses)    \
    X(interop_tokenizer_json) X(interop_tokenizer_files) X(export_round_trips) X(export_folds) \
    X(export_refuses)                                                                          \
    X(export_takes_tokenizers) X(init_from_llmc) X(init_from_run)

// ---- 16-bit floats ----

// Every 16-bit value round-trips; values between two round to the nearer one, midpoints to the even
// one.
static void interop_test_narrow(int fraction, int bias, float (*widen)(uint16_t)) {
    const unsigned infinity = (2u * (unsigned)bias + 1) << fraction;
    for (unsigned bits = 0; bits < infinity; bits++)
        for (unsigned sign = 0; sign <= 0x8000; sign += 0x8000) {
            const double x = (double)widen((uint16_t)(bits | sign)), s = sign ? -1 : 1;
            // The next number up; past the largest, where it would be, since rounding treats it as
            // if it existed.
            const double next = bits + 1 < infinity ? (double)widen((uint16_t)(bits + 1)) : ldexp(1,
                bias + 1);
            const double middle = (fabs(x) + next) / 2, up = nextafter(middle, INFINITY),
                down = nextafter(middle, 0);
            EXPECT(safetensors_narrow(x, fraction, bias) == (bits | sign), "%g is not itself", x);
            EXPECT(safetensors_narrow(s * middle, fraction, bias) == ((bits + (bits & 1)) | sign),
                   "%g, a tie", middle);
            EXPECT(safetensors_narrow(s * up, fraction, bias) == ((bits + 1) | sign),
                   "%g goes down", up);
            EXPECT(safetensors_narrow(s * down, fraction, bias) == (bits | sign), "%g goes up",
                   down);
        }
    EXPECT(safetensors_narrow(INFINITY, fraction, bias) == infinity, "infinity");
    EXPECT(safetensors_narrow(-1e300, fraction, bias) == (infinity | 0x8000), "-1e300");
    EXPECT(isnan(widen(safetensors_narrow((double)NAN, fraction, bias))), "NaN");
}

static void test_interop_narrow(void) {
    interop_test_narrow(10, 15, safetensors_half);
    interop_test_narrow(7, 127, safetensors_bfloat);
    const real x[4] = {1, (real)65519.99, (real)65520, 2};
    uint16_t half[4];
    EXPECT(safetensors_from_real(SAFETENSORS_F16, x, 4, half) == 2 && half[1] == 0x7BFF,
           "65520 is too large for a half");
    EXPECT(safetensors_from_real(SAFETENSORS_BF16, x, 4, half) == 4 && half[1] == 0x4780,
           "bf16 holds it");
    const real nan[2] = {0, (real)NAN};
    float single[2];
    EXPECT(safetensors_from_real(SAFETENSORS_F32, nan, 2, single) == 1, "NaN is not finite");
}

// ---- llm.c's model files ----

// A file of the test's model, V 7 padded to 9 rows, in which parameter element k is k. Exact in
// fp32 and, up to 256, in bf16. From malloc, exactly sized for the sanitizers.
static unsigned char *interop_test_llmc(int version, size_t *size) {
    const GptConfig *c = &checkpoint_test_config, padded = llmc_padded(c, 9);
    const size_t n = gpt_params_count(&padded), width = version == LLMC_FP32 ? 4 : 2;
    const uint32_t words[8] = {LLMC_MODEL_MAGIC, (uint32_t)version, (uint32_t)c->T, (uint32_t)c->V,
                               (uint32_t)c->L,
                               (uint32_t)c->NH, (uint32_t)c->C, 9};
    *size = LLMC_HEADER_BYTES + n * width;
    unsigned char *file = (unsigned char *)xcalloc(*size, 1);
    llmc_header(file, words, 8);
    for (size_t k = 0; k < n; k++) {
        const float x = (float)(version == LLMC_FP32 ? k : k % 256);
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        bits >>= version == LLMC_FP32 ? 0 : 16;
        memcpy(file + LLMC_HEADER_BYTES + k * width, &bits, width);
    }
    return file;
}

// Elements are where llm.c's order puts them: the table's order, all layers of a parameter
// together, the branches' matrices transposed.
static void test_interop_llmc_layout(void) {
    const GptConfig *c = &checkpoint_test_config;
    for (int version = LLMC_FP32; version <= LLMC_BF16; version += LLMC_BF16 - LLMC_FP32) {
        size_t size, at = 0;
        unsigned char *file = interop_test_llmc(version, &size);
        LlmcModel m;
        const char *error = llmc_model_parse(&m, file, size);
        EXPECT(!error && m.Vp == 9 && !memcmp(&m.config, c, sizeof *c), "%s",
               error ? error : "other sizes");
        for (int p = 0; p < N_PARAMS && !error; p++)
            for (int l = 0; l < gpt_param_layers(c, p); l++) {
                const int rows = gpt_param_rows(c, p), cols = gpt_param_cols(c, p);
                const int transposed = p == P_qkvw || p == P_attprojw || p == P_fcw ||
                    p == P_fcprojw;
                real host[64];
                llmc_model_read(&m, p, l, host);
                for (int r = 0; r < rows; r++)
                    for (int k = 0; k < cols; k++) {
                        const size_t place = at + (size_t)(transposed ? k * rows + r : r * cols +
                                                           k);
                        const double want = (double)(version == LLMC_FP32 ? place : place % 256);
                        EXPECT((double)host[r * cols + k] == want, "%s %d (%d,%d): %g, not %g",
                               gpt_param[p].id, l, r, k, (double)host[r * cols + k], want);
                    }
                at += (size_t)rows * (size_t)cols + (p == P_wte ? 2 * (size_t)c->C : 0);
            }
        EXPECT(LLMC_HEADER_BYTES + at * (version == LLMC_FP32 ? 4 : 2) == size,
               "%zu numbers in %zu bytes", at, size);
        free(file);
    }
}

static void test_interop_llmc_damaged(void) {
    static const struct { int word; uint32_t value; const char *part; } bad[] = {
        {0, 20240520, "magic"}, {0, 0, "magic"}, {1, 0, "version 0"}, {1, 1, "version 1"},
        {1, 4, "version 4"}, {1, LLMC_BF16, "damaged: it has"}, {2, 6, "cut short: it has"},
        {2, 4, "damaged: it has"}, {2, 0, "sequence length"}, {2, 0xFFFFFFFFu, "word 2"},
        {3, 10, "9 rows"}, {3, 1, "vocabulary"}, {3, 0x7FFFFFFFu, "word 3"}, {4, 0, "layers"},
        {4, 1, "damaged: it has"}, {4, 1024, "cut short: it has"}, {5, 3, "multiple"},
        {5, 0, "multiple"}, {6, 0, "channels"}, {6, 8, "cut short: it has"},
        {6, 65536, "cut short: it has"}, {7, 10, "cut short: it has"}, {7, 6, "6 rows"},
        {7, 8, "damaged: it has"}, {7, 0x80000000u, "word 7"}};
    size_t size;
    unsigned char *file = interop_test_llmc(LLMC_FP32, &size);
    LlmcModel m;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        unsigned char header[LLMC_HEADER_BYTES];
        memcpy(header, file, sizeof header);
        for (int k = 0; k < 4; k++)
            file[4 * bad[i].word + k] = (unsigned char)(bad[i].value >> 8 * k);
        EXPECT_ERROR(llmc_model_parse(&m, file, size), bad[i].part);
        memcpy(file, header, sizeof header);
    }
    EXPECT(!llmc_model_parse(&m, file, size), "the file itself is sound");
    free(file);
}

static void test_interop_llmc_cut_and_flipped(void) {
    size_t size;
    unsigned char *file = interop_test_llmc(LLMC_BF16, &size);
    LlmcModel m;
    for (size_t n = 0; n < size; n++) {
        unsigned char *part = (unsigned char *)xcalloc(n, 1);
        memcpy(part, file, n);
        EXPECT(llmc_model_parse(&m, part, n), "the first %zu bytes of %zu were accepted", n, size);
        free(part);
    }
    for (int bit = 0; bit < 8 * 32; bit++) {             // the header's meaningful words
        file[bit / 8] ^= (unsigned char)(1 << bit % 8);
        if (!llmc_model_parse(&m, file, size)) {
            real host[64];
            for (int p = 0; p < N_PARAMS; p++)
                for (int l = 0; l < gpt_param_layers(&m.config, p) &&
                     gpt_param_size(&m.config, p) <= 64; l++)
                    // sanitizers check that it stays within the file
                    llmc_model_read(&m, p, l, host);
        }
        file[bit / 8] ^= (unsigned char)(1 << bit % 8);
    }
    free(file);
}

// ---- Sharded safetensors ----

static void test_interop_index(void) {
    static const char text[] = "{\"metadata\": {\"total_size\": 8}, \"weight_map\": {\"c\": "
        "\"m-2.safetensors\", "
                               "\"a\": \"m-2.safetensors\", \"b\\u00e9\": \"m-1.safetensors\"}}";
    WeightsIndex x;
    const char *error = weights_index_parse(&x, text, sizeof text - 1);
    EXPECT(!error && x.n == 3 && x.files == 2, "%s", error ? error : "other counts");
    if (error) return;
    EXPECT_TEXT(x.file[0], "m-1.safetensors");
    EXPECT_TEXT(x.file[1], "m-2.safetensors");
    const WeightsPlace *a = weights_index_find(&x, "a"), *b = weights_index_find(&x, "b\xC3\xA9");
    EXPECT(a && a->file == 1 && b && b->file == 0 && !weights_index_find(&x, "d"), "wrong places");
    weights_index_free(&x);
    for (size_t n = 0; n < sizeof text - 1; n++)
        EXPECT(weights_index_parse(&x, text, n), "%zu bytes were accepted", n);
}

static void test_interop_index_damaged(void) {
    static const struct { const char *text, *part; } bad[] = {
        {"", "JSON"}, {"[]", "weight_map"}, {"{}", "weight_map"},
        {"{\"weight_map\": []}", "weight_map"}, {"{\"weight_map\": {}}", "weight_map"},
        {"{\"weight_map\": {\"a\": 1}}", "must be a string: \"a\""},
        {"{\"weight_map\": {\"a\\u0000\": \"m.safetensors\"}}", "NUL"},
        {"{\"weight_map\": {\"a\": \"m.safetensors\\u0000\"}}", "must be a string"},
        {"{\"weight_map\": {\"a\": \"m.safetensors\", \"b\": \"m.safetensors\", \"\\u0061\": "
         "\"n.safetensors\"}}",
         "twice: \"a\""},
#define NAMED(name) \
    {"{\"weight_map\": {\"b\": \"m.safetensors\", \"a\": \"" name "\"}}", "same directory: "}
        NAMED(""), NAMED("."), NAMED(".."), NAMED("/etc/m.safetensors"), NAMED("../m.safetensors"),
            NAMED("x/m.safetensors"),
        NAMED("..\\\\m.safetensors"), NAMED(".m.safetensors"), NAMED(".safetensors"),
        NAMED("pytorch_model.bin"),
        NAMED("m.safetensors/")};
#undef NAMED
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        WeightsIndex x;
        EXPECT_ERROR(weights_index_parse(&x, bad[i].text, strlen(bad[i].text)), bad[i].part);
        EXPECT(!x.n && !x.place && !x.file, "%s left something to free", bad[i].text);
    }
}

#define INTEROP_TEST_SIZES \
    "\"vocab_size\": 7, \"n_positions\": 5, \"n_layer\": 2, \"n_head\": 2, \"n_embd\": 4"
#define INTEROP_TEST_CONFIG "{\"model_type\": \"gpt2\", " INTEROP_TEST_SIZES ", \"n_inner\": null}"

// Writes the model to two files, alternating by tensor, and their index.
static void interop_test_shards(const char *dir, Model *m) {
    const GptConfig *c = &checkpoint_test_config;
    Text index = {NULL, 0, 0};
    char *path = xprintf("%s/model.safetensors.index.json", dir),
        *config = xprintf("%s/config.json", dir);
    for (int file = 0; file < 2; file++) {
        char *shard = xprintf("%s/model-%d.safetensors", dir, file);
        FILE *f = file_open(shard, "wb");
        SafetensorsWriter w;
        safetensors_writer_init(&w);
        // declare everything, then append everything
        for (int pass = 0; pass < 2; pass++) {
            int count = 0;
            if (pass) safetensors_begin(&w, f, shard);
            for (int p = 0; p < N_PARAMS; p++)
                for (int l = 0; l < gpt_param_layers(c, p); l++) {
                    if (count++ % 2 != file) continue;
                    int64_t shape[2];
                    real host[64];
                    const int dims = gpt_param_shape(c, p, shape);
                    char *name = gpt_param_name(p, l);
                    engine_cpu()->read(m, SLOT_PARAM, p, l, host);
                    if (!pass) safetensors_declare(&w, name, REAL_DTYPE, dims, shape);
                    else {
                        safetensors_append(&w, host, gpt_param_size(c, p) * sizeof *host);
                        text_printf(&index, "%s\"%s\": \"model-%d.safetensors\"",
                                    index.n ? ", " : "{\"weight_map\": {", name, file);
                    }
                    free(name);
                }
        }
        safetensors_end(&w);
        fclose(f);
        free(shard);
    }
    text_printf(&index, "}}");
    file_write_whole(path, index.s, index.n);
    file_write_whole(config, INTEROP_TEST_CONFIG, strlen(INTEROP_TEST_CONFIG));
    text_free(&index);
    free(path), free(config);
}

static void test_interop_sharded(void) {
    const char *dir = test_directory();
    Model *m = checkpoint_test_model(4), *loaded = checkpoint_test_model(5);
    interop_test_shards(dir, m);
    checkpoint_load_weights(dir, engine_cpu(), loaded, &checkpoint_test_config);
    EXPECT(checkpoint_test_same(m, loaded, SLOT_PARAM), "the weights differ");
    engine_cpu()->close(m);
    engine_cpu()->close(loaded);
}

static void test_interop_sharded_refuses(void) {
    const char *dir = test_directory();
    Model *m = checkpoint_test_model(4);
    char *first = xprintf("%s/model-0.safetensors", dir),
        *second = xprintf("%s/model-1.safetensors", dir);
    char *index = xprintf("%s/model.safetensors.index.json", dir),
        *config = xprintf("%s/config.json", dir);
    char *pickle = xprintf("%s/pytorch_model.bin", dir);
    void *arg = (void *)(uintptr_t)dir;
    interop_test_shards(dir, m);
    EXPECT(!unlink(second), "%s", second);
    EXPECT_EXIT(1, "model-1.safetensors", checkpoint_test_read_config, arg);
    EXPECT_EXIT(1, "downloaded completely", checkpoint_test_read_config, arg);
    interop_test_shards(dir, m);
    // the other shard's tensors under the wrong name
    Text other = test_read_file(second);
    file_write_whole(first, other.s, other.n);
    EXPECT_EXIT(1, "model-0.safetensors has no tensor wte.weight", checkpoint_test_read_config,
                arg);
    text_free(&other);
    interop_test_shards(dir, m);
    const char outside[] = "{\"weight_map\": {\"wte.weight\": \"../model.safetensors\"}}";
    file_write_whole(index, outside, sizeof outside - 1);
    EXPECT_EXIT(1, "same directory", checkpoint_test_read_config, arg);
    EXPECT(!unlink(index), "%s", index);
    EXPECT_EXIT(1, "a checkpoint is a directory", checkpoint_test_read_config, arg);
    fclose(file_open(pickle, "wb"));
    EXPECT_EXIT(1, "pytorch_model.bin is not supported", checkpoint_test_read_config, arg);
    const char inner[] = "{" INTEROP_TEST_SIZES ", \"n_inner\": 8}";
    file_write_whole(config, inner, sizeof inner - 1);
    EXPECT_EXIT(1, "n_inner", checkpoint_test_read_config, arg);
    engine_cpu()->close(m);
    free(first), free(second), free(index), free(config), free(pickle);
}

// ---- tokenizer.json ----

// A vocabulary of bytes and merges. No merge makes token 7: one of two "bb", which is token 10,
// would come too late.
static void test_interop_tokenizer_json(void) {
    static const char vocab[] = "{\"a\": 0, \"b\": 1, \"\\u0120\": 2, \"ab\": 3, \"\\u0120ab\": 4, "
        "\"abab\": 5, "
                                "\"<|endoftext|>\": 6, \"bbbb\": 7, \"\\u00c3\": 8, \"\\u010a\": "
                                "9, \"bb\": 10}";
    Tokenizer t;
    Json doc;
    Text out = {NULL, 0, 0}, config = {NULL, 0, 0};
    const char *error = tokenizer_parse(&t, vocab, sizeof vocab - 1);
    EXPECT(!error, "%s", error);
    error = tokenizer_json_write(&out, &t);
    EXPECT(!error, "%s", error);
    error = json_parse(&doc, out.s, out.n);
    EXPECT(!error, "%s", error);
    static const char *const want[4] = {"a b", "\xC4\xA0 ab", "ab ab", "b b"};
    const int model = json_get(&doc, 0, "model");
    const int merges = json_get(&doc, model, "merges"), words = json_get(&doc, model, "vocab");
    int count = 0;
    for (int k = json_first(&doc, merges); k >= 0; k = json_next(&doc, k), count++)
        EXPECT(count < 4 && json_equals(&doc, k, want[count]), "merge %d is wrong", count);
    EXPECT(count == 4, "%d merges", count);
    int64_t id = -1;
    EXPECT(json_int64(&doc, json_get(&doc, words, "\xC4\x8A"), &id) && id == 9,
           "the line feed is token %d", (int)id);
    EXPECT(json_int64(&doc, json_get(&doc, words, "<|endoftext|>"), &id) && id == 6,
           "end-of-text is token %d", (int)id);
    EXPECT(json_count(&doc, json_get(&doc, 0, "added_tokens")) == 1,
           "end-of-text is not an added token");
    json_free(&doc);
    tokenizer_json_config(&config, 64, "<|\"|>");
    error = json_parse(&doc, config.s, config.n);
    EXPECT(!error && json_equals(&doc, json_get(&doc, 0, "eos_token"), "<|\"|>"),
           "tokenizer_config.json: %s", config.s);
    json_free(&doc);
    text_free(&out), text_free(&config);
    tokenizer_free(&t);

    // the byte tokenizer with token 7 spelled like token 8
    Text file = {NULL, 0, 0};
    tokenizer_bytes_file(&file);
    file.s[LLMC_HEADER_BYTES + 2 * 7 + 1] = 8;
    error = tokenizer_parse(&t, file.s, file.n);
    EXPECT(!error, "%s", error);
    EXPECT_ERROR(tokenizer_json_write(&out, &t), "same bytes");
    tokenizer_free(&t);
    text_free(&file), text_free(&out);
}

// The tokenizer files that go with a model's weights: a tokenizer.json beside ours is copied,
// unless it is damaged or has more tokens; otherwise one is generated from ours, if possible.
static void test_interop_tokenizer_files(void) {
    static const struct { const char *json, *wrong, *eot; int made, decode_only; } cases[] = {
        {NULL, NULL, "<|endoftext|>", 1, 0}, {"{\"model\": {\"vocab\": {\"a\": 0, \"end\": 256}}}",
                                              NULL, "\"end\"", 0, 0},
        {"{\"model\": {\"vocab\": {\"a\": 257}}}", "more tokens than the model", "<|endoftext|>", 1,
         0},
        {"{\"model\": 1}", "no \"model\"", "<|endoftext|>", 1, 0},
        {"{", "tokenizer.json: ", NULL, 0, 1},
        {NULL, "does not specify how text is split", NULL, 0, 1}};
    const char *dir = test_directory();
    char *ours = xprintf("%s/tokenizer.bin", dir), *json = xprintf("%s/tokenizer.json", dir),
        *beside = xprintf("%s/", dir);
    Tokenizer t;
    tokenizer_write_bytes(ours);
    tokenizer_load(&t, ours);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        TokenizerFiles f;
        if (cases[i].json) file_write_whole(json, cases[i].json, strlen(cases[i].json));
        else unlink(json);
        t.decode_only = cases[i].decode_only;
        char *wrong = tokenizer_files_take(&f, &t, ours, beside, 257, 8, 256);
        const Text *whole = &f.file[TOKENIZER_JSON], *config = &f.file[TOKENIZER_CONFIG];
        EXPECT(!wrong == !cases[i].wrong && (!wrong || strstr(wrong, cases[i].wrong)),
               "case %zu: %s", i, wrong);
        EXPECT(f.file[TOKENIZER_BIN].n == 1550 && !f.file[TOKENIZER_VOCAB].n,
               "case %zu: ours is not there", i);
        EXPECT(!config->n == !cases[i].eot && (!config->n || strstr(config->s, cases[i].eot)),
               "case %zu: %s", i, config->s);
        EXPECT(!whole->n == !cases[i].eot, "case %zu: %zu bytes", i, whole->n);
        if (cases[i].eot && !cases[i].made) EXPECT_TEXT(whole->s, cases[i].json);
        tokenizer_files_free(&f);
        free(wrong);
    }
    tokenizer_free(&t);
    free(ours), free(json), free(beside);
}

// ---- build/export ----

// The elements of two checkpoints, in any form, are equal when rounded to dtype.
static void interop_test_same(const char *a, const char *b, int dtype, const char *file, int line) {
    GptConfig c, other;
    double *scale, *none;
    int tied;
    Weights x, y;
    checkpoint_read_config(a, &c, &scale, &tied);
    checkpoint_read_config(b, &other, &none, &tied);
    weights_open(&x, a);
    weights_open(&y, b);
    test_expect(!memcmp(&c, &other, sizeof c), file, line, "%s has other sizes than %s", b, a);
    for (int i = 0; i < BRANCHES * other.L; i++)
        test_expect(none[i] == 1, file, line, "%s still has factors", b);
    for (int p = 0; p < N_PARAMS && !memcmp(&c, &other, sizeof c); p++)
        for (int l = 0; l < gpt_param_layers(&c, p); l++) {
            const size_t n = gpt_param_size(&c, p);
            real *from = (real *)xcalloc(n, sizeof *from), *to = (real *)xcalloc(n, sizeof *to);
            double *narrow = (double *)xcalloc(n, sizeof *narrow);
            weights_read(&x, &c, x.prefix, p, l, from);
            weights_read(&y, &c, y.prefix, p, l, to);
            safetensors_from_real(dtype, from, n, narrow);
            SafetensorsEntry e = {NULL, dtype, 1, {(int64_t)n}, n,
                                  n * safetensors_dtype[dtype].size,
                                  (const unsigned char *)narrow};
            size_t differ = 0;
            for (size_t i = 0; i < n; i++) differ += safetensors_real(&e, i) != (double)to[i];
            test_expect(!differ, file, line, "%zu of %zu numbers of %s %d differ", differ, n,
                        gpt_param[p].id, l);
            free(from), free(to), free(narrow);
        }
    weights_close(&x);
    weights_close(&y);
    free(scale), free(none);
}
#define EXPECT_SAME_WEIGHTS(a, b, dtype) interop_test_same(a, b, dtype, __FILE__, __LINE__)

static void test_export_round_trips(void) {
    static const struct { const char *options, *name; int dtype; } form[5] = {
        {"--dtype f32", "a", SAFETENSORS_F32}, {"--dtype f16", "b", SAFETENSORS_F16},
        {"--dtype bf16", "c", SAFETENSORS_BF16}, {"--format llmc", "d.bin", SAFETENSORS_F32},
        {"--format llmc --dtype bf16", "e.bin", SAFETENSORS_BF16}};
    const char *dir = test_directory();
    char *run = xprintf("%s/plain/latest", tools_test_runs());
    for (int i = 0; i < 5; i++) {
        char *out = xprintf("%s/new/%s", dir, form[i].name),
            *again = xprintf("%s/new/again_%s", dir, form[i].name);
        free(TOOL_OUTPUT("export %s --out %s %s", run, out, form[i].options));
        EXPECT_SAME_WEIGHTS(run, out, form[i].dtype);
        // exports its own output again
        free(TOOL_OUTPUT("export %s --out %s %s", out, again, form[i].options));
        EXPECT_SAME_WEIGHTS(out, again, form[i].dtype);
        if (path_is_directory(out)) {
            EXPECT_SAME(out, again, "model.safetensors");
            EXPECT_SAME(out, again, "config.json");
            EXPECT_SAME(out, again, "tokenizer.json");
        }
        free(out), free(again);
    }
    char *llmc = xprintf("%s/new/d.bin", dir), *back = xprintf("%s/new/back", dir),
        *a = xprintf("%s/new/a", dir);
    free(TOOL_OUTPUT("export %s --out %s", llmc, back));
    EXPECT_SAME(a, back, "model.safetensors");
    free(llmc), free(back), free(a), free(run);
}

// Factors of 0, 1/2 and 1, whose products are exact, in two of three layers: as if folded by hand.
static void test_export_folds(void) {
    const char *plain = tools_test_copy("plain", 1), *scaled = tools_test_copy("plain", 1),
        *dir = test_directory();
    char *out = xprintf("%s/out", dir), *llmc = xprintf("%s/out.bin", dir);
    tools_test_factors(scaled, "1, 1, 0.5, 0.5, 0, 0");
    tools_test_fold(plain, 1, 2, 0.5f);
    tools_test_fold(plain, 2, 3, 0);
    char *said = TOOL_OUTPUT("export %s --out %s", scaled, out);
    EXPECT(strstr(said, "survival scaling folded in"), "it said %s", said);
    free(said);
    EXPECT_SAME_WEIGHTS(plain, out, SAFETENSORS_F32);
    free(TOOL_OUTPUT("export %s --out %s --format llmc", scaled, llmc));
    EXPECT_SAME_WEIGHTS(plain, llmc, SAFETENSORS_F32);
    free(out), free(llmc);
}

// Puts a value into the first weight of wte in a copy of the plain run.
static void interop_test_poke(const char *dir, float value) {
    char *path = xprintf("%s/model.safetensors", dir);
    Text file = test_read_file(path);
    Safetensors t;
    const char *error = safetensors_parse(&t, file.s, file.n);
    EXPECT(!error, "%s", error);
    const real x = (real)value;
    memcpy(file.s + (safetensors_find(&t, "transformer.wte.weight")->data -
                     (unsigned char *)file.s), &x, sizeof x);
    file_write_whole(path, file.s, file.n);
    safetensors_free(&t);
    text_free(&file);
    free(path);
}

static int interop_test_entries(const char *dir) {
    int n = 0;
    DIR *d = opendir(dir);
    while (d && readdir(d)) n++;
    if (d) closedir(d);
    return n - 2;                                        // without . and ..
}

static void test_export_refuses(void) {
    const char *run = tools_test_runs(), *large = tools_test_copy("plain", 1),
        *nan = tools_test_copy("plain", 1);
    const char *dir = test_directory(), *small = test_directory();
    char *vocab = xprintf("%s/vocab.json", small), *json = xprintf("%s/tokenizer.json", small);
    interop_test_poke(large, 65520);
    interop_test_poke(nan, NAN);
    EXPECT_TOOL_REFUSES("the checkpoint is missing", "export --out %s/x", dir);
    EXPECT_TOOL_REFUSES("--out is missing", "export %s/plain", run);
    EXPECT_TOOL_REFUSES("exists already", "export %s/plain --out %s", run, small);
    EXPECT_TOOL_REFUSES("llm.c has no such model files",
                        "export %s/plain --out %s/x --format llmc --dtype f16", run, dir);
    EXPECT_TOOL_REFUSES("cannot be folded", "export %s/survival --out %s/x", run, dir);
    EXPECT_TOOL_REFUSES("wte.weight is 65520, which is not finite in f16",
                        "export %s --out %s/x --dtype f16", large, dir);
    EXPECT_TOOL_REFUSES("wte.weight is nan, which is not finite in f32", "export %s --out %s/x",
                        nan, dir);
    EXPECT_TOOL_REFUSES("wte.weight is nan", "export %s --out %s/x --format llmc", nan, dir);
    EXPECT_TOOL_REFUSES("cannot read", "export %s/nowhere --out %s/x", dir, dir);
    file_write_whole(vocab, "{\"a\": 0, \"b\": 2}", 16);
    EXPECT_TOOL_REFUSES("not a vocab.json", "export %s/plain --out %s/x --tokenizer %s", run, dir,
                        vocab);
    const char many[] = "{\"model\": {\"vocab\": {\"a\": 0}}, \"added_tokens\": [{\"id\": 257, "
        "\"content\": \"x\"}]}";
    file_write_whole(json, many, sizeof many - 1);
    EXPECT_TOOL_REFUSES("has a token 257, the model only 257",
                        "export %s/plain --out %s/x --tokenizer %s", run, dir, json);
    EXPECT(interop_test_entries(dir) == 0, "something was left behind in %s", dir);
    free(TOOL_OUTPUT("export %s --out %s/x --dtype bf16", large, dir));
    EXPECT(interop_test_entries(dir) == 1, "something else was left behind in %s", dir);
    free(vocab), free(json);
}

// A tokenizer.json beside the weights is copied, with the name of the end-of-text token given by
// config.json; leftovers of a killed export are replaced.
static void test_export_takes_tokenizers(void) {
    const char *from = tools_test_copy("plain", 0), *dir = test_directory();
    char *json = xprintf("%s/tokenizer.json", from), *out = xprintf("%s/out", dir),
        *stale = xprintf("%s/.out.tmp", dir);
    char *config = xprintf("%s/tokenizer_config.json", out),
        *left = xprintf("%s/model.safetensors", stale);
    const char given[] = "{\"model\": {\"vocab\": {\"a\": 0, \"end\": 256}}, \"added_tokens\": "
        "[]}\n";
    file_write_whole(json, given, sizeof given - 1);
    directory_make(stale);
    file_write_whole(left, "x", 1);
    free(TOOL_OUTPUT("export %s --out %s", from, out));
    EXPECT_SAME(from, out, "tokenizer.json");
    Text t = test_read_file(config);
    EXPECT(strstr(t.s, "\"eos_token\": \"end\""), "tokenizer_config.json: %s", t.s);
    EXPECT(!path_exists(stale), "%s is still there", stale);
    text_free(&t);
    ToolRun r = tool_run("export %s --out %s/none", tools_test_copy("plain", 0), dir);
    EXPECT(r.code == 0 && strstr(r.err.s, "found no tokenizer"), "without a tokenizer: %s",
           r.err.s);
    tool_free(&r);
    // generated from ours, so that our tools find it beside the weights
    char *ours = xprintf("%s/tokenizer.bin", dir);
    tokenizer_write_bytes(ours);
    free(TOOL_OUTPUT("export %s --out %s/bytes --tokenizer %s", tools_test_copy("plain", 0), dir,
                     ours));
    free(TOOL_OUTPUT("generate %s/bytes --prompt a --tokens 3", dir));
    free(json), free(out), free(stale), free(config), free(left), free(ours);
}

// --init-from takes a run's directory like the tools: its latest or, without that link, the newest
// complete step.
static void test_init_from_run(void) {
    const char *dir = test_directory(), *runs = tools_test_runs();
    char a[400], b[400], c[400];
    snprintf(a, sizeof a, "%s/a", dir), snprintf(b, sizeof b, "%s/b", dir),
        snprintf(c, sizeof c, "%s/c", dir);
    EXPECT_RUN("--layers 3 --steps 3 --init-from %s/plain/latest --out %s", runs, a);
    EXPECT_RUN("--layers 3 --steps 3 --init-from %s/plain --out %s", runs, b);
    ToolRun r = shell_runf("cp -R %s/plain %s/run && rm %s/run/latest && mkdir "
                           "%s/run/step_00000099", runs, dir, dir, dir);
    EXPECT(r.code == 0, "%s", r.err.s);
    tool_free(&r);
    EXPECT_RUN("--layers 3 --steps 3 --init-from %s/run --out %s", dir, c);
    expect_same_metrics(a, b, 0);
    expect_same_metrics(a, c, 0);
    EXPECT_RUN("--layers 3 --steps 3 --init-from %s/run --out %s/d --dry-run", dir, dir);
    tool_expect(0, "",
                tool_run("compare --train '%s/data/train_*.bin' --val "
                         "'%s/data/val_*.bin' " TRAINER_TEST_RUN
                                " --layers 3 --steps 1 --drop-path 0.1 --equal-flops 0 --picture 0 "
                                "--init-from %s/run --out %s/e", trainer_test_data(),
                                trainer_test_data(), dir, dir), __FILE__, __LINE__);
}

// Training starts from an llm.c file as from the directory that it was made from.
static void test_init_from_llmc(void) {
    const char *dir = test_directory();
    char *run = xprintf("%s/deep/latest", tools_test_runs()), a[400], b[400];
    snprintf(a, sizeof a, "%s/a", dir), snprintf(b, sizeof b, "%s/b", dir);
    free(TOOL_OUTPUT("export %s --out %s/m --dtype f32", run, dir));
    free(TOOL_OUTPUT("export %s --out %s/m.bin --format llmc", run, dir));
    EXPECT_RUN("--layers 7 --steps 3 --init-from %s/m --out %s", dir, a);
    EXPECT_RUN("--layers 7 --steps 3 --init-from %s/m.bin --out %s", dir, b);
    expect_same_metrics(a, b, 0);
    EXPECT_REFUSED(1, "has 7", "--layers 6 --steps 3 --init-from %s/m.bin --out %s/c", dir, dir);
    EXPECT_REFUSED(1, "not an llm.c model", "--layers 7 --init-from %s/m/config.json --out %s/c",
                   dir, dir);
    free(run);
}

#endif
