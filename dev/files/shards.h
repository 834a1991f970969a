// shards.h: token shards in llm.c's format, and the order in which samples are drawn from them.
//
//     byte 0       256 words of 32 bits, little-endian: magic, version, number of tokens, zeros
//     byte 1024    the tokens, little-endian: 16 bits each (magic 20240520, version 1) or 32 bits
//                  (magic 20240801, version 7)
//
// A sample is a window of T+1 tokens: T inputs and the T tokens that follow them. Windows start at
// multiples of T and never span shards. Sample i of the endless sequence is a pure function of
// (seed, i): there is no state to save, any rank can read any sample, and the order depends neither
// on the micro-batch size nor on the number of ranks.
#ifndef SHARDS_H
#define SHARDS_H

#include "../check.h"
#include "../model/rng.h"
#include "files.h"
#include "sha256.h"
#include <glob.h>

// ---- llm.c's header, shared with its tokenizer files ----

enum { LLMC_HEADER_BYTES = 1024 };

// Word i of a header, or of any little-endian file.
static inline uint32_t llmc_word(const unsigned char *mem, size_t i) {
    const unsigned char *p = mem + 4 * i;
    return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static inline void llmc_header(unsigned char header[LLMC_HEADER_BYTES], const uint32_t *words,
                               int n) {
    memset(header, 0, LLMC_HEADER_BYTES);
    for (int i = 0; i < 4 * n; i++) header[i] = (unsigned char)(words[i / 4] >> 8 * (i % 4));
}

// ---- One shard ----

typedef struct { uint32_t magic, version; int width; } ShardFormat;   // width: bytes of a token

static const ShardFormat shard_formats[2] = {{20240520, 1, 2}, {20240801, 7, 4}};
// llm.c's multiple-choice files (HellaSwag)
enum { SHARD_EVAL_MAGIC = 20240522 };

typedef struct {
    const unsigned char *tokens;  // (count) of `width` bytes each, within the parsed memory
    int64_t count;
    int width;
} Shard;

// Token i of [0, count).
static inline uint32_t shard_token(const Shard *s, int64_t i) {
    const unsigned char *p = s->tokens + (size_t)i * (size_t)s->width;
    return s->width == 2 ? (uint32_t)p[0] | (uint32_t)p[1] << 8 : llmc_word(p, 0);
}

// Why a file with that magic number is not a shard; p has at least 4 bytes.
static inline const char *shard_magic_error(const unsigned char *p) {
    uint32_t swapped = (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 |
        (uint32_t)p[3];
    if (llmc_word(p, 0) == SHARD_EVAL_MAGIC)
        return "an evaluation file (magic 20240522), not a token shard";
    for (int i = 0; i < 2; i++)
        if (swapped == shard_formats[i].magic)
            return "a token shard in big-endian order; it must be little-endian";
    if (!memcmp(p, "vers", 4))
        return "plain text, perhaps a Git LFS pointer, not a token shard\n  hint: git lfs pull "
            "fetches it";
    int text = 1;
    for (int i = 0; i < 4; i++)
        text = text && ((p[i] >= ' ' && p[i] <= '~') || (p[i] >= '\t' && p[i] <= '\r'));
    if (text)
        return "plain text, not a token shard\n  hint: convert it to shards first: data/README.md";
    return "not a token shard (wrong magic number)\n  hint: data/README.md lists the formats that "
        "can be read";
}

// Parses a shard of `size` bytes at mem, which must outlive *s. Returns NULL, or what is wrong.
static inline const char *shard_parse(Shard *s, const void *mem, size_t size) {
    const unsigned char *p = (const unsigned char *)mem;
    const ShardFormat *format = NULL;
    memset(s, 0, sizeof *s);
    if (size == 0) return "the file is empty";
    if (size < 4) return "too short for a token shard";
    for (int i = 0; i < 2; i++)
        if (llmc_word(p, 0) == shard_formats[i].magic) format = &shard_formats[i];
    if (!format) return shard_magic_error(p);
    if (size < LLMC_HEADER_BYTES) return "cut short: a token shard has a header of 1024 bytes";
    if (llmc_word(p, 1) != format->version) return "a token shard of an unknown version";
    uint64_t bytes = (uint64_t)llmc_word(p, 2) * (uint64_t)format->width,
        held = size - LLMC_HEADER_BYTES;
    if (bytes > held) return "cut short: its header counts more tokens than it holds";
    if (bytes < held) return "damaged: it holds more bytes than its header counts tokens";
    if (bytes == 0) return "a token shard without tokens";
    s->tokens = p + LLMC_HEADER_BYTES;
    s->count = (int64_t)llmc_word(p, 2);
    s->width = format->width;
    return NULL;
}

// ---- Many shards ----

// Shards are read, not mapped: truncating a mapped file would end the program by a signal that
// names no file.
typedef struct {
    char *path;
    Shard shard;                          // its tokens stay in the file
    int64_t bytes, seconds, nanoseconds;  // its size and modification time when it was opened
    int64_t first;                        // windows in the preceding shards
} ShardFile;

typedef struct {
    int n, T, V;
    int64_t windows, tokens;                             // in all shards
    ShardFile *file;                                     // (n) in order of name
} Shards;

static inline int shards_compare_names(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

// Adds the matches of a pattern. A path that exists stands for itself, whatever characters it
// contains.
static inline int shards_glob_add(glob_t *found, const char *pattern) {
    char *escaped = (char *)xcalloc(2 * strlen(pattern) + 1, 1);
    const int literal = access(pattern, F_OK) == 0;
    size_t n = 0;
    for (const char *p = pattern; *p; p++) {
        if (literal && strchr("*?[]\\", *p)) escaped[n++] = '\\';
        escaped[n++] = *p;
    }
    const int status = glob(escaped, found->gl_pathc ? GLOB_APPEND : 0, NULL, found);
    free(escaped);
    return status;
}

// The files matched by comma-separated glob(3) patterns, sorted by name regardless of locale and of
// the patterns' order. Dies if a pattern matches nothing or two match the same file. Free with
// globfree().
static inline glob_t shards_glob(const char *patterns) {
    glob_t found;
    memset(&found, 0, sizeof found);
    for (const char *p = patterns; ; p++) {
        // a name may contain a comma
        const size_t n = access(patterns, F_OK) == 0 ? strlen(p) : strcspn(p, ",");
        char *pattern = xprintf("%.*s", (int)n, p);
        int status = shards_glob_add(&found, pattern);
        if (status == GLOB_NOMATCH)
            die("no token shard matches \"%s\"\n  hint: create the shards first: data/README.md%s",
                pattern, strpbrk(patterns, "*?[]{}\\~,") ? "; * ? [] are wildcards, a comma "
                "separates patterns; {} and ~ are left to the shell" : "");
        if (status)
            die("cannot search for \"%s\": %s", pattern, status == GLOB_NOSPACE ? "out of memory"
                : "read error");
        free(pattern);
        p += n;
        if (!*p) break;
    }
    qsort(found.gl_pathv, found.gl_pathc, sizeof found.gl_pathv[0], shards_compare_names);
    for (size_t i = 1; i < found.gl_pathc; i++)
        if (!strcmp(found.gl_pathv[i - 1], found.gl_pathv[i]))
            die("%s is matched twice by \"%s\"", found.gl_pathv[i], patterns);
    return found;
}

// Opens a shard and stats it. Returns NULL or, with nothing left open, what is wrong.
static inline const char *shard_file_open(const char *path, int *fd, struct stat *st) {
    *fd = open(path, O_RDONLY | O_CLOEXEC);
    if (*fd < 0) return strerror(errno);
    const char *error = fstat(*fd, st) ? strerror(errno) : !S_ISREG(st->st_mode) ? "not a regular "
        "file" : NULL;
    if (error) close(*fd);
    return error;
}

static inline int64_t shard_file_nanoseconds(const struct stat *st) {
#ifdef __APPLE__
    return st->st_mtimespec.tv_nsec;
#else
    return st->st_mtim.tv_nsec;
#endif
}

// Reads n bytes of an open file from offset `at`, fewer at its end. Returns the number read, or -1
// with errno.
static inline int64_t shard_file_read(int fd, int64_t at, void *bytes, size_t n) {
    size_t done = 0;
    while (done < n) {
        const ssize_t got = pread(fd, (char *)bytes + done, n - done, (off_t)(at + (int64_t)done));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return -1;
        if (got == 0) break;
        done += (size_t)got;
    }
    return (int64_t)done;
}

// Reads tokens [at, at + n) of a shard as stored, n * width bytes. Dies if the file is no longer
// the one that shards_open opened, judging by its size and modification time, which are compared
// after reading.
static inline void shards_read_bytes(const ShardFile *f, int64_t at, unsigned char *bytes,
                                     int64_t n) {
    static const char hint[] = "\n  hint: restore the original shard; --resume continues a run "
        "from its last checkpoint";
    struct stat st;
    int fd;
    CHECK(0 <= at && 0 <= n && at + n <= f->shard.count, "%s: %lld tokens at %lld", f->path,
          (long long)n, (long long)at);
    const char *error = shard_file_open(f->path, &fd, &st);
    if (error) die("%s can no longer be read: %s%s", f->path, error, hint);
    const size_t size = (size_t)n * (size_t)f->shard.width;
    const int64_t got = shard_file_read(fd, LLMC_HEADER_BYTES + at * f->shard.width, bytes, size);
    if (got < 0)
        die("cannot read %s at token %lld: %s%s", f->path, (long long)at, strerror(errno), hint);
    if (fstat(fd, &st)) die("cannot read %s: %s%s", f->path, strerror(errno), hint);
    close(fd);
    if ((int64_t)st.st_size != f->bytes)
        die("%s has changed since it was opened: it had %lld bytes, now it has %lld%s", f->path,
            (long long)f->bytes, (long long)st.st_size, hint);
    if ((int64_t)st.st_mtime != f->seconds || shard_file_nanoseconds(&st) != f->nanoseconds)
        die("%s has changed since it was opened: it was rewritten%s", f->path, hint);
    if ((size_t)got != size)
        die("cannot read %s at token %lld: it ends there%s", f->path, (long long)at, hint);
}

// Reads tokens [at, at + n) of a file, which must be in [0, V): all but the last go to `tokens`
// (n-1), all but the first to `targets` (n-1). With both NULL it only checks the range.
static inline void shards_read_tokens(const Shards *s, const ShardFile *f, int64_t at, int64_t n,
                                      int *tokens, int *targets) {
    enum { PIECE = 16384 };
    unsigned char bytes[4 * PIECE];
    Shard piece = f->shard;
    piece.tokens = bytes;
    for (int64_t done = 0, m; done < n; done += m) {
        m = n - done < PIECE ? n - done : (int64_t)PIECE;
        shards_read_bytes(f, at + done, bytes, m);
        for (int64_t i = 0; i < m; i++) {
            const uint32_t token = shard_token(&piece, i);
            if (token >= (uint32_t)s->V)
                die("%s: token %lld is %u, but the vocabulary has %d tokens\n"
                    "  hint: --vocab-size does not match the tokenizer that made these shards",
                    f->path, (long long)(at + done + i), token, s->V);
            if (tokens && done + i < n - 1) tokens[done + i] = (int)token;
            if (targets && done + i > 0) targets[done + i - 1] = (int)token;
        }
    }
}

// Reads a shard's header, size and modification time. Dies if anything is wrong.
static inline void shards_open_file(ShardFile *f) {
    unsigned char header[LLMC_HEADER_BYTES];
    struct stat st;
    int fd;
    const char *error = shard_file_open(f->path, &fd, &st);
    const int64_t got = error ? 0 : shard_file_read(fd, 0, header, sizeof header);
    if (got < 0) error = strerror(errno);
    if (error)
        die("cannot read %s: %s\n  hint: name the shards, as in \"data/text/train_*.bin\"", f->path,
            error);
    close(fd);
    error = shard_parse(&f->shard, header,
                        got < LLMC_HEADER_BYTES ? (size_t)got : (size_t)st.st_size);
    if (error) die("%s: %s", f->path, error);
    f->shard.tokens = NULL;
    f->bytes = (int64_t)st.st_size;
    f->seconds = (int64_t)st.st_mtime;
    f->nanoseconds = shard_file_nanoseconds(&st);
}

// Opens the shards that the patterns match (see shards_glob), for windows of T+1 tokens in [0, V).
// A shard that is too short has no windows. The first shard is read completely, so that a wrong V
// shows at once; every token is checked again when it is read. Dies with the file's name and a
// hint. Each window reopens its file, so any number of shards needs only one descriptor; a file
// that has changed or disappeared is named.
static inline void shards_open(Shards *s, const char *patterns, int T, int V) {
    CHECK(T >= 1 && V >= 1, "T %d, V %d", T, V);
    memset(s, 0, sizeof *s);
    glob_t found = shards_glob(patterns);
    s->n = (int)found.gl_pathc;
    s->T = T;
    s->V = V;
    s->file = (ShardFile *)xcalloc(found.gl_pathc, sizeof *s->file);
    for (int i = 0; i < s->n; i++) {
        ShardFile *f = &s->file[i];
        f->path = xstrdup(found.gl_pathv[i]);
        shards_open_file(f);
        f->first = s->windows;
        s->windows += (f->shard.count - 1) / T;
        s->tokens += f->shard.count;
    }
    globfree(&found);
    if (s->windows == 0)
        die("%s: no shard is long enough for one sample of %d + 1 tokens\n  hint: use a shorter "
            "--seq-len or more text", patterns, T);
    shards_read_tokens(s, &s->file[0], 0, s->file[0].shard.count, NULL, NULL);
}

static inline void shards_close(Shards *s) {
    for (int i = 0; i < s->n; i++) free(s->file[i].path);
    free(s->file);
    memset(s, 0, sizeof *s);
}

// Identifies a set of shards: SHA-256 over the sizes of all shards, in order, and up to 2048 tokens
// from either end of each. Names are left out: shards may move.
static inline void shards_fingerprint(const Shards *s, char hex[SHA256_HEX]) {
    enum { SEEN = 2048 };
    unsigned char bytes[4 * SEEN];
    Sha256 sha;
    sha256_init(&sha);
    for (int i = 0; i < s->n; i++) {
        const ShardFile *f = &s->file[i];
        const int64_t n = f->shard.count < SEEN ? f->shard.count : (int64_t)SEEN;
        char *size = xprintf("%lld %d\n", (long long)f->shard.count, f->shard.width);
        sha256_update(&sha, size, strlen(size));
        free(size);
        for (int end = 0; end < 2; end++) {
            shards_read_bytes(f, end ? f->shard.count - n : 0, bytes, n);
            sha256_update(&sha, bytes, (size_t)n * (size_t)f->shard.width);
        }
    }
    sha256_final(&sha, hex);
}

// The number of rows of T tokens needed for at least `tokens` tokens, or all rows if there are
// fewer; 0 tokens: all.
static inline int64_t shards_rows(const Shards *s, int64_t tokens) {
    const int64_t rows = (tokens + s->T - 1) / s->T;
    return tokens == 0 || rows > s->windows ? s->windows : rows;
}

// The file that contains window w of [0, windows), and the token of that file where the window
// starts.
static inline const ShardFile *shards_find(const Shards *s, int64_t w, int64_t *start) {
    CHECK(0 <= w && w < s->windows, "window %lld of %lld", (long long)w, (long long)s->windows);
    int low = 0, high = s->n - 1;                        // the last file with first <= w
    while (low < high) {
        int middle = low + (high - low + 1) / 2;
        if (s->file[middle].first <= w) low = middle;
        else high = middle - 1;
    }
    *start = (w - s->file[low].first) * s->T;
    return &s->file[low];
}

// Reads window w: tokens (T), and targets (T), the tokens one position later. Dies on a token >= V.
static inline void shards_read_window(const Shards *s, int64_t w, int *tokens, int *targets) {
    int64_t start;
    const ShardFile *f = shards_find(s, w, &start);
    shards_read_tokens(s, f, start, (int64_t)s->T + 1, tokens, targets);
}

// ---- The order of samples ----

// A balanced Feistel network is a permutation whatever its round function. Four rounds look random
// to an observer who sees few of its values (Luby and Rackoff 1988), but an epoch reveals all of
// them, and narrow halves mix slowly. For the positions of the first two of 16 windows, over seeds,
// chi-square per degree of freedom was measured as 67 with four rounds, 4.9 with six and 1.1 with
// eight.
enum { SHARDS_ORDER_ROUNDS = 8 };

// The position of index in [0, n) in that epoch: for each (seed, epoch) a permutation of [0, n), in
// O(1) time and memory. The network permutes the smallest 4^h >= n; values outside [0, n) are
// permuted again until they fall inside ("cycle walking", Black and Rogaway 2002), which must
// happen since the cycle returns to index. This takes fewer than 4 iterations on average.
static inline int64_t shards_order(uint64_t seed, int64_t epoch, int64_t index, int64_t n) {
    CHECK(0 <= epoch && 0 <= index && index < n && n <= (int64_t)1 << 62,
          "epoch %lld, index %lld of %lld", (long long)epoch, (long long)index, (long long)n);
    int h = 0;                                           // bits per half
    while (((int64_t)1 << 2 * h) < n) h++;
    uint32_t mask = ((uint32_t)1 << h) - 1;
    uint64_t x = (uint64_t)index;
    do {
        uint32_t left = (uint32_t)(x >> h), right = (uint32_t)x & mask;
        for (uint32_t round = 0; round < SHARDS_ORDER_ROUNDS; round++) {
            uint32_t mixed = left ^ (rng_words(seed, STREAM_DATA, (uint64_t)epoch, round,
                                               right).v[0] & mask);
            left = right;
            right = mixed;
        }
        x = (uint64_t)left << h | right;
    } while (x >= (uint64_t)n);
    return (int64_t)x;
}

// The window of sample i = 0, 1, ... of the endless sequence: each epoch of `windows` samples
// visits every window once.
static inline int64_t shards_sample(const Shards *s, uint64_t seed, int64_t sample) {
    CHECK(sample >= 0, "sample %lld", (long long)sample);
    return shards_order(seed, sample / s->windows, sample % s->windows, s->windows);
}

static inline void shards_read_sample(const Shards *s, uint64_t seed, int64_t sample, int *tokens,
                                      int *targets) {
    shards_read_window(s, shards_sample(s, seed, sample), tokens, targets);
}

// ---- Writing ----

// Writes PREFIX_000000.bin, PREFIX_000001.bin, ...: each under a temporary name until it is
// complete.
typedef struct {
    char *prefix, *path;          // path: of the shard being written
    FILE *f;                      // NULL between shards
    const ShardFormat *format;
    int V, shards;                // shards: finished ones
    int64_t limit, count, total;  // tokens: the most per shard, in the current shard, in total
} ShardWriter;

// Opens a writer of tokens in [0, V), at most `limit` per shard; 0: as many as the format can
// count. Creates no file yet.
static inline void shard_writer_open(ShardWriter *w, const char *prefix, int V, int64_t limit) {
    CHECK(V >= 1 && limit >= 0, "V %d, limit %lld", V, (long long)limit);
    memset(w, 0, sizeof *w);
    w->prefix = xstrdup(prefix);
    w->format = &shard_formats[V > 65536];
    w->V = V;
    w->limit = limit > 0 && limit < INT32_MAX ? limit : INT32_MAX;
}

static inline void shard_writer_header(ShardWriter *w) {
    unsigned char header[LLMC_HEADER_BYTES];
    uint32_t words[3] = {w->format->magic, w->format->version, (uint32_t)w->count};
    llmc_header(header, words, 3);
    file_write(w->f, w->path, header, sizeof header);
}

static inline void shard_writer_begin(ShardWriter *w) {
    w->path = xprintf("%s_%06d.bin.tmp", w->prefix, w->shards);
    w->f = file_open(w->path, "wb");
    w->count = 0;
    shard_writer_header(w);
}

static inline void shard_writer_finish(ShardWriter *w) {
    if (fseek(w->f, 0, SEEK_SET)) die("cannot write %s: %s", w->path, strerror(errno));
    shard_writer_header(w);                              // now with the token count
    file_sync_close(w->f, w->path);
    char *name = xprintf("%s_%06d.bin", w->prefix, w->shards++);
    file_rename(w->path, name);
    free(name);
    free(w->path);
    w->path = NULL;
    w->f = NULL;
}

// Appends tokens (n), each in [0, V).
static inline void shard_writer_append(ShardWriter *w, const int *tokens, size_t n) {
    for (size_t i = 0; i < n; i++) {
        CHECK(0 <= tokens[i] && tokens[i] < w->V, "token %d of %d", tokens[i], w->V);
        if (!w->f) shard_writer_begin(w);
        uint32_t token = (uint32_t)tokens[i];
        unsigned char bytes[4] = {(unsigned char)token, (unsigned char)(token >> 8),
                                  (unsigned char)(token >> 16), (unsigned char)(token >> 24)};
        file_write(w->f, w->path, bytes, (size_t)w->format->width);
        w->total++;
        if (++w->count == w->limit) shard_writer_finish(w);
    }
}

// Finishes the last shard. A writer that received no tokens has created no file.
static inline void shard_writer_close(ShardWriter *w) {
    if (w->f) shard_writer_finish(w);
    free(w->prefix);
    w->prefix = NULL;
}

#endif
