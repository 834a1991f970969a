// json.h: a strict RFC 8259 parser that produces one flat array of nodes, and helpers to write
// JSON.
//
//     Json doc;
//     const char *error = json_parse(&doc, text, size);   // NULL, or "byte 17: expected ':' ..."
//     if (!json_int64(&doc, json_get(&doc, 0, "n_layer"), &L)) ...   // absent, or not an integer
//     for (int k = json_first(&doc, 0); k >= 0; k = json_next(&doc, k)) ...   // key k, value k + 1
//     json_free(&doc);
//
// Nodes are indices; node 0 is the root. Grammar, UTF-8, escapes and depth are all checked while
// parsing, so readers cannot fail on malformed text. Every reader accepts JSON_NONE, so lookups can
// be chained.
#ifndef JSON_H
#define JSON_H

#include "../check.h"
#include "files.h"
#include <math.h>

enum { JSON_NONE = -1, JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY,
       JSON_OBJECT };
enum { JSON_MAX_DEPTH = 64 };

typedef struct {
    int type;
    int begin, end;       // the text is text[begin, end), without a string's quotes
    int count;            // elements of an array, members of an object
    int next;             // an element's next element, a key's next key; JSON_NONE after the last
} JsonNode;

typedef struct {
    const char *text;     // borrowed: must outlive the Json
    int size, at;         // `at`: the parser's position
    JsonNode *node;       // (n) in text order: children follow their parent, values their key
    int n, capacity;
    char error[120];
} Json;

// ---- Characters ----

// Length in bytes of the UTF-8 character at p < end; 0 if malformed (RFC 3629, section 4: overlong,
// surrogate, truncated).
static inline int json_utf8_length(const char *text, const char *end) {
    const unsigned char *p = (const unsigned char *)text;
    int n = p[0] < 0x80 ? 1 : p[0] < 0xC2 ? 0 : p[0] < 0xE0 ? 2 : p[0] < 0xF0 ? 3 : p[0] < 0xF5 ? 4
        : 0;
    if (n > end - text) return 0;
    for (int i = 1; i < n; i++)
        if ((p[i] & 0xC0) != 0x80) return 0;
    if ((p[0] == 0xE0 && p[1] < 0xA0) || (p[0] == 0xED && p[1] > 0x9F)) return 0;
    if ((p[0] == 0xF0 && p[1] < 0x90) || (p[0] == 0xF4 && p[1] > 0x8F)) return 0;
    return n;
}

// Encodes a code point <= U+10FFFF as UTF-8; returns the number of bytes.
static inline int json_utf8_encode(uint32_t code, char out[4]) {
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    int n = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (int i = n - 1; i > 0; i--, code >>= 6) out[i] = (char)(0x80 | (code & 0x3F));
    // 110..., 1110..., 11110...: the low byte of the shift
    out[0] = (char)((0xF00 >> n) | code);
    return n;
}

// Reads the four hex digits of a \uXXXX at p; returns 0 if there is none.
static inline int json_hex4(const char *p, const char *end, uint32_t *code) {
    if (end - p < 6 || p[0] != '\\' || p[1] != 'u') return 0;
    *code = 0;
    for (int i = 2; i < 6; i++) {
        static const char digits[] = "0123456789abcdef0123456789ABCDEF";
        const char *digit = (const char *)memchr(digits, p[i], sizeof digits - 1);
        if (!digit) return 0;
        *code = 16 * *code + (uint32_t)(digit - digits) % 16;
    }
    return 1;
}

// Decodes one character or escape of a string at p < end into out (n bytes of UTF-8). Returns the
// number of bytes consumed, or 0 with n = 0 if malformed: a control character, bad UTF-8, an
// unknown escape, an unpaired surrogate.
static inline int json_char(const char *p, const char *end, char out[4], int *n) {
    static const char escapes[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
    *n = 0;
    if (*p != '\\') {
        if ((unsigned char)*p >= 0x20) *n = json_utf8_length(p, end);
        memcpy(out, p, (size_t)*n);
        return *n;
    }
    if (end - p < 2) return 0;
    const char *known = (const char *)memchr(escapes, p[1], sizeof escapes - 1);
    if (known) {
        out[0] = meanings[known - escapes];
        *n = 1;
        return 2;
    }
    uint32_t code, low;
    if (!json_hex4(p, end, &code)) return 0;
    int surrogate = code >= 0xD800 && code < 0xE000;
    if (surrogate) {
        if (code >= 0xDC00 || !json_hex4(p + 6, end, &low) || low < 0xDC00 || low >= 0xE000)
            return 0;
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    *n = json_utf8_encode(code, out);
    return surrogate ? 12 : 6;
}

// ---- Parsing: each function returns its node, or JSON_NONE with d->error set ----

static inline int json_fail(Json *d, const char *what) {
    snprintf(d->error, sizeof d->error, "byte %d: %s", d->at, what);
    return JSON_NONE;
}

static inline int json_add(Json *d, int type) {
    if (d->n == d->capacity) {
        // cannot overflow: there are fewer nodes than bytes of text
        d->capacity = d->capacity ? d->capacity + d->capacity / 2 : 64;
        d->node = (JsonNode *)xrealloc(d->node, (size_t)d->capacity, sizeof *d->node);
    }
    JsonNode fresh = {type, d->at, d->at, 0, JSON_NONE};
    d->node[d->n] = fresh;
    return d->n++;
}

// The next byte that is not white space, without consuming it; -1 at the end.
static inline int json_peek(Json *d) {
    while (d->at < d->size && memchr(" \t\n\r", d->text[d->at], 4)) d->at++;
    return d->at < d->size ? (unsigned char)d->text[d->at] : -1;
}

static inline int json_parse_word(Json *d, int type, const char *word) {
    int n = (int)strlen(word), node = json_add(d, type);
    if (d->size - d->at < n || memcmp(d->text + d->at, word, (size_t)n))
        return json_fail(d, "unknown word");
    d->node[node].end = d->at += n;
    return node;
}

static inline int json_digits(Json *d) {
    int start = d->at;
    while (d->at < d->size && d->text[d->at] >= '0' && d->text[d->at] <= '9') d->at++;
    return d->at - start;
}

static inline int json_skip(Json *d, const char *any) {
    int found = d->at < d->size && d->text[d->at] && strchr(any, d->text[d->at]);
    d->at += found;
    return found;
}

static inline int json_parse_number(Json *d) {
    int node = json_add(d, JSON_NUMBER);
    json_skip(d, "-");
    if (!json_skip(d, "0") && !json_digits(d)) return json_fail(d, "a number needs a digit here");
    if (json_skip(d, ".") && !json_digits(d))
        return json_fail(d, "a number needs a digit after the point");
    if (json_skip(d, "eE")) {
        json_skip(d, "+-");
        if (!json_digits(d)) return json_fail(d, "a number needs a digit in the exponent");
    }
    d->node[node].end = d->at;
    return node;
}

static inline int json_parse_string(Json *d) {
    char utf8[4];
    int n;
    d->at++;
    int node = json_add(d, JSON_STRING);
    while (d->at < d->size && d->text[d->at] != '"') {
        int took = json_char(d->text + d->at, d->text + d->size, utf8, &n);
        if (!took) return json_fail(d, "bad character or escape in a string");
        d->at += took;
    }
    if (d->at == d->size) return json_fail(d, "the text ends within a string");
    d->node[node].end = d->at++;
    return node;
}

static inline int json_parse_value(Json *d, int depth);

// Parses "key": value. Returns the key's node; the value's is the next one.
static inline int json_parse_member(Json *d, int depth) {
    if (json_peek(d) != '"') return json_fail(d, "expected a key in quotes");
    int key = json_parse_string(d);
    if (key < 0) return JSON_NONE;
    if (json_peek(d) != ':') return json_fail(d, "expected ':' after a key");
    d->at++;
    return json_parse_value(d, depth) < 0 ? JSON_NONE : key;
}

static inline int json_parse_container(Json *d, int depth) {
    if (depth == JSON_MAX_DEPTH) return json_fail(d, "nested too deeply");
    int object = d->text[d->at] == '{', close = object ? '}' : ']', last = JSON_NONE;
    int node = json_add(d, object ? JSON_OBJECT : JSON_ARRAY);
    d->at++;
    for (int more = json_peek(d) != close; more;) {
        int child = object ? json_parse_member(d, depth + 1) : json_parse_value(d, depth + 1);
        if (child < 0) return JSON_NONE;
        if (last >= 0) d->node[last].next = child;
        last = child;
        d->node[node].count++;
        int c = json_peek(d);
        more = c == ',';
        if (more) d->at++;
        else if (c != close)
            return json_fail(d, object ? "expected ',' or '}'" : "expected ',' or ']'");
    }
    d->node[node].end = ++d->at;
    return node;
}

static inline int json_parse_value(Json *d, int depth) {
    int c = json_peek(d);
    if (c == '{' || c == '[') return json_parse_container(d, depth);
    if (c == '"') return json_parse_string(d);
    if (c == '-' || (c >= '0' && c <= '9')) return json_parse_number(d);
    if (c == 't') return json_parse_word(d, JSON_TRUE, "true");
    if (c == 'f') return json_parse_word(d, JSON_FALSE, "false");
    if (c == 'n') return json_parse_word(d, JSON_NULL, "null");
    return json_fail(d, c < 0 ? "the text ends where a value is expected" : "expected a value");
}

static inline void json_free(Json *d) {
    free(d->node);
    d->node = NULL;
    d->n = d->capacity = 0;
}

// Parses size bytes as exactly one value. Returns NULL, or what is wrong and where (the message is
// stored in *d; nothing needs to be freed). The text is borrowed until json_free. Duplicate keys
// are accepted: see json_duplicate.
static inline const char *json_parse(Json *d, const void *text, size_t size) {
    memset(d, 0, sizeof *d);
    if (size >= INT32_MAX / 2) return "longer than 1 GiB";
    d->text = (const char *)text;
    d->size = (int)size;
    // a byte-order mark, which some editors write
    if (size >= 3 && !memcmp(text, "\xEF\xBB\xBF", 3)) d->at = 3;
    if (lfs_pointer_error(text, size)) return lfs_pointer_error(text, size);
    if (json_parse_value(d, 0) >= 0 && json_peek(d) < 0) return NULL;
    if (!d->error[0]) json_fail(d, "more text after the value");
    json_free(d);
    return d->error;
}

// ---- Reading ----

// JSON_NONE if the node is JSON_NONE.
static inline int json_type(const Json *d, int node) {
    return node < 0 ? JSON_NONE : d->node[node].type;
}

// Number of elements of an array or members of an object, else 0.
static inline int json_count(const Json *d, int node) { return node < 0 ? 0 : d->node[node].count; }

// The first element of an array or the first key of an object (its value is the next node), else
// JSON_NONE.
static inline int json_first(const Json *d, int node) {
    return json_count(d, node) ? node + 1 : JSON_NONE;
}

// The next element or key; JSON_NONE after the last.
static inline int json_next(const Json *d, int node) { return d->node[node].next; }

// Whether the node is the string s.
static inline int json_equals(const Json *d, int node, const char *s) {
    if (json_type(d, node) != JSON_STRING) return 0;
    const char *p = d->text + d->node[node].begin, *end = d->text + d->node[node].end;
    char utf8[4];
    for (int n; p < end; s += n) {
        p += json_char(p, end, utf8, &n);
        if (!utf8[0] || strncmp(s, utf8, (size_t)n)) return 0;     // a C string contains no NUL
    }
    return *s == 0;
}

// The value of an object's key (the first, if duplicated), or JSON_NONE. Linear in the number of
// members: to read many, iterate with json_first and json_next.
static inline int json_get(const Json *d, int object, const char *key) {
    if (json_type(d, object) != JSON_OBJECT) return JSON_NONE;
    for (int k = json_first(d, object); k >= 0; k = json_next(d, k))
        if (json_equals(d, k, key)) return k + 1;
    return JSON_NONE;
}

// An integer literal in [-2^63, 2^63 - 1], exactly. Returns 0 and leaves *out unchanged for
// anything else (1.0, 1e3).
static inline int json_int64(const Json *d, int node, int64_t *out) {
    if (json_type(d, node) != JSON_NUMBER) return 0;
    const char *p = d->text + d->node[node].begin, *end = d->text + d->node[node].end;
    int negative = *p == '-';
    uint64_t v = 0, limit = (uint64_t)INT64_MAX + (uint64_t)negative;
    for (p += negative; p < end; p++) {
        if (*p < '0' || *p > '9') return 0;
        uint64_t digit = (uint64_t)(*p - '0');
        if (v > (limit - digit) / 10) return 0;
        v = 10 * v + digit;
    }
    *out = (int64_t)(negative ? 0 - v : v);
    return 1;
}

// The nearest double. Returns 0 and leaves *out unchanged if it is not a number or overflows a
// double.
static inline int json_number(const Json *d, int node, double *out) {
    if (json_type(d, node) != JSON_NUMBER) return 0;
    char *s = xprintf("%.*s", d->node[node].end - d->node[node].begin,
                      d->text + d->node[node].begin);
    double v = strtod(s, NULL);
    free(s);
    if (!isfinite(v)) return 0;
    *out = v;
    return 1;
}

// A string as NUL-terminated UTF-8 from malloc; its length goes to *size. NULL if the node is not a
// string or, with size NULL, if the string contains a NUL (\u0000), which a C string would hide.
static inline char *json_string(const Json *d, int node, size_t *size) {
    if (json_type(d, node) != JSON_STRING) return NULL;
    const char *p = d->text + d->node[node].begin, *end = d->text + d->node[node].end;
    // no escape is shorter than its UTF-8
    char *s = (char *)xcalloc((size_t)(end - p) + 1, 1), *to = s;
    for (int n; p < end; to += n) p += json_char(p, end, to, &n);
    *to = 0;
    if (size) *size = (size_t)(to - s);
    else if (memchr(s, 0, (size_t)(to - s))) {
        free(s);
        return NULL;
    }
    return s;
}

typedef struct { char *s; size_t size; int node; } JsonKey;

static inline int json_key_compare(const void *a, const void *b) {
    const JsonKey *x = (const JsonKey *)a, *y = (const JsonKey *)b;
    int order = memcmp(x->s, y->s, x->size < y->size ? x->size : y->size);
    return order ? order : (x->size > y->size) - (x->size < y->size);
}

// A key that an object contains twice, however it is escaped, or JSON_NONE. O(n log n).
static inline int json_duplicate(const Json *d, int object) {
    if (json_type(d, object) != JSON_OBJECT) return JSON_NONE;
    size_t count = (size_t)json_count(d, object), n = 0;
    JsonKey *keys = (JsonKey *)xcalloc(count, sizeof *keys);
    for (int k = json_first(d, object); k >= 0; k = json_next(d, k), n++) {
        keys[n].s = json_string(d, k, &keys[n].size);
        keys[n].node = k;
    }
    qsort(keys, count, sizeof *keys, json_key_compare);
    int twice = JSON_NONE;
    for (size_t i = 1; i < count && twice < 0; i++)
        if (!json_key_compare(&keys[i - 1], &keys[i])) twice = keys[i].node;
    for (size_t i = 0; i < count; i++) free(keys[i].s);
    free(keys);
    return twice;
}

// ---- Writing ----

// Appends s in quotes. Bytes that are not valid UTF-8 (as a path may contain) become U+FFFD.
static inline void json_write_string(Text *t, const char *s) {
    text_append(t, "\"", 1);
    for (const char *end = s + strlen(s); s < end;) {
        int n = json_utf8_length(s, end);
        if (!n) text_append(t, "\xEF\xBF\xBD", 3);
        else if (*s == '"' || *s == '\\') text_printf(t, "\\%c", *s);
        else if ((unsigned char)*s < 0x20) text_printf(t, "\\u%04x", (unsigned)*s);
        else text_append(t, s, (size_t)n);
        s += n ? n : 1;
    }
    text_append(t, "\"", 1);
}

// Appends a number with the fewest of 15 to 17 digits that strtod converts back to the same double;
// NaN and infinities, which JSON lacks, become null.
static inline void json_write_number(Text *t, double v) {
    char s[32] = "null";
    for (int digits = 15; isfinite(v) && digits <= 17; digits++) {
        snprintf(s, sizeof s, "%.*g", digits, v);
        if (strtod(s, NULL) == v) break;
    }
    text_append(t, s, strlen(s));
}

#endif
