// test_shards.h: the shard format byte for byte, damaged shards, windows, the order of samples.
#ifndef TEST_SHARDS_H
#define TEST_SHARDS_H

#include "../files/choices.h"
#include "../files/files.h"
#include "../files/llmc.h"
#include "../files/shards.h"
#include "../files/tokenizer.h"
#include "../files/json.h"
#include "test.h"

// Writes one file PREFIX_000000.bin of n tokens, first, first + 1, ...
static void write_shard(const char *prefix, int V, int first, int n) {
    ShardWriter w;
    shard_writer_open(&w, prefix, V, 0);
    for (int i = 0; i < n; i++) {
        int token = first + i;
        shard_writer_append(&w, &token, 1);
    }
    shard_writer_close(&w);
}

// Reads a file into exactly sized memory, so that a sanitizer detects a read beyond it.
static unsigned char *read_file(const char *path, size_t *size) {
    FileMap map;
    const char *error = file_map(&map, path);
    if (error) die("%s: %s", path, error);
    unsigned char *copy = (unsigned char *)xcalloc(map.size, 1);
    memcpy(copy, map.data, map.size);
    *size = map.size;
    file_unmap(&map);
    return copy;
}

// ---- The format ----

static void expect_shard_bytes(int V, const unsigned char *head, const unsigned char *tokens,
                               size_t token_bytes) {
    static const int values[3] = {1, 258, 65535};
    const char *dir = test_directory();
    char *prefix = xprintf("%s/s", dir), *path = xprintf("%s_000000.bin", prefix),
        *temporary = xprintf("%s.tmp", path);
    ShardWriter w;
    shard_writer_open(&w, prefix, V, 0);
    shard_writer_append(&w, values, 3);
    EXPECT(!path_exists(path) && path_exists(temporary), "a shard has its name before it is whole");
    shard_writer_close(&w);
    EXPECT(path_exists(path) && !path_exists(temporary), "the shard was not renamed");
    size_t size;
    unsigned char *got = read_file(path, &size);
    EXPECT(size == 1024 + token_bytes, "%zu bytes", size);
    EXPECT(!memcmp(got, head, 12), "header of V %d", V);
    for (int i = 12; i < 1024; i++) EXPECT(got[i] == 0, "byte %d of the header is %d", i, got[i]);
    EXPECT(!memcmp(got + 1024, tokens, token_bytes), "tokens of V %d", V);
    Shard s;
    const char *error = shard_parse(&s, got, size);
    EXPECT(!error, "%s", error ? error : "");
    EXPECT(s.count == 3 && s.width == (int)token_bytes / 3, "count %lld, width %d",
           (long long)s.count, s.width);
    for (int i = 0; i < 3 && !error; i++)
        EXPECT(shard_token(&s, i) == (uint32_t)values[i], "token %d is %u", i, shard_token(&s, i));
    free(got);
    free(prefix);
    free(path);
    free(temporary);
}

// The bytes were derived by hand from the description of the format: 20240520 = 0x0134D888,
// 20240801 = 0x0134D9A1.
static void test_shard_bytes(void) {
    static const unsigned char head16[12] = {0x88, 0xD8, 0x34, 0x01, 1, 0, 0, 0, 3, 0, 0, 0};
    static const unsigned char head32[12] = {0xA1, 0xD9, 0x34, 0x01, 7, 0, 0, 0, 3, 0, 0, 0};
    static const unsigned char tokens16[6] = {1, 0, 2, 1, 255, 255},
        tokens32[12] = {1, 0, 0, 0, 2, 1, 0, 0, 255, 255, 0, 0};
    expect_shard_bytes(65536, head16, tokens16, 6);
    expect_shard_bytes(65537, head32, tokens32, 12);
}

// A copy of a valid shard with one 32-bit word replaced, cut or extended to `size` bytes, must give
// an error that contains `part`.
static void expect_shard_error(const char *part, int word, uint32_t value, size_t size) {
    unsigned char header[1024];
    uint32_t words[3] = {20240520, 1, 4};
    if (word >= 0) words[word] = value;
    llmc_header(header, words, 3);
    unsigned char *mem = (unsigned char *)xcalloc(size, 1);
    memcpy(mem, header, size < 1024 ? size : 1024);
    Shard s;
    const char *error = shard_parse(&s, mem, size);
    if (part) EXPECT_ERROR(error, part);
    else EXPECT(!error, "%s", error ? error : "");
    free(mem);
}

static void test_shard_damage(void) {
    expect_shard_error(NULL, -1, 0, 1032);
    for (size_t size = 0; size < 1032; size++)
        expect_shard_error(size == 0 ? "empty" : size < 4 ? "too short" : "cut short", -1, 0, size);
    expect_shard_error("more bytes", -1, 0, 1033);
    expect_shard_error("more bytes", -1, 0, 1034);
    expect_shard_error("wrong magic", 0, 20240519, 1032);
    expect_shard_error("evaluation file", 0, 20240522, 1032);
    expect_shard_error("big-endian", 0, 0x88D83401, 1032);
    expect_shard_error("big-endian", 0, 0xA1D93401, 1032);
    expect_shard_error("cut short", 0, 20240801, 16);
    expect_shard_error("unknown version", 0, 20240801, 1032);
    expect_shard_error("unknown version", 1, 2, 1032);
    expect_shard_error("cut short", 2, 5, 1032);
    expect_shard_error("cut short", 2, 0xFFFFFFFF, 1032);
    // doubled, this is 8 again in 32 bits
    expect_shard_error("cut short", 2, 0x80000004, 1032);
    expect_shard_error("more bytes", 2, 3, 1032);
    expect_shard_error("more bytes", 2, 0, 1032);
    expect_shard_error("without tokens", 2, 0, 1024);
    Shard s;
    EXPECT_ERROR(shard_parse(&s, "First Citizen:\n", 15), "plain text");
    EXPECT_ERROR(shard_parse(&s, "a\nb\tc", 5), "plain text");
    EXPECT_ERROR(shard_parse(&s, "\x93NUMPY", 6), "wrong magic");
}

static void test_shard_writer_splits(void) {
    const char *dir = test_directory();
    char *prefix = xprintf("%s/train", dir);
    int tokens[10] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
    static const int counts[5] = {4, 4, 4, 4, 4};
    ShardWriter w;
    shard_writer_open(&w, prefix, 10, 4);
    shard_writer_append(&w, tokens, 10);
    shard_writer_append(&w, tokens, 10);
    shard_writer_close(&w);
    EXPECT(w.shards == 5 && w.total == 20, "%d shards, %lld tokens", w.shards, (long long)w.total);
    for (int i = 0; i < 5; i++) {
        char *path = xprintf("%s_%06d.bin", prefix, i);
        size_t size;
        unsigned char *mem = read_file(path, &size);
        Shard s;
        const char *error = shard_parse(&s, mem, size);
        EXPECT(!error && s.count == counts[i], "%s: %s", path, error ? error : "count");
        for (int t = 0; t < counts[i] && !error; t++)
            EXPECT(shard_token(&s, t) == (uint32_t)((4 * i + t) % 10), "shard %d token %d", i, t);
        free(mem);
        free(path);
    }
    char *none = xprintf("%s_%06d.bin", prefix, 5);
    EXPECT(!path_exists(none), "a shard without tokens was made");
    shard_writer_open(&w, none, 10, 0);
    shard_writer_close(&w);
    EXPECT(w.shards == 0, "a writer without tokens made a shard");
    free(none);
    free(prefix);
}

// ---- Windows ----

// Four shards whose names are not in the order of writing; tokens identify their shard and
// position.
static void write_shards(const char *dir) {
    static const int length[4] = {1, 9, 4, 23};
    for (int i = 3; i >= 0; i--) {
        char *prefix = xprintf("%s/%c", dir, "abcd"[i]);
        write_shard(prefix, 1000, 100 * i, length[i]);
        free(prefix);
    }
}

static void test_shards_windows(void) {
    enum { T = 4 };
    // 9 tokens hold 2 windows, 4 none, 23 five
    static const int first[7] = {100, 104, 300, 304, 308, 312, 316};
    int tokens[T], targets[T];
    const char *dir = test_directory();
    write_shards(dir);
    char *patterns = xprintf("%s/[cd]_*.bin,%s/b_000000.bin,%s/a_*", dir, dir, dir);
    Shards s;
    shards_open(&s, patterns, T, 1000);
    EXPECT(s.n == 4 && s.windows == 7 && s.tokens == 37, "%d shards, %lld windows, %lld tokens",
           s.n, (long long)s.windows, (long long)s.tokens);
    for (int w = 0; w < 7; w++) {
        shards_read_window(&s, w, tokens, targets);
        for (int t = 0; t < T; t++)
            EXPECT(tokens[t] == first[w] + t && targets[t] == first[w] + t + 1,
                   "window %d place %d: %d -> %d", w, t, tokens[t], targets[t]);
    }
    shards_close(&s);
    // the smallest window: a token and its successor
    shards_open(&s, patterns, 1, 1000);
    EXPECT(s.windows == 0 + 8 + 3 + 22, "%lld windows", (long long)s.windows);
    shards_read_window(&s, 32, tokens, targets);
    EXPECT(tokens[0] == 321 && targets[0] == 322, "%d -> %d", tokens[0], targets[0]);
    shards_close(&s);
    free(patterns);
}

// Whatever their length, odd ones included, the windows of a shard follow each other from its first
// token on, as many as fit.
static void test_shards_windows_of_any_length(void) {
    static const int length[4] = {1, 9, 4, 23};
    const char *dir = test_directory();
    char *pattern = xprintf("%s/*.bin", dir);
    write_shards(dir);
    for (int T = 1; T <= 22; T++) {
        int tokens[22], targets[22];
        int64_t w = 0;
        Shards s;
        shards_open(&s, pattern, T, 1000);
        for (int i = 0; i < 4; i++)
            for (int at = 0; at + T < length[i]; at += T, w++) {
                if (w >= s.windows) continue;
                shards_read_window(&s, w, tokens, targets);
                for (int t = 0; t < T; t++)
                    EXPECT(tokens[t] == 100 * i + at + t && targets[t] == tokens[t] + 1,
                           "T %d, window %d, place %d: %d -> %d", T, (int)w, t, tokens[t],
                           targets[t]);
            }
        EXPECT(w == s.windows, "T %d: %d windows, not %d", T, (int)s.windows, (int)w);
        shards_close(&s);
    }
    free(pattern);
}

// Samples beyond 2^31 and 2^32 belong to the right epoch: indices have 64 bits.
static void test_shards_samples_beyond_32_bits(void) {
    enum { T = 3, WINDOWS = 10 };
    static const int first[WINDOWS] = {100, 103, 200, 300, 303, 306, 309, 312, 315, 318};
    const char *dir = test_directory();
    char *pattern = xprintf("%s/*.bin", dir);
    int tokens[T], targets[T], other = 0;
    Shards s;
    write_shards(dir);
    shards_open(&s, pattern, T, 1000);
    EXPECT(s.windows == WINDOWS, "%d windows", (int)s.windows);
    for (int bits = 31; bits <= 60 && s.windows == WINDOWS; bits++)
        for (int i = 0; i < 20; i++) {
            const int64_t sample = ((int64_t)1 << bits) + i;
            shards_read_sample(&s, 9, sample, tokens, targets);
            const int want = first[shards_order(9, sample / WINDOWS, sample % WINDOWS, WINDOWS)];
            EXPECT(tokens[0] == want, "sample 2^%d + %d begins with %d, not %d", bits, i, tokens[0],
                   want);
            other += want != first[shards_order(9, i / WINDOWS, i % WINDOWS, WINDOWS)];
        }
    EXPECT(other > 300, "%d of 600 differ from those of the lower bits", other);
    shards_close(&s);
    free(pattern);
}

// Both widths may be mixed; tokens above 16 bits are read back.
static void test_shards_wide(void) {
    int tokens[2], targets[2];
    const char *dir = test_directory();
    char *narrow = xprintf("%s/a", dir), *wide = xprintf("%s/b", dir),
        *pattern = xprintf("%s/*.bin", dir);
    write_shard(narrow, 65536, 65533, 3);
    write_shard(wide, 200000, 131070, 3);
    Shards s;
    shards_open(&s, pattern, 2, 200000);
    EXPECT(s.windows == 2, "%lld windows", (long long)s.windows);
    shards_read_window(&s, 0, tokens, targets);
    EXPECT(tokens[0] == 65533 && targets[1] == 65535, "%d, %d", tokens[0], targets[1]);
    shards_read_window(&s, 1, tokens, targets);
    EXPECT(tokens[0] == 131070 && targets[1] == 131072, "%d, %d", tokens[0], targets[1]);
    shards_close(&s);
    free(narrow);
    free(wide);
    free(pattern);
}

typedef struct { const char *patterns; int T, V, window; } ShardsCase;

static void open_shards(void *arg) {
    const ShardsCase *c = (const ShardsCase *)arg;
    int *buffer = (int *)xcalloc((size_t)c->T, 2 * sizeof *buffer);
    Shards s;
    shards_open(&s, c->patterns, c->T, c->V);
    if (c->window >= 0) shards_read_window(&s, c->window, buffer, buffer + c->T);
    shards_close(&s);
    free(buffer);
}

static void expect_shards_exit(const char *part, char *patterns, int T, int V, int window) {
    ShardsCase c = {patterns, T, V, window};
    EXPECT_EXIT(part ? 1 : 0, part ? part : "", open_shards, &c);
    free(patterns);
}

static void test_shards_errors(void) {
    const char *dir = test_directory();
    write_shards(dir);
    char *cut = xprintf("%s/cut_000000.bin", dir);
    file_write_whole(cut, "\x88\xD8\x34\x01", 4);
    expect_shards_exit("data/README.md", xprintf("%s/nothing_*.bin", dir), 4, 1000, -1);
    expect_shards_exit("nothing", xprintf("%s/b_*,%s/nothing", dir, dir), 4, 1000, -1);
    expect_shards_exit("no token shard matches \"\"", xprintf("%s/b_*,", dir), 4, 1000, -1);
    expect_shards_exit("matched twice", xprintf("%s/b_*,%s/b_000000.bin", dir, dir), 4, 1000, -1);
    expect_shards_exit("not a regular file", xprintf("%s", dir), 4, 1000, -1);
    expect_shards_exit("cut_000000.bin: cut short", xprintf("%s/*.bin", dir), 4, 1000, -1);
    expect_shards_exit("--seq-len", xprintf("%s/[ac]_*.bin", dir), 4, 1000, -1);
    expect_shards_exit(NULL, xprintf("%s/b_*.bin", dir), 4, 109, 1);
    expect_shards_exit("b_000000.bin: token 7 is 107, but the vocabulary has 107",
                       xprintf("%s/b_*.bin", dir), 4, 107, -1);
    // only the first is checked at once ...
    expect_shards_exit(NULL, xprintf("%s/[bd]_*.bin", dir), 4, 109, 1);
    // ... the others later
    expect_shards_exit("d_000000.bin: token 0 is 300", xprintf("%s/[bd]_*.bin", dir), 4, 109, 2);
    // a target counts, too
    expect_shards_exit("d_000000.bin: token 4 is 304", xprintf("%s/[bd]_*.bin", dir), 4, 304, 2);
    free(cut);
}

// ---- The order ----

static void test_shards_order_permutes(void) {
    static const int sizes[] = {1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000, 4097};
    for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++)
        for (int epoch = 0; epoch < 3; epoch++) {
            int n = sizes[k], seen = 0;
            char *hit = (char *)xcalloc((size_t)n, 1);
            for (int i = 0; i < n; i++) {
                int64_t at = shards_order(42, epoch, i, n);
                EXPECT(at >= 0 && at < n, "%lld of %d", (long long)at, n);
                if (at >= 0 && at < n && !hit[at]) seen += hit[at] = 1;
            }
            EXPECT(seen == n, "n %d epoch %d: %d places are taken", n, epoch, seen);
            free(hit);
        }
    int64_t n = (int64_t)1 << 62, last = shards_order(1, 0, n - 1, n);
    EXPECT(last >= 0 && last < n, "%lld", (long long)last);
}

// Two random permutations of n agree in one position on average, and in more than 10 once in 10^8.
static void test_shards_order_differs(void) {
    enum { N = 1000 };
    int same[4] = {0, 0, 0, 0};
    for (int i = 0; i < N; i++) {
        int64_t at = shards_order(42, 0, i, N);
        same[0] += at == shards_order(42, 1, i, N);                    // another epoch
        same[1] += at == shards_order(43, 0, i, N);                    // another seed
        same[2] += at == shards_order(42 + ((uint64_t)1 << 32), 0, i, N);
        same[3] += at == i;                                            // not the identity
    }
    for (int k = 0; k < 4; k++)
        EXPECT(same[k] <= 10, "case %d: %d of %d samples keep their place", k, same[k], N);
}

// Over seeds, the positions of the first two of n samples are equally often each of n(n-1) pairs:
// chi-square, with mean f, its degrees of freedom, and standard deviation sqrt(2f). Eight rounds
// are still 10% off at n = 16.
static void test_shards_order_uniform(void) {
    enum { SEEDS = 40000 };
    static const int sizes[3] = {16, 40, 50};
    for (int k = 0; k < 3; k++) {
        int n = sizes[k], *count = (int *)xcalloc((size_t)(n * n), sizeof *count);
        for (int seed = 0; seed < SEEDS; seed++)
            count[shards_order((uint64_t)seed, 0, 0, n) * n + shards_order((uint64_t)seed, 0, 1,
                n)]++;
        double f = n * (n - 1.0) - 1, expected = SEEDS / (f + 1), chi2 = 0;
        for (int i = 0; i < n * n; i++)
            if (i / n != i % n) chi2 += (count[i] - expected) * (count[i] - expected) / expected;
        EXPECT_CLOSE(chi2, f, 5 * sqrt(2 * f), "chi-square");
        free(count);
    }
    // A random permutation moves a sample by n/3 on average, with standard error n sqrt(1/18) /
    // sqrt(n).
    enum { N = 3000 };
    double moved = 0;
    for (int i = 0; i < N; i++) moved += llabs((long long)shards_order(7, 5, i, N) - i);
    EXPECT_CLOSE(moved / N, N / 3.0, 5 * sqrt(N / 18.0), "mean displacement");
}

// Each epoch visits every window once, and a sample does not depend on which were read before.
static void test_shards_samples(void) {
    enum { T = 4, WINDOWS = 7, EPOCHS = 3 };
    int tokens[T], targets[T], first[EPOCHS * WINDOWS], moved = 0;
    const char *dir = test_directory();
    write_shards(dir);
    char *pattern = xprintf("%s/*.bin", dir);
    Shards s;
    shards_open(&s, pattern, T, 1000);
    for (int i = EPOCHS * WINDOWS - 1; i >= 0; i--) {
        shards_read_sample(&s, 9, i, tokens, targets);
        first[i] = tokens[0];
    }
    for (int epoch = 0; epoch < EPOCHS; epoch++) {
        int sum = 0;
        for (int i = 0; i < WINDOWS; i++) {
            sum += first[epoch * WINDOWS + i];
            moved += first[epoch * WINDOWS + i] != first[i];
            for (int j = 0; j < i; j++)
                EXPECT(first[epoch * WINDOWS + i] != first[epoch * WINDOWS + j],
                       "epoch %d shows a window twice", epoch);
        }
        EXPECT(sum == 100 + 104 + 300 + 304 + 308 + 312 + 316, "epoch %d", epoch);
    }
    EXPECT(moved > 0, "all epochs have the same order");
    shards_read_sample(&s, 9, 12, tokens, targets);
    EXPECT(tokens[0] == first[12], "sample 12 begins with %d, then with %d", first[12], tokens[0]);
    shards_close(&s);
    free(pattern);
}

// A path that exists stands for itself; otherwise it is a pattern.
static void test_shards_literal_names(void) {
    static const char *const names[] = {"a[1].bin", "b{x,y}.bin", "c,d.bin", "e\\f.bin", "~g.bin",
                                        "h*?.bin", "[1]\\*,.bin"};
    const char *dir = test_directory();
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char *path = xprintf("%s/%s", dir, names[i]);
        FILE *f = fopen(path, "wb");
        EXPECT(f && fclose(f) == 0, "cannot make %s", path);
        glob_t found = shards_glob(path);
        EXPECT(found.gl_pathc == 1, "%zu files for %s", (size_t)found.gl_pathc, path);
        EXPECT_TEXT(found.gl_pathv[0], path);
        globfree(&found);
        free(path);
    }
}

static void test_lfs_pointers(void) {
    static const char pointer[] = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize "
        "12345\n";
    Shard s;
    Json d;
    EXPECT_ERROR(shard_parse(&s, pointer, sizeof pointer - 1), "Git LFS pointer");
    EXPECT_ERROR(json_parse(&d, pointer, sizeof pointer - 1), "Git LFS pointer");
    Tokenizer t;
    LlmcModel m;
    Choices c;
    EXPECT_ERROR(tokenizer_parse(&t, pointer, sizeof pointer - 1), "Git LFS pointer");
    EXPECT_ERROR(llmc_model_parse(&m, pointer, sizeof pointer - 1), "Git LFS pointer");
    EXPECT_ERROR(choices_parse(&c, pointer, sizeof pointer - 1), "Git LFS pointer");
}

// The same if a user names the file: it is never treated as text, nor skipped.
static void test_lfs_pointers_named(void) {
    static const char pointer[] = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize "
        "12345\n";
    static const char *const names[] = {"run.txt", "tokenizer.json", "text.txt"};
    const char *dir = test_directory();
    for (int i = 0; i < 3; i++) {
        char *path = xprintf("%s/%s", dir, names[i]);
        file_write_whole(path, pointer, sizeof pointer - 1);
        free(path);
    }
    char *vocabulary = xprintf("%s/vocab.json", dir);
    file_write_whole(vocabulary, "{\"a\": 0, \"<|endoftext|>\": 1}", 28);
    ToolRun runs[] = {tool_run("train_gpt --config %s/run.txt", dir),
                      tool_run("data_bytes --out %s/d %s/text.txt", dir, dir),
                      tool_run("data_bytes --out %s/d %s", dir, dir),
                      tool_run("train_gpt --train '%s/*.bin' --tokenizer %s --out %s/out", dir,
                               vocabulary, dir)};
    for (size_t i = 0; i < sizeof runs / sizeof runs[0]; i++)
        tool_expect(1, "a Git LFS pointer, not the file itself\n  hint: git lfs pull", runs[i],
                    __FILE__, __LINE__);
    free(vocabulary);
}

#define SHARDS_TESTS(X)                                                                          \
    X(shard_bytes) X(shard_damage) X(shard_writer_splits) X(shards_windows) X(shards_wide)       \
    X(shards_errors) X(shards_order_permutes) X(shards_order_differs) X(shards_order_uniform)    \
    X(shards_samples) X(shards_windows_of_any_length) X(shards_samples_beyond_32_bits)           \
    X(shards_literal_names) X(lfs_pointers) X(lfs_pointers_named)

#endif
