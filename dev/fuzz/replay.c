// replay.c: runs the corpora of dev/fuzz through every parser, each file unchanged and with
// mutations that depend only on its bytes, with any compiler: part of make test. The fuzzer itself
// is fuzz.c.
//
//     build/fuzz_replay [--mutations N] [--corpus DIR] [PARSER...]
//     build/fuzz_replay PARSER FILE...          only these files, such as one that a fuzzer has
//                                               found
//     build/fuzz_replay --list                  the parsers
//     build/fuzz_replay --write-seeds DIR       the valid inputs that a corpus starts from
#include "parsers.h"
#include "../files/files.h"
#include "seeds.h"

enum { MOST_FILES = 1000, MOST_BYTES = 1 << 14, PER_MUTATION = 4 };

typedef struct { Text file[MOST_FILES]; char *name[MOST_FILES]; int n; } Corpus;

static int by_text(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static void corpus_read(Corpus *c, const char *dir) {
    DIR *d = opendir(dir);
    c->n = 0;
    if (!d)
        die("cannot open %s: %s\n  hint: run it from the repository's root, or give --corpus DIR",
            dir, strerror(errno));
    for (struct dirent *e; (e = readdir(d)) != NULL;)
        if (*e->d_name != '.' && c->n < MOST_FILES) c->name[c->n++] = xstrdup(e->d_name);
    closedir(d);
    if (!c->n) die("%s is empty", dir);
    qsort(c->name, (size_t)c->n, sizeof *c->name, by_text);
    for (int i = 0; i < c->n; i++) {
        char *path = xprintf("%s/%s", dir, c->name[i]);
        FileMap map;
        const char *error = file_map(&map, path);
        if (error) die("cannot read %s: %s", path, error);
        memset(&c->file[i], 0, sizeof c->file[i]);
        text_append(&c->file[i], map.size ? (const void *)map.data : "", map.size);
        file_unmap(&map);
        free(path);
    }
}

static void corpus_free(Corpus *c) {
    for (int i = 0; i < c->n; i++) free(c->name[i]), text_free(&c->file[i]);
}

// Runs a parser on n bytes that end where an inaccessible page begins, so that reading past the end
// is detected without a sanitizer, too.
static int replay_run(const FuzzParser *parser, const char *bytes, size_t n) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), capacity = (n / page + 1) * page;
    static unsigned char *base;
    static size_t most;
    if (capacity > most) {
        if (base) munmap(base, most + page);
        base = (unsigned char *)mmap(NULL, capacity + page, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED || mprotect(base + capacity, page, PROT_NONE))
            die("mmap: %s", strerror(errno));
        most = capacity;
    }
    unsigned char *exact = base + most - n;
    if (n) memcpy(exact, bytes, n);
    return fuzz_run(parser, exact, n);
}

// ---- Mutations ----

typedef struct { char s[MOST_BYTES]; size_t n; } Input;

// Replaces `gone` bytes at `at` by n bytes; whatever does not fit is dropped from the end.
static void input_replace(Input *x, size_t at, size_t gone, const char *bytes, size_t n) {
    if (n > MOST_BYTES - at) n = MOST_BYTES - at;
    size_t rest = x->n - at - gone, capacity = MOST_BYTES - at - n;
    if (rest > capacity) rest = capacity;
    memmove(x->s + at + n, x->s + at + gone, rest);
    if (n) memmove(x->s + at, bytes, n);
    x->n = at + n + rest;
}

static const char *const odd_numbers[] = {"0", "-1", "-0", "1e999", "2147483647", "2147483648",
                                          "4294967296", "0.5", "1e-400",
                                          "00", "1e18", "9223372036854775807",
                                          "9223372036854775808", "18446744073709551616"};
static const uint32_t odd_words[] = {0, 1, 0x7fffffff, 0x80000000, 0xffffffff, 0x10000, 0xffff,
                                     20240520, 20240801, 0x01000000};

// Replaces a number in the text after `at`, if there is one.
static void input_number(Input *x, size_t at, const char *number) {
    while (at < x->n && (x->s[at] < '0' || x->s[at] > '9')) at++;
    size_t end = at;
    while (end < x->n && x->s[end] >= '0' && x->s[end] <= '9') end++;
    if (end > at) input_replace(x, at, end - at, number, strlen(number));
}

// Applies one mutation, chosen by four random words.
static void input_mutate(Input *x, const Corpus *c, const uint32_t w[4]) {
    const size_t at = x->n ? w[1] % x->n : 0, length = x->n ? w[2] % 32 % (x->n - at) + 1 : 0;
    const Text *other = &c->file[w[3] % (uint32_t)c->n];
    const uint32_t word = odd_words[w[3] % (sizeof odd_words / sizeof *odd_words)];
    char bytes[40];
    if (!x->n) return;
    switch (w[0] % 10) {
    case 0: case 1: x->s[at] ^= (char)(1 << w[2] % 8); break;
    case 2: x->s[at] = (char)w[2]; break;
    case 3: x->n = at; break;
    case 4: input_replace(x, at, length, "", 0); break;
    case 5: memcpy(bytes, x->s + at, length), input_replace(x, at, 0, bytes, length); break;
    case 6: input_replace(x, at, x->n - at, other->s + w[2] % (other->n + 1),
                          other->n - w[2] % (other->n + 1)); break;
    case 7: case 8: input_number(x, at,
                                 odd_numbers[w[2] % (sizeof odd_numbers / sizeof *odd_numbers)]);
                                 break;
    default:
        comm_put32((unsigned char *)bytes, word);
        if (x->n >= 4) memcpy(x->s + (at & ~(size_t)3) % (x->n - 3), bytes, 4);
    }
}

static void replay_parser(const FuzzParser *parser, const char *root, uint32_t mutations) {
    static Corpus c;
    static Input x;
    char *dir = xprintf("%s/%s", root, parser->name);
    uint32_t accepted = 0, good = 0;
    corpus_read(&c, dir);
    for (int i = 0; i < c.n; i++) {
        snprintf(fuzz.input, sizeof fuzz.input, "%s/%.200s", dir, c.name[i]);
        good += (uint32_t)replay_run(parser, c.file[i].s, c.file[i].n);
    }
    for (uint32_t m = 0; m < mutations; m++) {
        const int i = (int)(m % (uint32_t)c.n);
        const uint32_t changes = 1 + rng_words(1, STREAM_TEST, m, 0, PER_MUTATION).v[0] %
            PER_MUTATION;
        snprintf(fuzz.input, sizeof fuzz.input, "%s/%.200s, mutation %u", dir, c.name[i], m);
        x.n = 0;
        input_replace(&x, 0, 0, c.file[i].s, c.file[i].n);
        for (uint32_t k = 0; k < changes; k++)
            input_mutate(&x, &c, rng_words(1, STREAM_TEST, m, (uint32_t)i, k).v);
        accepted += (uint32_t)replay_run(parser, x.s, x.n);
    }
    printf("%-12s %3d files, %u accepted; %u mutations, %u accepted\n", parser->name, c.n, good,
           mutations, accepted);
    corpus_free(&c);
    free(dir);
}

static void replay_file(const FuzzParser *parser, const char *path) {
    FileMap map;
    const char *error = file_map(&map, path);
    if (error) die("cannot read %s: %s", path, error);
    snprintf(fuzz.input, sizeof fuzz.input, "%.500s", path);
    printf("%s: %s\n", path, replay_run(parser, (const char *)map.data, map.size) ? "accepted"
           : "refused");
    file_unmap(&map);
}

int main(int argc, char **argv) {
    const char *root = "dev/fuzz/corpus";
    uint32_t mutations = 2000;
    int named = 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int i = 1; i < argc; i++) {
        const FuzzParser *parser = fuzz_find(argv[i]);
        if (!strcmp(argv[i], "--mutations") && i + 1 < argc)
            mutations = (uint32_t)strtoul(argv[++i], NULL, 10);
        else if (!strcmp(argv[i], "--corpus") && i + 1 < argc) root = argv[++i];
        else if (!strcmp(argv[i], "--write-seeds") && i + 1 < argc)
            seeds_write(argv[++i]), named = 1;
        else if (!strcmp(argv[i], "--list")) {
            for (int k = 0; k < N_FUZZ_PARSERS; k++) puts(fuzz_parsers[k].name);
            named = 1;
        } else if (!parser) {
            fprintf(stderr, "usage: fuzz_replay [--mutations N] [--corpus DIR] [PARSER [FILE...]]\n"
                            "       fuzz_replay --list | --write-seeds DIR\n");
            return 2;
        } else if (i + 1 < argc && !fuzz_find(argv[i + 1]) && argv[i + 1][0] != '-') {
            while (i + 1 < argc) replay_file(parser, argv[++i]);
            named = 1;
        } else replay_parser(parser, root, mutations), named = 1;
    }
    for (int i = 0; i < N_FUZZ_PARSERS && !named; i++)
        replay_parser(&fuzz_parsers[i], root, mutations);
    return 0;
}
