// test_tokenizer.h: both file formats, valid and damaged, GPT-2's pieces and merges on a small
// vocabulary, bytes.
#ifndef TEST_TOKENIZER_H
#define TEST_TOKENIZER_H

#include "../files/tokenizer.h"
#include "../files/files.h"
#include "test.h"

// A vocabulary like GPT-2's: the 256 bytes, merges in the order learned, end-of-text.
static const char *const test_merges[] = {
    "th", "he", "the", " t", " the", "in", "ing", "aa", "bc", "ab", "  ", "\n\n", "12", "'s",
    "\xC3\xA9", TOKENIZER_EOT,
};
enum { TEST_MERGES = sizeof test_merges / sizeof *test_merges, TEST_V = 256 + TEST_MERGES };
enum { TH = 256, HE, THE, _T, _THE, IN, ING, AA, BC, AB, TWO_SPACES, TWO_LINES, TWELVE, _S, E_ACUTE,
       EOT };

// Its tokenizer.bin.
static Text make_llmc_file(uint32_t version, uint32_t V, uint32_t eot) {
    unsigned char header[LLMC_HEADER_BYTES];
    uint32_t words[4] = {20240328, version, V, eot};
    llmc_header(header, words, 4);
    Text file = {NULL, 0, 0};
    text_append(&file, header, sizeof header);
    for (int b = 0; b < 256; b++) {
        char token[2] = {1, (char)b};
        text_append(&file, token, 2);
    }
    for (int i = 0; i < TEST_MERGES; i++) {
        char n = (char)strlen(test_merges[i]);
        text_append(&file, &n, 1);
        text_append(&file, test_merges[i], (size_t)n);
    }
    return file;
}

// A byte as \u escapes in GPT-2's alphabet: the three printable ranges are literal, the others
// numbered.
static void write_byte(Text *file, int byte) {
    int others = 0;
    for (int b = 0; b <= byte; b++) {
        int prints = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || (b >= 0xAE && b <= 0xFF);
        if (b == byte) text_printf(file, "\\u%04x", prints ? b : 256 + others);
        others += !prints;
    }
}

// Its vocab.json, the last token first.
static Text make_json_file(void) {
    Text file = {NULL, 0, 0};
    text_printf(&file, "{");
    for (int i = TEST_V - 1; i >= 0; i--) {
        text_printf(&file, "\"");
        if (i < 256) write_byte(&file, i);
        else for (const char *p = test_merges[i - 256]; *p; p++)
            write_byte(&file, (unsigned char)*p);
        text_printf(&file, "\": %d%s", i, i ? ", " : "}");
    }
    return file;
}

static void tokenizer_of(Tokenizer *t, Text file) {
    const char *error = tokenizer_parse(t, file.s, file.n);
    if (error) die("%s", error);
    text_free(&file);
}

// ---- Files ----

static void expect_test_vocabulary(Tokenizer *t) {
    EXPECT(t->V == TEST_V && t->eot == EOT, "V %d, end-of-text %d", t->V, t->eot);
    for (int i = 0; i < t->V; i++) {
        int n;
        const char byte = (char)i, *want = i < 256 ? &byte : test_merges[i - 256],
            *got = tokenizer_bytes(t, i, &n);
        EXPECT(n == (i < 256 ? 1 : (int)strlen(want)) && !memcmp(got, want, (size_t)n),
               "token %d: %.*s", i, n, got);
        EXPECT(tokenizer_text_length(t, i) == (i == EOT ? 0 : n), "text length of token %d", i);
    }
    tokenizer_free(t);
}

static void test_tokenizer_formats(void) {
    Tokenizer t;
    tokenizer_of(&t, make_llmc_file(2, TEST_V, EOT));
    expect_test_vocabulary(&t);
    tokenizer_of(&t, make_json_file());
    expect_test_vocabulary(&t);
}

// Version 1 does not specify its end-of-text token: it is GPT-2's.
static void test_tokenizer_version_1(void) {
    enum { V = 50257 };
    unsigned char header[LLMC_HEADER_BYTES];
    uint32_t words[3] = {20240328, 1, V};
    llmc_header(header, words, 3);
    Text file = {NULL, 0, 0};
    text_append(&file, header, sizeof header);
    for (int i = 0; i < V; i++) {
        unsigned char token[3] = {2, (unsigned char)(i >> 8), (unsigned char)i};
        text_append(&file, token, 3);
    }
    Tokenizer t;
    tokenizer_of(&t, file);
    EXPECT(t.V == V && t.eot == 50256, "V %d, end-of-text %d", t.V, t.eot);
    int n;
    const char *got = tokenizer_bytes(&t, 0x1234, &n);
    EXPECT(n == 2 && got[0] == 0x12 && got[1] == 0x34, "%d bytes", n);
    tokenizer_free(&t);
}

// Parses exactly `size` bytes of memory, so that a sanitizer detects a read beyond them.
static void expect_tokenizer_error(const char *part, const char *bytes, size_t size) {
    char *mem = (char *)xcalloc(size, 1);
    if (size) memcpy(mem, bytes, size);
    Tokenizer t;
    const char *error = tokenizer_parse(&t, mem, size);
    EXPECT_ERROR(error, part);
    if (!error) tokenizer_free(&t);
    free(mem);
}

static void expect_llmc_error(const char *part, Text file) {
    expect_tokenizer_error(part, file.s, file.n);
    text_free(&file);
}

static void test_tokenizer_damage(void) {
    Text file = make_llmc_file(2, TEST_V, EOT);
    for (size_t size = 0; size < file.n; size += size < 1000 ? 100 : 1)
        expect_tokenizer_error(size < 4 ? "not a tokenizer file" : "cut short", file.s, size);
    text_append(&file, "x", 1);
    expect_llmc_error("bytes follow", file);
    expect_llmc_error("unknown version", make_llmc_file(4, TEST_V, EOT));
    expect_llmc_error("end-of-text", make_llmc_file(2, TEST_V, TEST_V));
    expect_llmc_error("end-of-text", make_llmc_file(1, TEST_V, 0));
    expect_llmc_error("end-of-text", make_llmc_file(2, 0, 0));
    expect_llmc_error("cut short", make_llmc_file(2, TEST_V + 1, EOT));
    expect_llmc_error("bytes follow", make_llmc_file(2, TEST_V - 1, 0));
    expect_llmc_error("cut short", make_llmc_file(2, 1 << 24, 0));
    expect_llmc_error("more than 16777216", make_llmc_file(2, 0xFFFFFFFF, 0));
    file = make_llmc_file(2, TEST_V, EOT);
    file.s[LLMC_HEADER_BYTES] = 0;
    expect_llmc_error("without bytes", file);
    file = make_llmc_file(2, TEST_V, EOT);
    file.s[0]++;
    expect_llmc_error("not a tokenizer file", file);
}

static void test_tokenizer_json_damage(void) {
    static const char *const cases[][2] = {
        {"{", "no valid JSON: byte 1"},
        {"{\"a\": 0,}", "no valid JSON"},
        {"{}", "without tokens"},
        {"{\"a\": \"0\"}", "not an integer"},
        {"{\"a\": 0.5}", "not an integer"},
        {"{\"a\": 1}", "not exactly 0"},
        {"{\"a\": -1}", "not exactly 0"},
        {"{\"a\": 0, \"b\": 0}", "not exactly 0"},
        {"{\"a\": 0, \"b\": 9223372036854775807}", "not exactly 0"},
        {"{\"a\": 0, \"\": 1}", "token 1 is not written"},
        {"{\"a\": 0, \" \": 1}", "token 1 is not written"},            // a space is written U+0120
        // U+0143 is byte 173, the alphabet's last
        {"{\"\\u0143\": 0, \"\\u0144\": 1}", "token 1 is not written"},
        {"{\"\\u65e5\": 0}", "token 0 is not written"},
        {"{\"version\": \"1.0\", \"model\": {\"vocab\": {}}}", "not a vocab.json"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        expect_tokenizer_error(cases[i][1], cases[i][0], strlen(cases[i][0]));
    Text file = make_json_file();
    for (size_t size = 1; size < file.n; size += 13)
        expect_tokenizer_error("no valid JSON", file.s, size);
    text_free(&file);
}

// A file of version 3: the 256 bytes, a token of `longest` bytes, end-of-text; `otherwise` is the
// header's flag.
static Text make_wide_file(uint32_t otherwise, uint32_t longest) {
    unsigned char header[LLMC_HEADER_BYTES], length[4];
    uint32_t words[5] = {20240328, 3, 258, 257, otherwise};
    llmc_header(header, words, 5);
    Text file = {NULL, 0, 0};
    text_append(&file, header, sizeof header);
    for (uint32_t i = 0; i < 258; i++) {
        const uint32_t n = i < 256 ? 1 : i == 256 ? longest : 3;
        for (int b = 0; b < 4; b++) length[b] = (unsigned char)(n >> 8 * b);
        text_append(&file, length, 4);
        for (uint32_t b = 0; b < n; b++)
            text_append(&file, i < 256 ? (const char *)&i : i == 256 ? " " : &"end"[b], 1);
    }
    return file;
}

// Tokens of more than 255 bytes, and a tokenizer that splits text differently: read and displayed,
// but not used to encode.
static void test_tokenizer_version_3(void) {
    Tokenizer t;
    int n, tokens[8];
    for (uint32_t otherwise = 0; otherwise < 2; otherwise++) {
        tokenizer_of(&t, make_wide_file(otherwise, 300));
        const char *got = tokenizer_bytes(&t, 256, &n);
        EXPECT(t.V == 258 && t.eot == 257 && n == 300 && got[299] == ' ', "V %d, eot %d, %d bytes",
               t.V, t.eot, n);
        const int64_t count = tokenizer_encode(&t, "ab", 2, tokens);
        EXPECT(count == (otherwise ? -2 : 2), "%lld tokens", (long long)count);
        tokenizer_free(&t);
    }
    Text file = make_wide_file(0, 300);
    for (size_t size = LLMC_HEADER_BYTES; size < file.n; size += 7)
        expect_tokenizer_error("cut short", file.s, size);
    text_append(&file, "x", 1);
    expect_llmc_error("bytes follow", file);
    expect_llmc_error("unknown text-splitting flag", make_wide_file(2, 300));
    expect_llmc_error("without bytes", make_wide_file(0, 0));
    expect_llmc_error("more than 1 MiB", make_wide_file(0, (1 << 20) + 1));
}

// A tokenizer.json beside the file, and whether it allows this tokenizer to encode.
static void test_tokenizer_json_beside(void) {
    static const char level[] = "{\"type\": \"ByteLevel\", \"add_prefix_space\": false}";
    static const char split[] = "{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": "
        "\"Split\"}, "
                                "{\"type\": \"ByteLevel\", \"add_prefix_space\": false, "
                                "\"use_regex\": false}]}";
    static const char one[] = "{\"type\": \"Sequence\", \"pretokenizers\": "
                              "[{\"type\": \"ByteLevel\", \"add_prefix_space\": false}]}";
    static const struct { const char *normalizer, *splits, *more, *merges, *added; int decode_only;
                          } cases[] = {
        {"null", level, "", "\"t h\", \"h e\", [\"t\", \"he\"]", "", 0},
        {"{\"type\": \"Sequence\", \"normalizers\": []}", one,
         ", \"dropout\": null, \"end_of_word_suffix\": \"\"", "", "", 0},
        {"null", level, "", "", "{\"id\": 3, \"special\": true}, {\"id\": 271, \"special\": false}",
         0},
        {"{\"type\": \"NFC\"}", level, "", "", "", 1}, {"null", split, "", "", "", 1},
        {"null", "null", "", "", "", 1}, {"null", "{\"type\": \"ByteLevel\"}", "", "", "", 1},
        {"null", level, ", \"ignore_merges\": true", "", "", 1},
        {"null", level, ", \"type\": \"WordPiece\"", "", "", 1},
        {"null", level, "", "", "{\"id\": 3, \"special\": false}", 1},
        {"null", level, "", "\"h e\", \"t h\"", "", 1}, {"null", level, "", "\"x y\"", "", 1},
        {"null", level, "", "7, \"xy\"", "", 1},
    };
    const char *dir = test_directory();
    char *path = xprintf("%s/tokenizer.bin", dir), *json = xprintf("%s/tokenizer.json", dir);
    Text file = make_llmc_file(2, TEST_V, EOT);
    file_write_whole(path, file.s, file.n);
    Tokenizer t;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Text beside = {NULL, 0, 0};
        text_printf(&beside, "{\"normalizer\": %s, \"pre_tokenizer\": %s, \"added_tokens\": [%s], "
                    "\"model\": {\"merges\": [%s]%s}}",
                    cases[i].normalizer, cases[i].splits, cases[i].added, cases[i].merges,
                    cases[i].more);
        file_write_whole(json, beside.s, beside.n);
        tokenizer_load(&t, path);
        EXPECT(t.decode_only == cases[i].decode_only, "case %d: %s", (int)i, beside.s);
        tokenizer_free(&t), text_free(&beside);
    }
    file_write_whole(json, "{", 1);                      // an unreadable one has no effect
    tokenizer_load(&t, path);
    EXPECT(!t.decode_only, "a broken file beside it");
    tokenizer_free(&t), text_free(&file);
    free(path), free(json);
}

// A byte-order mark before a vocabulary is not part of it; compressed files are reported.
static void test_tokenizer_byte_order_mark(void) {
    Text plain = make_json_file(), marked = {NULL, 0, 0};
    text_append(&marked, "\xEF\xBB\xBF", 3);
    text_append(&marked, plain.s, plain.n);
    text_free(&plain);
    Tokenizer t;
    tokenizer_of(&t, marked);
    expect_test_vocabulary(&t);
    expect_tokenizer_error("compressed", "\x1F\x8B\x08", 3);
    expect_tokenizer_error("not a tokenizer file", "\xEF\xBB\xBF", 3);
}

static void test_tokenizer_may_differ(void) {
    static const struct { const char *text; int differs; } cases[] = {
        {"plain, isn't it?\n", 0}, {"na\xC3\xAFve \xE6\x97\xA5\xE6\x9C\xAC \xD0\x94\xD0\xB0", 0},
        {"a \xE2\x80\x94 b", 1}, {"\xC2\xA0", 1}, {"\xC3\x97", 1}, {"\xF0\x9F\x98\x80", 1},
        {"\xFF", 1}, {"a\xC3", 1}, {"", 0},
    };
    Tokenizer t;
    tokenizer_of(&t, make_json_file());
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const int differs = tokenizer_may_differ(&t, cases[i].text, strlen(cases[i].text));
        EXPECT(differs == cases[i].differs, "\"%s\": %d", cases[i].text, differs);
    }
    tokenizer_free(&t);
    Text bytes = {NULL, 0, 0};
    tokenizer_bytes_file(&bytes);
    tokenizer_of(&t, bytes);
    EXPECT(!tokenizer_may_differ(&t, "\xFF", 1), "bytes are bytes");
    tokenizer_free(&t);
}

static void tokenizer_load_from(void *path) {
    Tokenizer t;
    tokenizer_load(&t, (const char *)path);
    tokenizer_free(&t);
}

static void test_tokenizer_find_and_load(void) {
    const char *dir = test_directory();
    char *patterns = xprintf("%s/train_*.bin,/nowhere/*.bin", dir);
    EXPECT(!tokenizer_find(patterns), "found a tokenizer in an empty directory");
    // each overrides the one before
    static const char *const names[3] = {"encoder.json", "vocab.json", "tokenizer.bin"};
    for (int i = 0; i < 3; i++) {
        char *path = xprintf("%s/%s", dir, names[i]);
        EXPECT_EXIT(1, path, tokenizer_load_from, path);             // no such file
        file_write_whole(path, "{\"a\": 1}", 8);
        EXPECT_EXIT(1, path, tokenizer_load_from, path);             // damaged
        tokenizer_write_bytes(path);
        EXPECT_EXIT(0, "", tokenizer_load_from, path);
        char *found = tokenizer_find(patterns);
        EXPECT_TEXT(found ? found : "(none)", path);
        free(found);
        free(path);
    }
    free(patterns);
}

// ---- Encoding ----

// The pieces found by GPT-2's pattern, separated by bars.
static void expect_pieces(const char *text, const char *want) {
    Text got = {NULL, 0, 0};
    size_t n = strlen(text);
    for (size_t at = 0, m; at < n; at += m) {
        m = tokenizer_piece(text + at, n - at);
        if (at) text_append(&got, "|", 1);
        text_append(&got, text + at, m);
    }
    EXPECT_TEXT(got.s, want);
    text_free(&got);
}

static void test_tokenizer_pieces(void) {
    expect_pieces("Hello world", "Hello| world");
    expect_pieces("it's we'll don't I'd 'tis", "it|'s| we|'ll| don|'t| I|'d| '|tis");
    expect_pieces("'sell 's DON'T", "'s|ell| '|s| DON|'|T");
    expect_pieces("a1 22b, (c)!?", "a|1| 22|b|,| (|c|)!?");
    expect_pieces("a  b   c ", "a| | b|  | c| ");
    expect_pieces("a  ", "a|  ");
    expect_pieces("x\n\n  y\n", "x|\n\n | y|\n");
    expect_pieces("\ty\t\tz", "\t|y|\t|\t|z");
    expect_pieces(" ", " ");
    expect_pieces("<|endoftext|>", "<||endoftext||>");
    expect_pieces("na\xC3\xAFve \xE2\x80\x94 x", "na\xC3\xAFve| \xE2\x80\x94| x");
}

// Token lists end with -1.
static void expect_tokens(const Tokenizer *t, const char *text, const int *want) {
    int got[64], n = 0;
    int64_t count = tokenizer_encode(t, text, strlen(text), got);
    while (want[n] >= 0) n++;
    EXPECT(count == n, "\"%s\": %lld tokens, want %d", text, (long long)count, n);
    for (int i = 0; i < n && i < count; i++)
        EXPECT(got[i] == want[i], "\"%s\": token %d is %d, want %d", text, i, got[i], want[i]);
}

static void test_tokenizer_merges(void) {
    static const struct { const char *text; int want[16]; } cases[] = {
        {"", {-1}},
        {"the", {THE, -1}},
        {"the the", {THE, _THE, -1}},
        {" then", {_THE, 'n', -1}},
        {"this", {TH, 'i', 's', -1}},
        {"heth", {HE, TH, -1}},
        {"aaa", {AA, 'a', -1}},                          // of equal ranks, the leftmost
        {"aaaa", {AA, AA, -1}},
        {"abc", {'a', BC, -1}},                          // bc was learned before ab
        {"things", {TH, ING, 's', -1}},
        {"a's", {'a', _S, -1}},
        {"a  b", {'a', ' ', ' ', 'b', -1}},              // one space belongs to b: they do not
                                                         // merge
        {"a  ", {'a', TWO_SPACES, -1}},
        {"a\n\nb", {'a', '\n', '\n', 'b', -1}},
        {"123", {TWELVE, '3', -1}},
        {"\xC3\xA9", {E_ACUTE, -1}},
        {"\xFF\xC3", {0xFF, 0xC3, -1}},                  // not UTF-8: bytes nevertheless
        {TOKENIZER_EOT, {'<', '|', 'e', 'n', 'd', 'o', 'f', 't', 'e', 'x', 't', '|', '>', -1}},
    };
    Tokenizer t;
    tokenizer_of(&t, make_json_file());
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        expect_tokens(&t, cases[i].text, cases[i].want);
    tokenizer_free(&t);
    static const int a_b[3] = {'a', 'b', -1};
    tokenizer_of(&t, make_llmc_file(2, TEST_V, AB));
    // no text encodes to end-of-text, even if its name is a word
    expect_tokens(&t, "ab", a_b);
    tokenizer_free(&t);
}

// Encoded text decodes to the same bytes, in at most as many tokens as bytes; words of all lengths,
// any byte.
static void expect_round_trip(const Tokenizer *t, const char *alphabet, size_t letters) {
    enum { N = 20000 };
    char *text = (char *)xcalloc(N, 1);
    int *tokens = (int *)xcalloc(N, sizeof *tokens);
    for (int i = 0; i < N; i++)
        text[i] = alphabet[rng_words(1, STREAM_TEST, 0, 0, (uint32_t)i).v[0] % letters];
    int64_t count = tokenizer_encode(t, text, N, tokens);
    EXPECT(count > 0 && count <= N, "%lld tokens", (long long)count);
    Text back = {NULL, 0, 0};
    for (int64_t i = 0; i < count; i++) {
        int n;
        const char *bytes = tokenizer_bytes(t, tokens[i], &n);
        EXPECT(tokens[i] != t->eot, "token %lld is end-of-text", (long long)i);
        text_append(&back, bytes, (size_t)n);
    }
    EXPECT(back.n == N && !memcmp(back.s, text, N), "other bytes come back");
    text_free(&back);
    free(text);
    free(tokens);
}

static void test_tokenizer_round_trip(void) {
    char all[256];
    for (int b = 0; b < 256; b++) all[b] = (char)b;
    Tokenizer t;
    tokenizer_of(&t, make_llmc_file(2, TEST_V, EOT));
    expect_round_trip(&t, all, 256);
    expect_round_trip(&t, " the\ning12abc's", 15);
    expect_round_trip(&t, "a", 1);                       // one word of 20000 letters
    tokenizer_free(&t);
}

static void test_tokenizer_of_bytes(void) {
    Text file = {NULL, 0, 0};
    tokenizer_bytes_file(&file);
    Tokenizer t;
    tokenizer_of(&t, file);
    EXPECT(t.V == 257 && t.eot == 256, "V %d, end-of-text %d", t.V, t.eot);
    char text[512];
    int tokens[512];
    for (int i = 0; i < 512; i++) text[i] = (char)(i < 256 ? i : 511 - i);
    EXPECT(tokenizer_encode(&t, text, 512, tokens) == 512, "not one token a byte");
    for (int i = 0; i < 512; i++)
        EXPECT(tokens[i] == (unsigned char)text[i], "byte %d became token %d",
               (unsigned char)text[i], tokens[i]);
    EXPECT(tokenizer_encode(&t, TOKENIZER_EOT, 13, tokens) == 13 && tokens[0] == '<',
           "text spelled end-of-text");
    tokenizer_free(&t);
}

static void test_tokenizer_lacks_a_byte(void) {
    Tokenizer t;
    int tokens[8];
    const char *vocabulary = "{\"a\": 0, \"b\": 1, \"ab\": 2}",
        *error = tokenizer_parse(&t, vocabulary, strlen(vocabulary));
    EXPECT(!error, "%s", error);
    if (error) return;
    EXPECT(t.eot == -1, "end-of-text %d", t.eot);
    EXPECT(tokenizer_encode(&t, "abba", 4, tokens) == 3 && tokens[0] == 2 && tokens[1] == 1 &&
           tokens[2] == 0, "abba");
    EXPECT(tokenizer_encode(&t, "ab ba", 5, tokens) == -1, "a space was encoded");
    EXPECT(tokenizer_encode(&t, "abc", 3, tokens) == -1, "c was encoded");
    tokenizer_free(&t);
}

#define TOKENIZER_TESTS(X)                                                                     \
    X(tokenizer_formats) X(tokenizer_version_1) X(tokenizer_damage) X(tokenizer_json_damage)   \
    X(tokenizer_json_beside) X(tokenizer_version_3) X(tokenizer_byte_order_mark)               \
    X(tokenizer_may_differ)                                                                    \
    X(tokenizer_find_and_load) X(tokenizer_pieces) X(tokenizer_merges) X(tokenizer_round_trip) \
    X(tokenizer_of_bytes) X(tokenizer_lacks_a_byte)

#endif
