// safetensors.h: reads and writes the safetensors format, as strictly as its reference
// implementation.
//
//     uint64 little-endian size of the header | header, JSON | data
//     {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...,
//      "__metadata__": {"format": "pt"}}
//
// The tensors tile the data: no gaps, no overlaps, nothing after the last. Offsets count from the
// start of the data.
#ifndef SAFETENSORS_H
#define SAFETENSORS_H

#include "files.h"
#include "json.h"
#include "sha256.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "tensors are read and written as stored in memory: this needs a little-endian machine"
#endif

#define SAFETENSORS_REALS(X)    X(F64, double) X(F32, float) X(F16, uint16_t) X(BF16, uint16_t)
#define SAFETENSORS_INTEGERS(X) X(I64, int64_t)  X(I32, int32_t)  X(I16, int16_t)  X(I8, int8_t)  \
                                X(U64, uint64_t) X(U32, uint32_t) X(U16, uint16_t) X(U8, uint8_t) \
                                X(BOOL, uint8_t)

#define X(id, type) SAFETENSORS_##id,
enum { SAFETENSORS_REALS(X) SAFETENSORS_INTEGERS(X) N_SAFETENSORS_DTYPES };
#undef X
// e.g. F8_E4M3: a file may contain tensors that we never read
enum { SAFETENSORS_OTHER = N_SAFETENSORS_DTYPES };

typedef struct { const char *name; size_t size; } SafetensorsDtype;

static const SafetensorsDtype safetensors_dtype[N_SAFETENSORS_DTYPES] = {
#define X(id, type) {#id, sizeof(type)},
    SAFETENSORS_REALS(X) SAFETENSORS_INTEGERS(X)
#undef X
};

enum { SAFETENSORS_MAX_DIMS = 8 };
#define SAFETENSORS_MAX_HEADER 100000000u                // bytes; the reference implementation's
                                                         // limit

typedef struct {
    char *name;
    int dtype, ndim;
    int64_t shape[SAFETENSORS_MAX_DIMS];  // (ndim); ndim 0 is a scalar
    size_t count, bytes;                  // elements, and their size in bytes
    const unsigned char *data;            // (bytes) within the file, possibly unaligned
} SafetensorsEntry;

typedef struct {
    int n;
    SafetensorsEntry *entry;                             // (n) in ascending order of name
    char error[256];
} Safetensors;

// ---- Reading ----

// Number of elements of a shape (ndim); -1 if it, or its bytes at `size` each, exceeds 2^63 - 1.
static inline int64_t safetensors_count(int ndim, const int64_t *shape, size_t size) {
    int64_t n = 1;
    for (int d = 0; d < ndim; d++) {
        if (shape[d] < 0 || (shape[d] && n > INT64_MAX / (int64_t)size / shape[d])) return -1;
        n *= shape[d];
    }
    return n;
}

// Reads an array of n non-negative integers; returns 0 if it is anything else.
static inline int safetensors_sizes(const Json *doc, int array, int n, int64_t *out) {
    if (json_type(doc, array) != JSON_ARRAY || json_count(doc, array) != n) return 0;
    for (int v = json_first(doc, array); v >= 0; v = json_next(doc, v), out++)
        if (!json_int64(doc, v, out) || *out < 0) return 0;
    return 1;
}

// Whether a string is spelled like the format's types: capitals, digits and '_', starting with a
// capital.
static inline int safetensors_is_dtype(const Json *doc, int node) {
    char *name = json_string(doc, node, NULL);
    const int is = name && *name >= 'A' && *name <= 'Z' &&
        !name[strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_")];
    free(name);
    return is;
}

// Fills e (zero except for its name) from the tensor's JSON object. Returns NULL, or what is wrong.
static inline const char *safetensors_read_entry(SafetensorsEntry *e, const Json *doc, int object,
                                                 const unsigned char *data, size_t data_size) {
    int dtype = json_get(doc, object, "dtype"), shape = json_get(doc, object, "shape");
    int offsets = json_get(doc, object, "data_offsets");
    if (json_count(doc, object) != 3 || dtype < 0 || shape < 0 || offsets < 0)
        return "it needs a dtype, a shape and data_offsets, once each and nothing else";

    while (e->dtype < N_SAFETENSORS_DTYPES &&
           !json_equals(doc, dtype, safetensors_dtype[e->dtype].name))
        e->dtype++;
    // only its position is known, not its element size
    const int other = e->dtype == SAFETENSORS_OTHER;
    if (other && !safetensors_is_dtype(doc, dtype))
        return "its dtype is none of the format's, such as F32";
    size_t size = other ? 1 : safetensors_dtype[e->dtype].size;

    e->ndim = json_count(doc, shape);
    if (e->ndim > SAFETENSORS_MAX_DIMS) return "it has more than 8 dimensions";
    if (!safetensors_sizes(doc, shape, e->ndim, e->shape))
        return "its shape must be integers, 0 to 2^63 - 1";
    int64_t count = safetensors_count(e->ndim, e->shape, size), range[2];
    if (count < 0) return "its shape is too large: the number of bytes overflows";

    if (!safetensors_sizes(doc, offsets, 2, range))
        return "its data_offsets must be two integers, 0 to 2^63 - 1";
    if (range[0] > range[1]) return "its data_offsets end before they begin";
    if ((uint64_t)range[1] > data_size)
        return "its data end beyond the file (is the file cut short?)";
    e->count = (size_t)count;
    if (other) e->count = (size_t)(range[1] - range[0]);  // in bytes: nothing else bounds it
    e->bytes = e->count * size;
    e->data = data + range[0];
    if ((uint64_t)(range[1] - range[0]) != e->bytes)
        return "its data_offsets do not fit its shape and dtype";
    return NULL;
}

static inline int safetensors_by_data(const void *a, const void *b) {
    const SafetensorsEntry *x = (const SafetensorsEntry *)a, *y = (const SafetensorsEntry *)b;
    if (x->data != y->data) return x->data < y->data ? -1 : 1;
    // an empty tensor sorts before the one that starts at the same offset
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

static inline int safetensors_by_name(const void *a, const void *b) {
    return strcmp(((const SafetensorsEntry *)a)->name, ((const SafetensorsEntry *)b)->name);
}

// Sets the error to "tensor "name": what", with control characters in the name escaped.
static inline const char *safetensors_fail(Safetensors *t, const char *name, const char *what) {
    Text quoted = {NULL, 0, 0};
    json_write_string(&quoted, name);
    snprintf(t->error, sizeof t->error, "tensor %.120s: %s", quoted.s, what);
    text_free(&quoted);
    return t->error;
}

static inline const char *safetensors_read_metadata(const Json *doc, int object) {
    // as the reference implementation does
    if (json_type(doc, object) == JSON_NULL) return NULL;
    if (json_type(doc, object) != JSON_OBJECT) return "__metadata__ must be an object";
    if (json_duplicate(doc, object) >= 0) return "__metadata__ has the same key twice";
    for (int k = json_first(doc, object); k >= 0; k = json_next(doc, k))
        if (json_type(doc, k + 1) != JSON_STRING) return "__metadata__ may only have strings";
    return NULL;
}

static inline const char *safetensors_read_header(Safetensors *t, const Json *doc,
                                                  const unsigned char *data, size_t size) {
    t->entry = (SafetensorsEntry *)xcalloc((size_t)json_count(doc, 0), sizeof *t->entry);
    for (int k = json_first(doc, 0); k >= 0; k = json_next(doc, k)) {
        if (json_equals(doc, k, "__metadata__")) {
            if (json_get(doc, 0, "__metadata__") != k + 1) return "__metadata__ is there twice";
            const char *error = safetensors_read_metadata(doc, k + 1);
            if (error) return error;
            continue;
        }
        SafetensorsEntry *e = &t->entry[t->n];
        e->name = json_string(doc, k, NULL);
        if (!e->name) return "a tensor's name contains a NUL";
        t->n++;
        const char *error = safetensors_read_entry(e, doc, k + 1, data, size);
        if (error) return safetensors_fail(t, e->name, error);
    }

    qsort(t->entry, (size_t)t->n, sizeof *t->entry, safetensors_by_data);
    const unsigned char *at = data;
    for (int i = 0; i < t->n; i++) {
        const SafetensorsEntry *e = &t->entry[i];
        if (e->data < at) return safetensors_fail(t, e->name, "its data overlap another tensor's");
        if (e->data > at) return safetensors_fail(t, e->name, "there is a gap before its data");
        at += e->bytes;
    }
    if (at != data + size) return "there are bytes after the last tensor";

    qsort(t->entry, (size_t)t->n, sizeof *t->entry, safetensors_by_name);
    for (int i = 1; i < t->n; i++)
        if (!safetensors_by_name(&t->entry[i - 1], &t->entry[i]))
            return safetensors_fail(t, t->entry[i].name, "the name is used twice");
    return NULL;
}

// Does not clear t->error.
static inline void safetensors_free(Safetensors *t) {
    for (int i = 0; i < t->n; i++) free(t->entry[i].name);
    free(t->entry);
    t->entry = NULL;
    t->n = 0;
}

// Parses a whole file in memory, which must outlive *t: the entries point into it. Returns NULL, or
// an error that names the offending tensor (stored in *t; nothing needs to be freed).
static inline const char *safetensors_parse(Safetensors *t, const void *mem, size_t size) {
    const unsigned char *p = (const unsigned char *)mem;
    uint64_t header;
    memset(t, 0, sizeof *t);
    if (lfs_pointer_error(mem, size)) return lfs_pointer_error(mem, size);
    if (size < sizeof header)
        return "shorter than the 8 bytes that every safetensors file starts with";
    memcpy(&header, p, sizeof header);
    p += sizeof header;
    size -= sizeof header;
    if (header > SAFETENSORS_MAX_HEADER)
        return "it claims a header above 100 MB: this is no safetensors file";
    if (header > size) return "the file ends within the header";
    if (!header || *p != '{')
        return "the header does not begin with '{': this is no safetensors file";

    Json doc;
    const char *error = json_parse(&doc, p, header);
    if (error) {
        snprintf(t->error, sizeof t->error, "header, %s", error);
        return t->error;
    }
    error = safetensors_read_header(t, &doc, p + header, size - header);
    json_free(&doc);
    if (error) safetensors_free(t);
    return error;
}

// The tensor with that name, or NULL.
static inline const SafetensorsEntry *safetensors_find(const Safetensors *t, const char *name) {
    for (int low = 0, high = t->n; low < high;) {
        int middle = low + (high - low) / 2, order = strcmp(name, t->entry[middle].name);
        if (!order) return &t->entry[middle];
        if (order < 0) high = middle;
        else low = middle + 1;
    }
    return NULL;
}

// ---- Conversion ----

// IEEE 754 binary16 to float, exactly.
static inline float safetensors_half(uint16_t half) {
    uint32_t exponent = half >> 10 & 31, fraction = half & 1023, bits;
    // exponent 0: zero and subnormals, fraction * 2^-24
    float value = (float)fraction * (1.0f / 16777216.0f);
    memcpy(&bits, &value, sizeof bits);
    // infinity, or NaN with its payload
    if (exponent == 31) bits = 0x7F800000u | fraction << 13;
    else if (exponent) bits = (exponent + 127 - 15) << 23 | fraction << 13;
    bits |= (uint32_t)(half & 0x8000) << 16;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// bfloat16 (the upper half of a float) to float, exactly.
static inline float safetensors_bfloat(uint16_t upper) {
    uint32_t bits = (uint32_t)upper << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Element i of a floating-point tensor.
static inline double safetensors_real(const SafetensorsEntry *e, size_t i) {
    double f64;
    float f32;
    uint16_t bits;
    switch (e->dtype) {
    case SAFETENSORS_F64: memcpy(&f64, e->data + i * sizeof f64, sizeof f64); return f64;
    case SAFETENSORS_F32: memcpy(&f32, e->data + i * sizeof f32, sizeof f32); return f32;
    }
    memcpy(&bits, e->data + i * sizeof bits, sizeof bits);
    return e->dtype == SAFETENSORS_F16 ? safetensors_half(bits) : safetensors_bfloat(bits);
}

// Element i of an integer tensor; a U64 above INT64_MAX becomes negative.
static inline int64_t safetensors_integer(const SafetensorsEntry *e, size_t i) {
    switch (e->dtype) {
#define X(id, type)                                                                \
    case SAFETENSORS_##id: { type v; memcpy(&v, e->data + i * sizeof v, sizeof v); \
                             return (int64_t)v; }
    SAFETENSORS_INTEGERS(X)
#undef X
    }
    return 0;
}

// Converts a tensor to out (count): exactly, unless F64 is rounded to a narrower real. Returns
// NULL, or what is wrong.
static inline const char *safetensors_to_real(const SafetensorsEntry *e, real *out) {
    if (e->dtype > SAFETENSORS_BF16) return "its dtype must be F64, F32, F16 or BF16";
    if (!strcmp(safetensors_dtype[e->dtype].name, REAL_DTYPE)) memcpy(out, e->data, e->bytes);
    else for (size_t i = 0; i < e->count; i++) out[i] = (real)safetensors_real(e, i);
    return NULL;
}

// Rounds x to a 16-bit float with `fraction` fraction bits and that exponent bias, ties to even:
// binary16 is (10, 15), bfloat16 (7, 127). Overflow gives an infinity. Rounds once, from double
// too.
static inline uint16_t safetensors_narrow(double x, int fraction, int bias) {
    const double least = ldexp(1, 1 - bias), absolute = fabs(x);   // the smallest normal number
    const uint64_t infinity = (uint64_t)(2 * bias + 1) << fraction, sign = signbit(x) ? 0x8000 : 0;
    uint64_t bits;
    if (isnan(x)) return (uint16_t)(sign | infinity | 1u << (fraction - 1));
    if (absolute < least)
        return (uint16_t)(sign | (uint64_t)nearbyint(ldexp(absolute, bias - 1 + fraction)));
    memcpy(&bits, &absolute, sizeof bits);
    // fraction bits of a double that do not fit
    const int rest = 52 - fraction;
    bits += (((uint64_t)1 << (rest - 1)) - 1) + (bits >> rest & 1);
    bits = (bits >> rest) - ((uint64_t)(1023 - bias) << fraction);
    return (uint16_t)(sign | (bits < infinity ? bits : infinity));
}

// Converts x (n) to F64, F32, F16 or BF16 at out, rounding to nearest, ties to even. Returns n, or
// the index of the first result that is not finite; from there on, out is undefined.
static inline size_t safetensors_from_real(int dtype, const real *x, size_t n, void *out) {
    for (size_t i = 0; i < n; i++) {
        const double f64 = (double)x[i];
        const float f32 = (float)f64;
        uint16_t bits = 0;
        int finite = isfinite(f64);
        switch (dtype) {
        case SAFETENSORS_F64: ((double *)out)[i] = f64; break;
        case SAFETENSORS_F32: ((float *)out)[i] = f32, finite = isfinite(f32); break;
        case SAFETENSORS_F16: bits = safetensors_narrow(f64, 10, 15),
            finite = isfinite(safetensors_half(bits)); break;
        case SAFETENSORS_BF16: bits = safetensors_narrow(f64, 7, 127),
            finite = isfinite(safetensors_bfloat(bits)); break;
        default: CHECK(0, "dtype %d is not a floating-point type", dtype);
        }
        if (safetensors_dtype[dtype].size == sizeof bits) ((uint16_t *)out)[i] = bits;
        if (!finite) return i;
    }
    return n;
}

// Converts an integer tensor to out (count). Returns NULL, or what is wrong.
static inline const char *safetensors_to_int64(const SafetensorsEntry *e, int64_t *out) {
    if (e->dtype <= SAFETENSORS_BF16 || e->dtype == SAFETENSORS_OTHER)
        return "its dtype must be an integer's";
    for (size_t i = 0; i < e->count; i++) {
        out[i] = safetensors_integer(e, i);
        if (e->dtype == SAFETENSORS_U64 && out[i] < 0) return "a number in it is above 2^63 - 1";
    }
    return NULL;
}

// ---- Writing: declare every tensor, begin, append the bytes in the same order, end ----
//
//     SafetensorsWriter w;
//     safetensors_writer_init(&w);
//     safetensors_declare(&w, "wte.weight", "F32", 2, shape); ...
//     safetensors_begin(&w, file, path);                          // writes the header
//     safetensors_append(&w, wte, bytes); ...                     // a tensor may come in pieces
//     safetensors_end(&w);                                        // does not close the file

typedef struct {
    int n, capacity;
    SafetensorsEntry *entry;  // (n) as declared; `data` is unused
    FILE *file;
    const char *path;
    int current;              // index of the tensor being written
    size_t written;           // bytes of that tensor written so far
    FileSum *sum;             // set by the caller or NULL: the digest of every byte so far
    char **error;             // set by the caller or NULL: receives the first write error, from
                              // malloc, after which nothing is written; NULL: errors end the
                              // program
} SafetensorsWriter;

static inline void safetensors_writer_init(SafetensorsWriter *w) {
    memset(w, 0, sizeof *w);
}

// Declares the next tensor: a unique name, a dtype as in the format, a shape (ndim).
static inline void safetensors_declare(SafetensorsWriter *w, const char *name, const char *dtype,
                                       int ndim, const int64_t *shape) {
    CHECK(!w->path, "%s is declared after the header was written", name);
    CHECK(strcmp(name, "__metadata__"), "the name is reserved");
    for (int i = 0; i < w->n; i++)
        CHECK(strcmp(name, w->entry[i].name), "%s is declared twice", name);
    if (w->n == w->capacity) {
        w->capacity = 2 * w->capacity + 64;
        w->entry = (SafetensorsEntry *)xrealloc(w->entry, (size_t)w->capacity, sizeof *w->entry);
    }
    SafetensorsEntry *e = &w->entry[w->n++];
    memset(e, 0, sizeof *e);
    e->name = xstrdup(name);
    while (e->dtype < N_SAFETENSORS_DTYPES && strcmp(dtype, safetensors_dtype[e->dtype].name))
        e->dtype++;
    CHECK(e->dtype < N_SAFETENSORS_DTYPES, "%s has the unknown dtype %s", name, dtype);
    CHECK(ndim >= 0 && ndim <= SAFETENSORS_MAX_DIMS, "%s has %d dimensions", name, ndim);
    int64_t count = safetensors_count(ndim, shape, safetensors_dtype[e->dtype].size);
    CHECK(count >= 0, "the shape of %s is negative or too large", name);
    e->ndim = ndim;
    for (int d = 0; d < ndim; d++) e->shape[d] = shape[d];
    e->count = (size_t)count;
    e->bytes = e->count * safetensors_dtype[e->dtype].size;
}

static inline void safetensors_put(SafetensorsWriter *w, const void *bytes, size_t n) {
    if (w->error && *w->error) return;
    char *error = file_try_write(w->file, w->path, bytes, n);
    if (w->error) *w->error = error;
    else files_die(error);
    if (w->sum) file_sum_update(w->sum, bytes, n);
}

// Writes the header, padded with spaces so that the data start at a multiple of 8 bytes. path is
// for messages and must outlive safetensors_end; file may be NULL if there is already an error.
static inline void safetensors_begin(SafetensorsWriter *w, FILE *file, const char *path) {
    Text header = {NULL, 0, 0};
    size_t offset = 0;
    text_printf(&header, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (int i = 0; i < w->n; i++) {
        const SafetensorsEntry *e = &w->entry[i];
        CHECK(e->bytes <= INT64_MAX - offset, "the tensors are too large");
        text_append(&header, ",", 1);
        json_write_string(&header, e->name);
        text_printf(&header, ":{\"dtype\":\"%s\",\"shape\":[", safetensors_dtype[e->dtype].name);
        for (int d = 0; d < e->ndim; d++)
            text_printf(&header, d ? ",%lld" : "%lld", (long long)e->shape[d]);
        text_printf(&header, "],\"data_offsets\":[%zu,%zu]}", offset, offset + e->bytes);
        offset += e->bytes;
    }
    text_append(&header, "}", 1);
    while (header.n % 8) text_append(&header, " ", 1);
    CHECK(header.n <= SAFETENSORS_MAX_HEADER, "%d tensors are too many for a header", w->n);

    uint64_t size = header.n;
    w->file = file;
    w->path = path;
    safetensors_put(w, &size, sizeof size);
    safetensors_put(w, header.s, header.n);
    text_free(&header);
}

// Skips completed tensors: one without elements needs no bytes.
static inline void safetensors_advance(SafetensorsWriter *w) {
    for (; w->current < w->n && w->written == w->entry[w->current].bytes; w->written = 0)
        w->current++;
}

// Appends the next n bytes of the current tensor.
static inline void safetensors_append(SafetensorsWriter *w, const void *bytes, size_t n) {
    CHECK(w->path, "the header comes first");
    if (!n) return;
    safetensors_advance(w);
    CHECK(w->current < w->n, "%zu bytes more than were declared", n);
    const SafetensorsEntry *e = &w->entry[w->current];
    CHECK(n <= e->bytes - w->written, "%zu bytes for %s, which is missing %zu", n, e->name,
          e->bytes - w->written);
    safetensors_put(w, bytes, n);
    w->written += n;
}

// Checks that every declared byte has been written, and frees the writer.
static inline void safetensors_end(SafetensorsWriter *w) {
    safetensors_advance(w);
    CHECK(w->path && w->current == w->n, "tensor %d of %d is not complete", w->current + 1, w->n);
    for (int i = 0; i < w->n; i++) free(w->entry[i].name);
    free(w->entry);
    w->entry = NULL;
    w->n = w->capacity = 0;
}

#endif
