// test_json.h: json.h against RFC 8259's grammar, and sha256.h against published examples.
#ifndef TEST_JSON_H
#define TEST_JSON_H

#include "../files/json.h"
#include "../files/sha256.h"
#include "test.h"

#define JSON_TESTS(X)                                                                             \
    X(json_accepts) X(json_rejects) X(json_cut_short) X(json_depth) X(json_reads) X(json_numbers) \
    X(json_strings)                                                                               \
    X(json_duplicates) X(json_vocabulary) X(json_writes) X(sha256_examples) X(sha256_pieces)      \
    X(sha256_hmac)

// Parses exactly sized memory, so that a sanitizer detects a read past its end.
static const char *test_json_parse(Json *doc, const char *text, size_t size) {
    static char *exact;
    free(exact);
    exact = (char *)malloc(size ? size : 1);
    if (!exact) die("out of memory");
    memcpy(exact, text, size);
    return json_parse(doc, exact, size);
}

static void test_json_accepts(void) {
    static const char *const texts[] = {
        "0", "-0", "-12.5e+3", "1E9", "0.0", "1e-1", "null", "true", "false", "\"\"", "[]", "{}",
        " [ ] ", "\t\r\n{ }\n",
        "[1,2,[3]]", "[[],{}]", "{\"a\":1,\"a\":2}", "{\"\":null}",
        "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\u0000\"",
        "\"\\uD83d\\uDe00\"", "\"\x7F\"", "\"\xC2\x80\"", "\"\xE0\xA0\x80\"", "\"\xED\x9F\xBF\"",
        "\"\xEE\x80\x80\"",
        "\"\xF0\x90\x80\x80\"", "\"\xF4\x8F\xBF\xBF\"", "1e999", "\"\\u2028\"",
        "{ \"a\" : [ 1 , 2 ] , \"b\" : { } }",
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        Json doc;
        const char *error = test_json_parse(&doc, texts[i], strlen(texts[i]));
        EXPECT(!error, "%s: %s", texts[i], error ? error : "");
        if (!error) json_free(&doc);
    }
}

static void test_json_rejects(void) {
    static const struct { const char *text, *error; } bad[] = {
        {"", "byte 0: the text ends"}, {"  ", "byte 2: the text ends"},
        {"1 2", "byte 2: more text"}, {"[1,]", "byte 3: expected a value"},
        {"[,1]", "byte 1: expected a value"}, {"[1 2]", "byte 3: expected ',' or ']'"},
        {"[1}", "byte 2: expected ','"}, {"{\"a\" 1}", "byte 5: expected ':'"},
        {"{\"a\":1,}", "byte 7: expected a key"},
        {"\xEF\xBB\xBF", "byte 3: the text ends"},
        {"{,}", "byte 1: expected a key"}, {"{a:1}", "byte 1: expected a key"},
        {"{1:1}", "byte 1: expected a key"}, {"{\"a\":}", "byte 5: expected a value"},
        {"{\"a\":1]", "expected ',' or '}'"}, {"]", "byte 0: expected a value"},
        {"nul", "unknown word"}, {"True", "expected a value"}, {"nulls", "byte 4: more text"},
        {"NaN", "expected a value"}, {"-Infinity", "needs a digit"}, {"+1", "expected a value"},
        {"01", "byte 1: more text"}, {"-", "needs a digit"}, {".5", "expected a value"},
        {"1.", "after the point"}, {"1.e5", "after the point"}, {"1e", "exponent"},
        {"1e+", "exponent"}, {"0x10", "more text"}, {"'a'", "expected a value"},
        {"\"a", "within a string"}, {"\"\\", "bad character"}, {"\"\\x\"", "byte 1: bad character"},
        {"\"\\u12\"", "bad character"}, {"\"\\u12g4\"", "bad character"},
        {"\"ab\n\"", "byte 3: bad character"}, {"\"\\uD800\"", "bad character"},
        {"\"\\uDC00\"", "bad character"}, {"\"\\uD800\\u0041\"", "bad character"},
        {"\"\\uD800\\uD800\"", "bad character"}, {"\"\\uD800\\uE000\"", "bad character"},
        {"\"\\uDC00\\uDC00\"", "bad character"}, {"\"\xFF\"", "bad character"},
        {"\"\x80\"", "bad character"}, {"\"\xC0\x80\"", "bad character"},
        {"\"\xC1\xBF\"", "bad character"}, {"\"\xE0\x9F\xBF\"", "bad character"},
        {"\"\xED\xA0\x80\"", "bad character"}, {"\"\xF0\x8F\xBF\xBF\"", "bad character"},
        {"\"\xE2\x82\"", "bad character"}, {"\"\xF4\x90\x80\x80\"", "bad character"},
        {"\"\xF5\x80\x80\x80\"", "bad character"}, {"\"\xE2\x82", "bad character"},
        {"\xEF\xBB\xBF[],", "byte 5: more text"}, {"[\xEF\xBB\xBF]", "byte 1: expected a value"},
        {"// x\n1", "expected a value"}, {"[1] // x", "byte 4: more text"},
        {"\v1", "expected a value"}, {"{\"a\":1 \"b\":2}", "expected ',' or '}'"},
        {"{\"a\"}", "expected ':'"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        Json doc;
        EXPECT_ERROR(test_json_parse(&doc, bad[i].text, strlen(bad[i].text)), bad[i].error);
    }
    Json doc;
    // a byte-order mark is ignored
    const char *marked = test_json_parse(&doc, "\xEF\xBB\xBF[]", 5);
    EXPECT(!marked && json_type(&doc, 0) == JSON_ARRAY, "%s", marked ? marked : "no array");
    if (!marked) json_free(&doc);
    EXPECT_ERROR(test_json_parse(&doc, "[1]\0", 4), "byte 3: more text");
    EXPECT_ERROR(test_json_parse(&doc, "\0", 1), "expected a value");
    EXPECT_ERROR(test_json_parse(&doc, "1\0", 2), "byte 1: more text");
    EXPECT_ERROR(test_json_parse(&doc, "\"\0\"", 3), "byte 1: bad character");
    EXPECT_ERROR(test_json_parse(&doc, "\"\\\0\"", 4), "byte 1: bad character");
    EXPECT_ERROR(json_parse(&doc, "1", SIZE_MAX), "longer than");
    EXPECT_ERROR(json_parse(&doc, NULL, 0), "the text ends");
}

static void test_json_cut_short(void) {
    static const char text[] =
        "{\"a\": [1, -2.5e3, \"\\uD83D\\uDE00\\n\xE2\x82\xAC\"], \"b\": {\"c\": null, \"d\": "
        "true}}";
    Json doc;
    for (size_t n = 0; n < sizeof text - 1; n++)
        EXPECT(test_json_parse(&doc, text, n), "%zu bytes were accepted", n);
    EXPECT(!test_json_parse(&doc, text, sizeof text - 1), "%s", doc.error);
    json_free(&doc);
}

static void test_json_depth(void) {
    Text deep = {NULL, 0, 0};
    Json doc;
    for (int depth = JSON_MAX_DEPTH; depth <= JSON_MAX_DEPTH + 1; depth++) {
        deep.n = 0;
        for (int i = 0; i < depth; i++) text_append(&deep, "[", 1);
        for (int i = 0; i < depth; i++) text_append(&deep, "]", 1);
        const char *error = test_json_parse(&doc, deep.s, deep.n);
        if (depth > JSON_MAX_DEPTH) EXPECT_ERROR(error, "byte 64: nested too deeply");
        else {
            EXPECT(!error, "%s", error);
            json_free(&doc);
        }
    }
    deep.n = 0;
    for (int i = 0; i < 300000; i++) text_append(&deep, "{\"\":[", 5);
    EXPECT_ERROR(test_json_parse(&doc, deep.s, deep.n), "nested too deeply");
    text_free(&deep);
}

static void test_json_reads(void) {
    static const char text[] =
        "{\"x\": {\"y\": [10, [20, 21], {\"z\": 30}, 40]}, \"caf\\u00e9\": true, \"s\": \"t\", "
        "\"\": {}}";
    Json doc;
    EXPECT(!test_json_parse(&doc, text, sizeof text - 1), "%s", doc.error);
    int y = json_get(&doc, json_get(&doc, 0, "x"), "y"), n = 0;
    int64_t sum = 0, v = 0;
    EXPECT(json_type(&doc, 0) == JSON_OBJECT && json_count(&doc, 0) == 4, "%d members",
           json_count(&doc, 0));
    EXPECT(json_type(&doc, y) == JSON_ARRAY && json_count(&doc, y) == 4, "%d elements",
           json_count(&doc, y));
    for (int e = json_first(&doc, y); e >= 0; e = json_next(&doc, e), n++)
        if (json_int64(&doc, e, &v)) sum += v;
    EXPECT(n == 4 && sum == 50, "%d elements, their sum is %d", n, (int)sum);

    char seen[64] = "";
    for (int k = json_first(&doc, 0); k >= 0; k = json_next(&doc, k)) {
        char *key = json_string(&doc, k, NULL);
        snprintf(seen + strlen(seen), sizeof seen - strlen(seen), "%s=%d ", key,
                 json_type(&doc, k + 1));
        free(key);
    }
    char want[64];
    snprintf(want, sizeof want, "x=%d caf\xC3\xA9=%d s=%d =%d ", JSON_OBJECT, JSON_TRUE,
             JSON_STRING, JSON_OBJECT);
    EXPECT_TEXT(seen, want);
    EXPECT(json_type(&doc, json_get(&doc, 0, "caf\xC3\xA9")) == JSON_TRUE,
           "an escaped key was not found");
    EXPECT(json_get(&doc, 0, "caf") == JSON_NONE && json_get(&doc, 0, "cafe") == JSON_NONE,
           "found by a part of the key");
    EXPECT(json_type(&doc, json_get(&doc, 0, "")) == JSON_OBJECT, "the empty key was not found");
    EXPECT(json_equals(&doc, json_get(&doc, 0, "s"), "t") && !json_equals(&doc, y, "t"),
           "wrong equality");

    // Missing members, or those of other types, are harmless along a chain.
    int none = json_get(&doc, json_get(&doc, 0, "absent"), "y");
    double d = 7;
    EXPECT(none == JSON_NONE && json_get(&doc, y, "z") == JSON_NONE, "found what is not there");
    EXPECT(json_type(&doc, none) == JSON_NONE && json_count(&doc, none) == 0 &&
           json_first(&doc, none) == JSON_NONE,
           "none");
    EXPECT(!json_number(&doc, none, &d) && !json_int64(&doc, y, &v) && d == 7 && v == 40,
           "a value from nothing");
    EXPECT(!json_string(&doc, none, NULL) && !json_string(&doc, y, NULL) &&
           !json_equals(&doc, none, ""),
           "a string from nothing");
    json_free(&doc);
}

static void test_json_numbers(void) {
    static const struct { const char *text; int is_int; int64_t i; int is_number; double d;
                          } cases[] = {
        {"0", 1, 0, 1, 0}, {"-0", 1, 0, 1, -0.0}, {"9223372036854775807", 1, INT64_MAX, 1,
                                                   9223372036854775807.0},
        {"-9223372036854775808", 1, INT64_MIN, 1, -9223372036854775808.0},
        {"9223372036854775808", 0, 0, 1, 9223372036854775808.0},
        {"-9223372036854775809", 0, 0, 1, -9223372036854775808.0},
        {"18446744073709551616", 0, 0, 1, 18446744073709551616.0}, {"1.0", 0, 0, 1, 1},
        {"1e3", 0, 0, 1, 1000}, {"9007199254740993", 1, 9007199254740993, 1, 9007199254740992.0},
        {"0.1", 0, 0, 1, 0.1}, {"-1e-5", 0, 0, 1, -1e-5}, {"1e999", 0, 0, 0, 0},
        {"-1e999", 0, 0, 0, 0}, {"1e-999", 0, 0, 1, 0}, {"true", 0, 0, 0, 0}, {"\"1\"", 0, 0, 0, 0},
    };
    for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
        Json doc;
        int64_t i = 0;
        double d = 0;
        EXPECT(!test_json_parse(&doc, cases[k].text, strlen(cases[k].text)), "%s", doc.error);
        EXPECT(json_int64(&doc, 0, &i) == cases[k].is_int && i == cases[k].i,
               "%s as an integer: %lld", cases[k].text, (long long)i);
        EXPECT(json_number(&doc, 0, &d) == cases[k].is_number && d == cases[k].d,
               "%s as a double: %g", cases[k].text, d);
        EXPECT(!signbit(d) == !signbit(cases[k].d), "%s lost its sign", cases[k].text);
        json_free(&doc);
    }
}

static void test_json_strings(void) {
    static const struct { const char *text, *want; size_t size; } cases[] = {
        {"\"\"", "", 0}, {"\"a\\\"\\\\\\/\\b\\f\\n\\r\\tz\"", "a\"\\/\b\f\n\r\tz", 10},
        {"\"\\u0041\\u00e9\\u20AC\"", "A\xC3\xA9\xE2\x82\xAC", 6},
        {"\"\\uD83D\\uDE00\"", "\xF0\x9F\x98\x80", 4},
        {"\"\\uDBFF\\uDFFF\\uD800\\uDC00\"", "\xF4\x8F\xBF\xBF\xF0\x90\x80\x80", 8},
        {"\"\\u07FF\\u0800\"", "\xDF\xBF\xE0\xA0\x80", 5},
        {"\"\xC3\xA9\\\\\xE2\x82\xAC\"", "\xC3\xA9\\\xE2\x82\xAC", 6}, {"\"a\\u0000b\"", "a\0b", 3},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Json doc;
        size_t size = 99;
        EXPECT(!test_json_parse(&doc, cases[i].text, strlen(cases[i].text)), "%s", doc.error);
        char *s = json_string(&doc, 0, &size), *whole = json_string(&doc, 0, NULL);
        EXPECT(s && size == cases[i].size && !memcmp(s, cases[i].want, size + 1),
               "%s became \"%s\"", cases[i].text, s);
        int hides_nul = strlen(cases[i].want) != cases[i].size;
        EXPECT((whole == NULL) == hides_nul, "%s as a C string", cases[i].text);
        EXPECT(json_equals(&doc, 0, cases[i].want) == !hides_nul && !json_equals(&doc, 0, "a"),
               "%s: wrong equality", cases[i].text);
        free(s);
        free(whole);
        json_free(&doc);
    }
}

static void test_json_duplicates(void) {
    static const struct { const char *text; int has; } cases[] = {
        {"{}", 0}, {"[1,1]", 0}, {"{\"a\":1,\"b\":1,\"ab\":1,\"\":1,\"A\":1}", 0},
        {"{\"a\":1,\"a\\u0000\":1}", 0}, {"{\"a\":{\"a\":1},\"b\":{\"a\":1}}", 0},
        {"{\"a\":1,\"b\":2,\"a\":3}", 1}, {"{\"a\":1,\"\\u0061\":2}", 1}, {"{\"\":1,\"\":2}", 1},
        {"{\"\\u0000\":1,\"\\u0000\":1}", 1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Json doc;
        EXPECT(!test_json_parse(&doc, cases[i].text, strlen(cases[i].text)), "%s", doc.error);
        int key = json_duplicate(&doc, 0);
        EXPECT(json_type(&doc, key) == (cases[i].has ? JSON_STRING : JSON_NONE), "%s: %d",
               cases[i].text, key);
        json_free(&doc);
    }
}

// As many keys as GPT-2's vocab.json: written, parsed, iterated in order.
static void test_json_vocabulary(void) {
    Text text = {NULL, 0, 0};
    Json doc;
    int64_t want = 0, got = -1;
    char name[32];
    for (int i = 0; i < 50257; i++) {
        snprintf(name, sizeof name, "\xC4\xA0token\t%d", i);
        text_append(&text, i ? ", " : "{", i ? 2 : 1);
        json_write_string(&text, name);
        text_printf(&text, ": %d", i);
    }
    text_append(&text, "}", 1);
    EXPECT(!test_json_parse(&doc, text.s, text.n), "%s", doc.error);
    for (int k = json_first(&doc, 0); k >= 0; k = json_next(&doc, k), want++) {
        snprintf(name, sizeof name, "\xC4\xA0token\t%d", (int)want);
        EXPECT(json_equals(&doc, k, name) && json_int64(&doc, k + 1, &got) && got == want, "key %d",
               (int)want);
    }
    EXPECT(want == 50257 && json_count(&doc, 0) == 50257, "%d keys", (int)want);
    EXPECT(json_duplicate(&doc, 0) == JSON_NONE, "a duplicate was seen");
    json_free(&doc);
    text_free(&text);
}

static void test_json_writes(void) {
    static const struct { const char *s, *want; } strings[] = {
        {"", "\"\""}, {"a\"b\\c/d", "\"a\\\"b\\\\c/d\""},
        {"\n\t\x01\x1F", "\"\\u000a\\u0009\\u0001\\u001f\""},
        {"\xC3\xA9\xF0\x9F\x98\x80", "\"\xC3\xA9\xF0\x9F\x98\x80\""},
        {"a\xFFz\xE2\x82", "\"a\xEF\xBF\xBDz\xEF\xBF\xBD\xEF\xBF\xBD\""},
    };
    static const struct { double v; const char *want; } numbers[] = {
        {0, "0"}, {-0.0, "-0"}, {1, "1"}, {0.1, "0.1"}, {100000, "100000"}, {1e22, "1e+22"},
        {6e-4, "0.0006"}, {NAN, "null"}, {1.0 / 3, "0.3333333333333333"},
        {0.1 + 0.2, "0.30000000000000004"}, {INFINITY, "null"},
        {-INFINITY, "null"},
    };
    static const double round_trip[] = {5e-324, 2.2250738585072014e-308, 1.7976931348623157e308,
                                        -3.141592653589793};
    for (size_t i = 0; i < sizeof strings / sizeof *strings; i++) {
        Text t = {NULL, 0, 0};
        json_write_string(&t, strings[i].s);
        EXPECT_TEXT(t.s, strings[i].want);
        text_free(&t);
    }
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        Text t = {NULL, 0, 0};
        json_write_number(&t, numbers[i].v);
        EXPECT_TEXT(t.s, numbers[i].want);
        text_free(&t);
    }
    for (size_t i = 0; i < sizeof round_trip / sizeof *round_trip; i++) {
        Text t = {NULL, 0, 0};
        Json doc;
        double v = 0;
        json_write_number(&t, round_trip[i]);
        EXPECT(!json_parse(&doc, t.s, t.n) && json_number(&doc, 0, &v) && v == round_trip[i], "%s",
               t.s);
        json_free(&doc);
        text_free(&t);
    }
}

// ---- SHA-256: the examples published by NIST with FIPS 180-4 ----

static void test_sha256_examples(void) {
    static const struct { const char *message, *want; } cases[] = {
        {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
        {"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmn"
         "hijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu",
         "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1"},
    };
    char hex[SHA256_HEX];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        sha256_hex(hex, cases[i].message, strlen(cases[i].message));
        EXPECT_TEXT(hex, cases[i].want);
    }
    char *million = (char *)xcalloc(1000000, 1);
    memset(million, 'a', 1000000);
    sha256_hex(hex, million, 1000000);
    EXPECT_TEXT(hex, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    free(million);
}

// Every length around the boundaries of blocks and padding, divided into pieces of every size.
static void test_sha256_pieces(void) {
    unsigned char message[200];
    char whole[SHA256_HEX], pieces[SHA256_HEX];
    for (int i = 0; i < 200; i++) message[i] = (unsigned char)(i * 7 + 1);
    for (size_t n = 0; n <= sizeof message; n++) {
        sha256_hex(whole, message, n);
        for (size_t step = 1; step <= 130; step += step < 70 ? 1 : 13) {
            Sha256 s;
            sha256_init(&s);
            sha256_update(&s, NULL, 0);
            for (size_t at = 0; at < n; at += step)
                sha256_update(&s, message + at, n - at < step ? n - at : step);
            sha256_final(&s, pieces);
            EXPECT(!strcmp(whole, pieces), "%zu bytes in pieces of %zu: %s, not %s", n, step,
                   pieces, whole);
        }
    }
    // Lengths 55, 56, 63, 64 cover the padding's cases; these two digests come from another
    // implementation.
    memset(message, 'a', sizeof message);
    sha256_hex(whole, message, 55);
    EXPECT_TEXT(whole, "9f4390f8d30c2dd92ec9f095b65e2b9ae9b0a925a5258e241c9f1e910f734318");
    sha256_hex(whole, message, 64);
    EXPECT_TEXT(whole, "ffe054fe7ae0cb6dc65c3af9b61d5209f439851db43d0ba5997337df154668eb");
}

// RFC 4231: test cases 1 to 4, 6 and 7. (Number 5 has a truncated digest.)
static void test_sha256_hmac(void) {
    static const char *const large = "Test Using Larger Than Block-Size Key - Hash Key First";
    static const char *const larger =
        "This is a test using a larger than block-size key and a larger than block-size data. The "
        "key needs to be hashed before being used by the HMAC algorithm.";
    static const struct {
        int byte, key_n, text_byte, text_n;
        const char *key, *text, *mac;
    } cases[] = {
        {0x0b, 20, 0, 0, NULL, "Hi There",
         "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"},
        {0, 4, 0, 0, "Jefe", "what do ya want for nothing?",
         "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"},
        {0xaa, 20, 0xdd, 50, NULL, NULL,
         "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe"},
        {-1, 25, 0xcd, 50, NULL, NULL,
         "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b"},
        {0xaa, 131, 0, 0, NULL, large,
         "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"},
        {0xaa, 131, 0, 0, NULL, larger,
         "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        unsigned char key[131], text[200], mac[SHA256_BYTES];
        char hex[SHA256_HEX];
        const size_t n = cases[i].text ? strlen(cases[i].text) : (size_t)cases[i].text_n;
        for (int k = 0; k < cases[i].key_n; k++)         // -1: 01 02 03 ... 19
            key[k] = (unsigned char)(cases[i].key ? cases[i].key[k]
                                     : cases[i].byte < 0 ? k + 1 : cases[i].byte);
        if (cases[i].text) memcpy(text, cases[i].text, n);
        else memset(text, cases[i].text_byte, n);
        hmac_sha256(mac, key, (size_t)cases[i].key_n, text, n);
        for (int k = 0; k < SHA256_BYTES; k++) snprintf(hex + 2 * k, 3, "%02x", mac[k]);
        EXPECT_TEXT(hex, cases[i].mac);
    }
}

#endif
