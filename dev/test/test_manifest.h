// test_manifest.h: manifest.json, valid and damaged, and runs whose shards, tokenizer and model do
// not belong together.
#ifndef TEST_MANIFEST_H
#define TEST_MANIFEST_H

#include "../files/manifest.h"
#include "../files/files.h"
#include "test.h"
#include "test_trainer.h"

// A manifest as written by data/prepare.py, for a tokenizer of V tokens and one shard on each side.
static char *manifest_text(int V, int eot, const char *sha256, int64_t train, int64_t val) {
    return xprintf("{\"format\": \"droppath.c token shards 1\", \"settings\": \"x\",\n"
                   "\"tokenizer\": {\"name\": \"some\", \"vocab_size\": %d, \"end_of_text\": %d, "
                   "\"file\": \"tokenizer.bin\", \"sha256\": \"%s\", \"files\": {}}, \"val\": "
                   "0.1,\n\"splits\": {\"train\": {\"tokens\": %lld, \"bytes\": 5000, "
                   "\"documents\": 3, \"shards\": [{\"file\": \"train_000000.bin\", \"tokens\": "
                   "%lld, \"file_bytes\": 9, \"sha256\": \"\"}]},\n"
                   "\"val\": {\"tokens\": %lld, \"bytes\": 1000, \"documents\": 1, \"shards\": "
                   "[{\"file\": \"val_000000.bin\", \"tokens\": %lld}]}}}\n",
                   V, eot, sha256, (long long)train, (long long)train, (long long)val,
                   (long long)val);
}

#define SOME_SHA256  "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
#define OTHER_SHA256 "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdee"

// ---- Parsing ----

static void test_manifest_parse(void) {
    Manifest m;
    char *text = manifest_text(300, 299, SOME_SHA256, 2000, 400);
    const char *error = manifest_parse(&m, text, strlen(text));
    EXPECT(!error, "%s", error ? error : "");
    if (error) return;
    EXPECT(m.V == 300 && m.eot == 299 && m.shards == 2, "V %d, end-of-text %d, %d shards", m.V,
           m.eot, m.shards);
    EXPECT_TEXT(m.tokenizer, "some");
    EXPECT_TEXT(m.file, "tokenizer.bin");
    EXPECT_TEXT(m.sha256, SOME_SHA256);
    EXPECT_TEXT(m.shard[1].file, "val_000000.bin");
    EXPECT(m.tokens[0] == 2000 && m.shard[0].tokens == 2000 && m.tokens[1] == 400, "tokens");
    // 2 nats per token, 400 tokens of 1000 bytes: 800 / ln 2 bits for 1000 bytes.
    EXPECT_CLOSE(manifest_bits_per_byte(&m, MANIFEST_VAL, 2), 0.8 / log(2), 1e-12, "bits per byte");
    manifest_free(&m);
    EXPECT(isnan(manifest_bits_per_byte(&m, MANIFEST_VAL, 2)), "bits per byte without a manifest");
    free(text);
}

// Parses exactly `size` bytes of memory, so that a sanitizer detects a read beyond them.
static void expect_manifest_error(const char *part, const char *text, size_t size) {
    char *mem = (char *)xcalloc(size, 1);
    memcpy(mem, text, size);
    Manifest m;
    const char *error = manifest_parse(&m, mem, size);
    EXPECT_ERROR(error, part);
    if (!error) manifest_free(&m);
    free(mem);
}

static void test_manifest_damage(void) {
    // text in a valid manifest, its replacement, the error
    static const char *const cases[][3] = {
        {"shards 1\"", "shards 2\"", "not a manifest of this version"},
        {"\"vocab_size\": 300", "\"vocab_size\": 0", "out of range: \"vocab_size\""},
        {"\"vocab_size\": 300", "\"vocab_size\": 16777217", "out of range: \"vocab_size\""},
        {"\"vocab_size\": 300", "\"vocab_size\": 3e2", "no whole number: \"vocab_size\""},
        {"\"end_of_text\": 299", "\"end_of_text\": 300", "out of range: \"end_of_text\""},
        {"\"end_of_text\": 299", "\"end_of_text\": -1", "out of range: \"end_of_text\""},
        {"\"tokenizer\":", "\"other\":", "\"vocab_size\""},
        {"\"tokenizer.bin\"", "\"../tokenizer.bin\"", "not a plain file name"},
        {"\"tokenizer.bin\"", "\"\"", "not a plain file name"},
        {"\"tokenizer.bin\"", "7", "no text: \"file\""},
        {"\"name\": \"some\"", "\"name\": null", "no text: \"name\""},
        {SOME_SHA256, "0123", "64 hex digits"},
        {SOME_SHA256, "G123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
         "64 hex digits"},
        {"\"val\": {\"tokens\"", "\"wal\": {\"tokens\"", "\"tokens\""},
        {"\"tokens\": 2000, \"file", "\"tokens\": 2001, \"file", "out of range: \"tokens\""},
        {"\"tokens\": 2000, \"file", "\"tokens\": 1999, \"file", "not the sum"},
        {"\"tokens\": 2000, \"file", "\"tokens\": 0, \"file", "out of range: \"tokens\""},
        {"\"tokens\": 2000, \"file", "\"tokens\": 9223372036854775808, \"file", "no whole number"},
        {"\"val_000000.bin\"", "\"/etc/passwd\"", "not a plain file name"},
        {"\"bytes\": 1000", "\"bytes\": -1", "out of range: \"bytes\""},
        {"\"shards\": [{\"file\": \"val", "\"shards\": 1, \"x\": [{\"file\": \"val",
         "no list: \"shards\""},
        {"{\"file\": \"val_000000.bin\"", "3, {\"file\": \"val_000000.bin\"", "\"file\""},
    };
    char *good = manifest_text(300, 299, SOME_SHA256, 2000, 400);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *at = strstr(good, cases[i][0]);
        EXPECT(at != NULL, "%s is not in the manifest", cases[i][0]);
        if (!at) continue;
        char *bad = xprintf("%.*s%s%s", (int)(at - good), good, cases[i][1],
                            at + strlen(cases[i][0]));
        expect_manifest_error(cases[i][2], bad, strlen(bad));
        free(bad);
    }
    for (size_t size = 0; size + 2 < strlen(good); size++)
        expect_manifest_error("no valid JSON", good, size);
    expect_manifest_error("not a manifest", "[]", 2);
    free(good);
}

// ---- Whole runs ----

typedef struct { const char *dir; int64_t train, val; char sha256[SHA256_HEX]; } ManifestData;

// A folder with byte shards, DIR/data/, and what their manifest should contain.
static ManifestData manifest_data(void) {
    ManifestData d = {test_directory(), 0, 0, ""};
    char *text = xprintf("%s/text", d.dir);
    trainer_test_text(text);
    tool_expect(0, "", tool_run("data_bytes --out %s/data %s", d.dir, text), __FILE__, __LINE__);
    int64_t *count[2] = {&d.train, &d.val};
    for (int i = 0; i < 2; i++) {
        char *pattern = xprintf("%s/data/%s_*.bin", d.dir, manifest_side[i]);
        Shards s;
        shards_open(&s, pattern, 16, 257);
        *count[i] = s.tokens;
        shards_close(&s);
        free(pattern);
    }
    Text file = {NULL, 0, 0};
    tokenizer_bytes_file(&file);
    sha256_hex(d.sha256, file.s, file.n);
    text_free(&file);
    free(text);
    return d;
}

// Writes DIR/FOLDER/manifest.json.
static void manifest_put(const ManifestData *d, const char *folder, int V, int eot,
                         const char *sha256, int64_t train) {
    char *text = manifest_text(V, eot, sha256, train, d->val),
        *path = xprintf("%s/%s/manifest.json", d->dir, folder);
    char *parent = xprintf("%s/%s", d->dir, folder);
    directory_make(parent);
    file_write_whole(path, text, strlen(text));
    free(parent), free(text), free(path);
}

#define MANIFEST_RUN(d, options)                                                              \
    tool_run("train_gpt --train '%s/data/train_*.bin' --val '%s/data/val_*.bin' --out %s/run " \
             TRAINER_TEST_RUN " --steps 2 %s", (d).dir, (d).dir, (d).dir, options)
#define EXPECT_MANIFEST(code, part, d, options) \
    tool_expect(code, part, MANIFEST_RUN(d, options), __FILE__, __LINE__)

static void test_manifest_refuses(void) {
    ManifestData d = manifest_data();
    char *tokenizer = xprintf("%s/data/tokenizer.bin", d.dir),
        *moved = xprintf("%s/tokenizer.bin", d.dir);
    manifest_put(&d, "data", 257, 256, OTHER_SHA256, d.train);
    EXPECT_MANIFEST(1, "is not the tokenizer of the shards", d, "");
    manifest_put(&d, "data", 258, 256, d.sha256, d.train);
    EXPECT_MANIFEST(1, "is not the tokenizer of the shards", d, "");
    manifest_put(&d, "data", 257, 255, d.sha256, d.train);
    EXPECT_MANIFEST(1, "is not the tokenizer of the shards", d, "");
    manifest_put(&d, "data", 257, 256, d.sha256, d.train - 1);
    EXPECT_MANIFEST(1, "is not a shard that", d, "");
    manifest_put(&d, "data", 257, 256, d.sha256, d.train);
    file_rename(tokenizer, moved);
    EXPECT_MANIFEST(1, "--vocab-size has 256 tokens, but the shards' tokenizer some has 257", d,
                    "--vocab-size 256");
    char *elsewhere = xprintf("%s/val", d.dir), *shard = xprintf("%s/data/val_000000.bin", d.dir);
    char *link = xprintf("%s/val_000000.bin", elsewhere),
        *val = xprintf("--val '%s/val_*.bin'", elsewhere);
    manifest_put(&d, "val", 257, 256, OTHER_SHA256, d.train);
    if (symlink(shard, link)) die("%s: %s", link, strerror(errno));
    EXPECT_MANIFEST(1, "--train and --val have different tokenizers", d, val);
    free(tokenizer), free(moved), free(elsewhere), free(shard), free(link), free(val);
    char *damaged = xprintf("%s/data/manifest.json", d.dir);
    file_write_whole(damaged, "{}", 2);
    EXPECT_MANIFEST(1, "not a manifest of this version", d, "");
    free(damaged);
}

// Without a tokenizer file, vocabulary and bits per byte come from the manifest; the weights are
// those of the run with one. A model of another tokenizer is not continued.
static void test_manifest_tells_vocabulary_and_bytes(void) {
    ManifestData d = manifest_data();
    char *tokenizer = xprintf("%s/data/tokenizer.bin", d.dir),
        *moved = xprintf("%s/tokenizer.bin", d.dir);
    char *metrics = xprintf("%s/run/metrics.jsonl", d.dir), *a = xprintf("%s/plain/latest", d.dir);
    char *b = xprintf("%s/run/latest", d.dir), *plain = xprintf("--out %s/plain", d.dir);
    EXPECT_MANIFEST(0, "", d, plain);
    manifest_put(&d, "data", 257, 256, d.sha256, d.train);
    file_rename(tokenizer, moved);
    EXPECT_MANIFEST(0, "", d, "--eval-tokens 0");
    EXPECT_SAME(a, b, "model.safetensors");
    MetricsLog seen = metrics_read(metrics);
    const Metrics *last = &seen.record[seen.n - 1];
    EXPECT_CLOSE(last->val_bpb, last->val_loss / log(2) * (double)d.val / 1000, 1e-6,
                 "bits per byte by the manifest");
    metrics_log_free(&seen);
    EXPECT_MANIFEST(0, "", d, "--resume --steps 3");
    char *init = xprintf("--init-from %s/run/latest --out %s/again", d.dir, d.dir);
    manifest_put(&d, "data", 257, 256, OTHER_SHA256, d.train);
    EXPECT_MANIFEST(1, "was trained with another tokenizer", d, init);
    EXPECT_MANIFEST(1, "was trained with another tokenizer", d, "--resume --steps 4");
    manifest_put(&d, "data", 129, 128, d.sha256, d.train);
    EXPECT_MANIFEST(1, "has 257 tokens, but the shards' tokenizer some has 129", d, init);
    free(tokenizer), free(moved), free(metrics), free(a), free(b), free(plain), free(init);
}

#define MANIFEST_TESTS(X) \
    X(manifest_parse) X(manifest_damage) X(manifest_refuses) X(manifest_tells_vocabulary_and_bytes)

#endif
