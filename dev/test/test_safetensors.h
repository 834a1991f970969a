// test_safetensors.h: safetensors.h on valid files, on files damaged in every way, and in a round
// trip.
#ifndef TEST_SAFETENSORS_H
#define TEST_SAFETENSORS_H

#include "../files/safetensors.h"
#include "../files/files.h"
#include "test.h"
#include <signal.h>

#define SAFETENSORS_TESTS(X)                                                                  \
    X(safetensors_reads) X(safetensors_tiling) X(safetensors_damaged) X(safetensors_extremes) \
    X(safetensors_cut_short) X(safetensors_flipped)                                           \
    X(safetensors_reals) X(safetensors_all_halves) X(safetensors_integers)                    \
    X(safetensors_round_trip)                                                                 \
    X(safetensors_writer_checks)

// A file: the header's size, the header, data. From malloc, exactly sized for the sanitizers; free
// it.
static unsigned char *test_safetensors_file(const char *header, const void *data, size_t data_size,
                                            size_t *size) {
    uint64_t n = strlen(header);
    unsigned char *file = (unsigned char *)xcalloc(8 + n + data_size, 1);
    memcpy(file, &n, 8);
    memcpy(file + 8, header, n);
    if (data) memcpy(file + 8 + n, data, data_size);
    *size = 8 + n + data_size;
    return file;
}

static const char test_safetensors_header[] =
    "{\"__metadata__\":{\"format\":\"pt\"},"
    "\"w\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[3,11]},"
    "\"ids\":{\"shape\":[3],\"data_offsets\":[0,3],\"dtype\":\"U8\"},"
    "\"step\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[11,19]},"
    "\"none\":{\"dtype\":\"F16\",\"shape\":[4,0],\"data_offsets\":[11,11]}}  ";

static void test_safetensors_reads(void) {
    unsigned char data[19] = {7, 0, 255};
    const float w[2] = {1.5f, -0.1f};
    const int64_t step = -123456789012345;
    memcpy(data + 3, w, 8);
    memcpy(data + 11, &step, 8);
    size_t size;
    unsigned char *file = test_safetensors_file(test_safetensors_header, data, sizeof data, &size);
    Safetensors t;
    EXPECT(!safetensors_parse(&t, file, size), "%s", t.error);
    EXPECT(t.n == 4, "%d tensors", t.n);
    for (int i = 1; i < t.n; i++)
        EXPECT(strcmp(t.entry[i - 1].name, t.entry[i].name) < 0, "not sorted by name");
    const SafetensorsEntry *e = safetensors_find(&t, "w");
    EXPECT(e && e->dtype == SAFETENSORS_F32 && e->ndim == 2 && e->shape[0] == 1 && e->shape[1] == 2,
           "wrong shape of w");
    real x[2] = {0, 0};
    EXPECT(e && !safetensors_to_real(e, x) && x[0] == (real)w[0] && x[1] == (real)w[1],
           "w is %g %g", (double)x[0], (double)x[1]);
    int64_t n[3] = {0, 0, 0};
    EXPECT_ERROR(e ? safetensors_to_int64(e, n) : NULL, "integer");
    e = safetensors_find(&t, "ids");
    EXPECT(e && !safetensors_to_int64(e, n) && n[0] == 7 && n[1] == 0 && n[2] == 255,
           "ids are wrong");
    EXPECT_ERROR(e ? safetensors_to_real(e, x) : NULL, "F64, F32");
    e = safetensors_find(&t, "step");
    EXPECT(e && e->ndim == 0 && e->count == 1 && !safetensors_to_int64(e, n) && n[0] == step,
           "step is wrong");
    e = safetensors_find(&t, "none");
    EXPECT(e && e->count == 0 && e->bytes == 0 && e->ndim == 2 && !safetensors_to_real(e, x),
           "an empty tensor is wrong");
    EXPECT(!safetensors_find(&t, "W") && !safetensors_find(&t, "") && !safetensors_find(&t, "zzz"),
           "found what is not there");
    EXPECT(!safetensors_find(&t, "__metadata__"), "the metadata are no tensor");
    safetensors_free(&t);
    free(file);
}

#define TENSOR(name, dtype, shape, offsets) \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":[" shape "],\"data_offsets\":[" offsets "]}"

// Valid headers at the limits of the rules, with the number of data bytes they need.
static void test_safetensors_tiling(void) {
    static const struct { const char *header; size_t data; int tensors; } good[] = {
        {"{}", 0, 0}, {"{ }\n", 0, 0}, {"{\"__metadata__\":{}}", 0, 0},
        {"{" TENSOR("a", "F32", "", "0,4") "}", 4, 1}, {"{" TENSOR("", "U8", "2", "0,2") "}", 2, 1},
        {"{" TENSOR("a", "F64", "0", "0,0") "}", 0, 1},
        {"{" TENSOR("b", "U8", "1", "1,2") "," TENSOR("a", "U8", "1", "0,1") "}", 2, 2},
        {"{" TENSOR("b", "U8", "1", "0,1") "," TENSOR("a", "U8", "0", "0,0")
         "," TENSOR("c", "I8", "0", "1,1") "}", 1, 3},
        {"{" TENSOR("a", "BOOL", "1,1,1,1,1,1,1,2", "0,2") "}", 2, 1},
        {"{" TENSOR("a", "F32", "0,9223372036854775807", "0,0") "}", 0, 1},
        {"{\"__metadata__\":null}", 0, 0},
        {"{" TENSOR("a", "F8_E4M3", "3", "0,3") "," TENSOR("b", "F4", "6", "3,6") "}", 6, 2},
        {"{\"__metadata__\":{\"a\":\"\\u0000\",\"b\":\"\"}," TENSOR("\\u00e9", "BF16", "1", "0,2")
         "}", 2, 1},
    };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        size_t size;
        unsigned char *file = test_safetensors_file(good[i].header, NULL, good[i].data, &size);
        Safetensors t;
        const char *error = safetensors_parse(&t, file, size);
        EXPECT(!error && t.n == good[i].tensors, "%s: %s, %d tensors", good[i].header,
               error ? error : "", t.n);
        for (int k = 0; k < t.n; k++)
            EXPECT(safetensors_find(&t, t.entry[k].name) == &t.entry[k], "not found: %s",
                   t.entry[k].name);
        safetensors_free(&t);
        free(file);
    }
}

// Headers, the number of data bytes after them, and a part of the expected error.
static const struct { const char *header; size_t data; const char *error; } test_safetensors_bad[] =
    {
    {"", 0, "does not begin with '{'"}, {"[]", 0, "does not begin with '{'"},
    {" {}", 0, "does not begin with '{'"}, {"{", 0, "header, byte 1"}, {"{}x", 0, "header, byte 2"},
    {"{\"\xFF\":1}", 0, "header, byte 2"}, {"{}", 1, "after the last tensor"},
    {"{\"a\":1}", 0, "tensor \"a\": it needs a dtype"}, {"{\"a\":[]}", 0, "it needs a dtype"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[]}}", 0, "it needs a dtype"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1],\"more\":0}}", 1,
     "nothing else"},
    {"{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[0,1]}}", 1,
     "nothing else"},
    {"{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[]}}", 1, "it needs a dtype"},
    {"{" TENSOR("a", "f32", "1", "0,4") "}", 4, "tensor \"a\": its dtype"},
    {"{" TENSOR("a", "F32 ", "1", "0,4") "}", 4, "its dtype"},
    {"{" TENSOR("a", "", "1", "0,4") "}", 4, "its dtype"},
    {"{" TENSOR("a", "F8_E4M3", "1", "1,2") "}", 2, "there is a gap"},
    {"{" TENSOR("a", "F8_E4M3", "1", "0,3") "}", 2, "beyond the file"},
    {"{" TENSOR("a", "8F", "1", "0,1") "}", 1, "its dtype"},
    {"{\"a\":{\"dtype\":0,\"shape\":[],\"data_offsets\":[0,1]}}", 1, "its dtype"},
    {"{" TENSOR("a", "F32", "-1", "0,4") "}", 4, "its shape"},
    {"{" TENSOR("a", "F32", "1.0", "0,4") "}", 4, "its shape"},
    {"{" TENSOR("a", "F32", "\\\"1\\\"", "0,4") "}", 4, "header, byte"},
    {"{" TENSOR("a", "F32", "\"1\"", "0,4") "}", 4, "its shape"},
    {"{" TENSOR("a", "F32", "[1]", "0,4") "}", 4, "its shape"},
    {"{" TENSOR("a", "U8", "9223372036854775808", "0,1") "}", 1, "its shape"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":1,\"data_offsets\":[0,1]}}", 1, "its shape"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":{},\"data_offsets\":[0,1]}}", 1, "its shape"},
    {"{" TENSOR("a", "U8", "1,1,1,1,1,1,1,1,1", "0,1") "}", 1, "more than 8 dimensions"},
    {"{" TENSOR("a", "U8", "4294967296,4294967296", "0,0") "}", 0, "overflows"},
    {"{" TENSOR("a", "F32", "4611686018427387904", "0,0") "}", 0, "overflows"},
    {"{" TENSOR("a", "F64", "2305843009213693952", "0,0") "}", 0, "overflows"},
    {"{" TENSOR("a", "U8", "4611686018427387904,4,0", "0,0") "}", 0, "overflows"},
    {"{" TENSOR("a", "U8", "9223372036854775807", "0,9223372036854775807") "}", 8,
     "beyond the file"},
    {"{" TENSOR("a", "F32", "1", "0,-4") "}", 4, "its data_offsets must"},
    {"{" TENSOR("a", "F32", "1", "-4,0") "}", 4, "its data_offsets must"},
    {"{" TENSOR("a", "F32", "1", "0,4,8") "}", 8, "its data_offsets must"},
    {"{" TENSOR("a", "F32", "1", "4") "}", 4, "its data_offsets must"},
    {"{" TENSOR("a", "F32", "1", "0,4.0") "}", 4, "its data_offsets must"},
    {"{" TENSOR("a", "F32", "1", "") "}", 4, "its data_offsets must"},
    {"{" TENSOR("a", "F32", "1", "0,18446744073709551620") "}", 4, "its data_offsets must"},
    {"{" TENSOR("a", "F32", "1", "4,0") "}", 4, "end before they begin"},
    {"{" TENSOR("a", "F32", "1", "0,4") "}", 3, "beyond the file"},
    {"{" TENSOR("a", "F32", "1", "0,3") "}", 3, "do not fit"},
    {"{" TENSOR("a", "F32", "2", "0,4") "}", 4, "do not fit"},
    {"{" TENSOR("a", "F16", "1", "0,4") "}", 4, "do not fit"},
    {"{" TENSOR("a", "F32", "", "0,0") "}", 0, "do not fit"},
    {"{" TENSOR("a", "F32", "1", "0,4") "}", 5, "after the last tensor"},
    {"{" TENSOR("a", "F32", "1", "1,5") "}", 5, "tensor \"a\": there is a gap"},
    {"{" TENSOR("a", "U8", "2", "0,2") "," TENSOR("b", "U8", "2", "1,3") "}", 3,
     "tensor \"b\": its data overlap"},
    {"{" TENSOR("a", "U8", "2", "0,2") "," TENSOR("b", "U8", "2", "0,2") "}", 2,
     "its data overlap"},
    {"{" TENSOR("a", "U8", "3", "0,3") "," TENSOR("b", "U8", "0", "1,1") "}", 3,
     "tensor \"b\": its data overlap"},
    {"{" TENSOR("b", "U8", "1", "2,3") "," TENSOR("a", "U8", "1", "0,1") "}", 3,
     "tensor \"b\": there is a gap"},
    {"{" TENSOR("a", "U8", "1", "0,1") "," TENSOR("a", "U8", "1", "1,2") "}", 2,
        "tensor \"a\": the name is used twice"},
    {"{" TENSOR("a", "U8", "1", "0,1") "," TENSOR("\\u0061", "U8", "1", "1,2") "}", 2,
        "tensor \"a\": the name is used twice"},
    {"{" TENSOR("a", "U8", "0", "0,0") "," TENSOR("b", "U8", "0", "0,0")
     "," TENSOR("a", "U8", "0", "0,0") "}", 0,
        "used twice"},
    {"{" TENSOR("a\\u0000", "U8", "1", "0,1") "}", 1, "contains a NUL"},
    {"{" TENSOR("\\u001b[2J", "U8", "1", "0,2") "}", 2, "\"\\u001b[2J\""},
    {"{\"__metadata__\":1}", 0, "must be an object"},
    {"{\"__metadata__\":{\"a\":1}}", 0, "only have strings"},
    {"{\"__metadata__\":{\"a\":\"\",\"a\":\"\"}}", 0, "same key twice"},
    {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, "is there twice"},
};

static void test_safetensors_damaged(void) {
    for (size_t i = 0; i < sizeof test_safetensors_bad / sizeof *test_safetensors_bad; i++) {
        const char *header = test_safetensors_bad[i].header, *want = test_safetensors_bad[i].error;
        size_t size;
        unsigned char *file = test_safetensors_file(header, NULL, test_safetensors_bad[i].data,
                                                    &size);
        Safetensors t;
        const char *error = safetensors_parse(&t, file, size);
        EXPECT(error && strstr(error, want), "%s\n      said \"%s\", not \"%s\"", header,
               error ? error : "", want);
        EXPECT(!t.n && !t.entry, "%s left something to free", header);
        free(file);
    }
}

// Headers that lie about their size, are nested too deeply, or have a name too long for a message.
static void test_safetensors_extremes(void) {
    static const uint64_t sizes[] = {3, 100000000, 100000001, (uint64_t)1 << 63, UINT64_MAX,
                                     UINT64_MAX - 7};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        unsigned char file[10] = {0, 0, 0, 0, 0, 0, 0, 0, '{', '}'};
        Safetensors t;
        memcpy(file, &sizes[i], 8);
        EXPECT_ERROR(safetensors_parse(&t, file, 10),
                     sizes[i] > 100000000 ? "above 100 MB" : "ends within the header");
    }

    Text bomb = {NULL, 0, 0};
    size_t size;
    for (int i = 0; i < 100000; i++) text_append(&bomb, "{\"a\":", 5);
    unsigned char *file = test_safetensors_file(bomb.s, NULL, 0, &size);
    Safetensors t;
    EXPECT_ERROR(safetensors_parse(&t, file, size), "nested too deeply");
    free(file);
    text_free(&bomb);

    char name[400];                                      // an error about a long name is truncated,
                                                         // without overflow
    memset(name, 'n', sizeof name - 1);
    name[sizeof name - 1] = 0;
    char *header = xprintf("{\"%s\":{}}", name);
    file = test_safetensors_file(header, NULL, 0, &size);
    EXPECT_ERROR(safetensors_parse(&t, file, size), "it needs a dtype");
    free(file);
    free(header);
}

static void test_safetensors_cut_short(void) {
    size_t size;
    unsigned char *file = test_safetensors_file(test_safetensors_header, NULL, 19, &size);
    for (size_t n = 0; n < size; n++) {
        unsigned char *part = (unsigned char *)xcalloc(n, 1);
        Safetensors t;
        memcpy(part, file, n);
        EXPECT(safetensors_parse(&t, part, n), "the first %zu bytes of %zu were accepted", n, size);
        free(part);
    }
    free(file);
}

// Every single bit of the file flipped: an error or a valid table, whose tensors are within the
// file.
static void test_safetensors_flipped(void) {
    size_t size, accepted = 0;
    unsigned char *file = test_safetensors_file(test_safetensors_header, NULL, 19, &size);
    for (size_t bit = 0; bit < 8 * size; bit++) {
        Safetensors t;
        size_t total = 0;
        file[bit / 8] ^= (unsigned char)(1 << bit % 8);
        if (!safetensors_parse(&t, file, size)) {
            for (int i = 0; i < t.n; i++) {
                const SafetensorsEntry *e = &t.entry[i];
                EXPECT(e->data >= file + 8 && e->data + e->bytes <= file + size,
                       "bit %zu: %s is outside", bit, e->name);
                total += e->bytes;
            }
            EXPECT(total == 19, "bit %zu: %zu bytes of data", bit, total);
            accepted++;
            safetensors_free(&t);
        }
        file[bit / 8] ^= (unsigned char)(1 << bit % 8);
    }
    EXPECT(accepted >= 8 * 19, "only %zu accepted: flips in the data are no errors", accepted);
    free(file);
}

// ---- Conversion ----

// Puts count elements of size bytes each into a file at an odd address and expects to read `want`
// from it.
static void test_safetensors_convert(const char *dtype, const void *data, size_t size, int count,
                                     const double *want) {
    size_t bytes = size * (size_t)count, file_size;
    char *header = xprintf("{\"x\":{\"dtype\":\"%s\",\"shape\":[%d],\"data_offsets\":[0,%zu]}}",
                           dtype, count, bytes);
    unsigned char *file = test_safetensors_file(header, data, bytes, &file_size);
    unsigned char *odd = (unsigned char *)xcalloc(file_size + 1, 1) + 1;
    real *got = (real *)xcalloc((size_t)count, sizeof *got);
    Safetensors t;
    memcpy(odd, file, file_size);
    EXPECT(!safetensors_parse(&t, odd, file_size), "%s", t.error);
    const char *error = t.n ? safetensors_to_real(&t.entry[0], got) : "no tensor";
    EXPECT(!error, "%s", error);
    for (int i = 0; i < count; i++) {
        EXPECT(isnan(want[i]) ? isnan(got[i]) : (double)got[i] == (double)(real)want[i],
               "%s %d: %g, not %g", dtype, i, (double)got[i], want[i]);
        EXPECT(isnan(want[i]) || !signbit(got[i]) == !signbit(want[i]), "%s %d lost its sign",
               dtype, i);
    }
    safetensors_free(&t);
    free(got);
    free(odd - 1);
    free(file);
    free(header);
}

static void test_safetensors_reals(void) {
    static const double f64[] = {0, -0.0, 1.5, -1e-40, 3.4028234663852886e38, INFINITY, 0.1, NAN};
    static const float f32[] = {0, -0.0f, 1.5f, 1e-45f, 3.4028234663852886e38f, -INFINITY, 0.25f,
                                NAN};
    static const uint16_t f16[] = {0x0000, 0x8000, 0x3C00, 0x0001, 0x83FF, 0x0400, 0x7BFF, 0xFC00,
                                   0x3555, 0x7E00, 0xFC01};
    static const uint16_t bf16[] = {0x0000, 0x8000, 0x3F80, 0x0001, 0x7F7F, 0xFF80, 0x3EAB, 0x7FC0,
                                    0xFF81};
    double f32_want[8];
    for (int i = 0; i < 8; i++) f32_want[i] = f32[i];
    const double f16_want[] = {0, -0.0, 1, ldexp(1, -24), ldexp(-1023, -24), ldexp(1, -14), 65504,
                               -INFINITY,
                               0.333251953125, NAN, NAN};
    const double bf16_want[] = {0, -0.0, 1, ldexp(1, -133), ldexp(255, 120), -INFINITY, 0.333984375,
                                NAN, NAN};
    test_safetensors_convert("F64", f64, 8, 8, f64);
    test_safetensors_convert("F32", f32, 4, 8, f32_want);
    test_safetensors_convert("F16", f16, 2, 11, f16_want);
    test_safetensors_convert("BF16", bf16, 2, 9, bf16_want);
}

// All 2^16 halves against the definition, (-1)^sign * 2^(exponent - 15) * 1.fraction (IEEE
// 754-2019, section 3.4).
static void test_safetensors_all_halves(void) {
    for (int h = 0; h < 1 << 16; h++) {
        int exponent = h >> 10 & 31, fraction = h & 1023;
        double want = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
        if (exponent == 31) want = fraction ? NAN : INFINITY;
        float got = safetensors_half((uint16_t)h);
        EXPECT(isnan(want) ? isnan(got) : fabs((double)got) == want, "%04x: %g, not %g", h,
               (double)got, want);
        EXPECT(!signbit(got) == !(h & 0x8000), "%04x lost its sign", h);
    }
}

static void test_safetensors_integers(void) {
    static const struct { const char *dtype; unsigned char bytes[8]; size_t size; int64_t want;
                          } cases[] = {
        {"I8", {0x80}, 1, -128}, {"U8", {0x80}, 1, 128}, {"BOOL", {1}, 1, 1},
        {"I16", {0, 0x80}, 2, -32768}, {"U16", {0, 0x80}, 2, 32768},
        {"I32", {0, 0, 0, 0x80}, 4, INT32_MIN}, {"U32", {0, 0, 0, 0x80}, 4, 2147483648},
        {"I64", {0, 0, 0, 0, 0, 0, 0, 0x80}, 8, INT64_MIN},
        {"U64", {255, 255, 255, 255, 255, 255, 255, 0x7F}, 8, INT64_MAX},
        {"U64", {0, 0, 0, 0, 0, 0, 0, 0x80}, 8, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *header = xprintf("{\"x\":{\"dtype\":\"%s\",\"shape\":[1],\"data_offsets\":[0,%zu]}}",
                               cases[i].dtype, cases[i].size);
        size_t size;
        unsigned char *file = test_safetensors_file(header, cases[i].bytes, cases[i].size, &size);
        Safetensors t;
        int64_t got = 0;
        EXPECT(!safetensors_parse(&t, file, size), "%s", t.error);
        const char *error = t.n ? safetensors_to_int64(&t.entry[0], &got) : "no tensor";
        if (!cases[i].want) EXPECT_ERROR(error, "above 2^63 - 1");
        else EXPECT(!error && got == cases[i].want, "%s: %lld", cases[i].dtype, (long long)got);
        safetensors_free(&t);
        free(file);
        free(header);
    }
}

// ---- Writing ----

static void test_safetensors_round_trip(void) {
    char *path = xprintf("%s/t.safetensors", test_directory()), want[SHA256_HEX];
    const int64_t big[2] = {5, 3}, none[1] = {0}, three[1] = {3};
    const float w[15] = {0, 1, -2, 3.5f, 1e-45f, INFINITY};
    const int64_t step = 42;
    const uint8_t bytes[3] = {1, 2, 3};
    SafetensorsWriter out;
    FILE *f = file_open(path, "wb");
    FileSum sum;
    safetensors_writer_init(&out);
    file_sum_init(&sum);
    out.sum = &sum;
    safetensors_declare(&out, "empty", "F16", 1, none);
    safetensors_declare(&out, "w \"1\"\n\xC3\xA9", "F32", 2, big);
    safetensors_declare(&out, "step", "I64", 0, NULL);
    safetensors_declare(&out, "last", "U8", 1, three);
    safetensors_declare(&out, "empty too", "BOOL", 1, none);
    safetensors_begin(&out, f, path);
    for (int i = 0; i < 15; i += 5) safetensors_append(&out, w + i, 5 * sizeof *w);
    safetensors_append(&out, &step, sizeof step);
    safetensors_append(&out, NULL, 0);
    safetensors_append(&out, bytes, 1);
    safetensors_append(&out, bytes + 1, 2);
    safetensors_end(&out);
    file_sync_close(f, path);
    file_sum_end(&sum);

    FileMap map;
    Safetensors t;
    EXPECT(!file_map(&map, path), "cannot map %s", path);
    sha256_hex(want, map.data, map.size);
    EXPECT_TEXT(sum.hex, want);
    EXPECT(map.data[0] % 8 == 0, "a header of %d bytes leaves the data unaligned", map.data[0]);
    EXPECT(!safetensors_parse(&t, map.data, map.size), "%s", t.error);
    EXPECT(t.n == 5 && safetensors_find(&t, "empty") && safetensors_find(&t, "empty too"),
           "%d tensors", t.n);
    const SafetensorsEntry *e = safetensors_find(&t, "w \"1\"\n\xC3\xA9");
    EXPECT(e && e->ndim == 2 && e->shape[0] == 5 && e->shape[1] == 3 &&
           !memcmp(e->data, w, sizeof w), "w differs");
    e = safetensors_find(&t, "step");
    EXPECT(e && e->ndim == 0 && !memcmp(e->data, &step, sizeof step), "step differs");
    e = safetensors_find(&t, "last");
    EXPECT(e && e->bytes == 3 && !memcmp(e->data, bytes, 3), "last differs");
    safetensors_free(&t);
    file_unmap(&map);
    free(path);
}

static void test_safetensors_on_abort(int signal_number) {
    _exit(signal_number == SIGABRT ? 6 : 7);
}

// Misuses the writer in one way; runs in a child, where abort() appears as exit code 6.
static void test_safetensors_misuse(void *arg) {
    const int64_t shape[2] = {2, 3}, negative[1] = {-1}, huge[2] = {INT64_MAX, 2};
    const float data[12] = {0};
    int way = *(const int *)arg;
    SafetensorsWriter w;
    FILE *f = file_open("/dev/null", "wb");
    signal(SIGABRT, test_safetensors_on_abort);
    safetensors_writer_init(&w);
    safetensors_declare(&w, "a", "F32", 2, shape);
    if (way == 0) safetensors_declare(&w, "a", "F32", 2, shape);
    if (way == 1) safetensors_declare(&w, "b", "F33", 2, shape);
    if (way == 2) safetensors_declare(&w, "b", "F32", 1, negative);
    if (way == 3) safetensors_declare(&w, "b", "U8", 2, huge);
    if (way == 4) safetensors_declare(&w, "b", "U8", 9, shape);
    if (way == 5) safetensors_append(&w, data, 4);
    safetensors_declare(&w, "b", "F32", 2, shape);
    safetensors_begin(&w, f, "/dev/null");
    if (way == 6) safetensors_append(&w, data, 28);      // runs into the next tensor
    if (way == 7) safetensors_declare(&w, "c", "F32", 2, shape);
    safetensors_append(&w, data, 24);
    if (way == 8) safetensors_end(&w);
    safetensors_append(&w, data, 24);
    if (way == 9) safetensors_append(&w, data, 1);
    safetensors_end(&w);
    fclose(f);
}

static void test_safetensors_writer_checks(void) {
    static const char *const said[] = {
        "a is declared twice", "unknown dtype F33", "negative or too large",
        "negative or too large", "9 dimensions",
        "the header comes first", "28 bytes for a, which is missing 24", "after the header",
        "tensor 2 of 2 is not complete",
        "1 bytes more than were declared",
    };
    int ways = (int)(sizeof said / sizeof *said);
    for (int way = 0; way < ways; way++) EXPECT_EXIT(6, said[way], test_safetensors_misuse, &way);
    EXPECT_EXIT(0, "", test_safetensors_misuse, &ways);  // and without misuse it succeeds
}

#undef TENSOR
#endif
