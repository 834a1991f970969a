// bytes.c: converts text files to token shards whose tokens are bytes, for `--preset tiny` and any
// model with a vocabulary of 257: token b is byte b, token 256 ends a document.
//
//     cc -O2 -o build/data_bytes data/bytes.c -lm
//     build/data_bytes --out data/text book.txt
//     build/data_bytes --out data/headers --ext .h --max-bytes 4000000 /usr/include
#include "../dev/check.h"
#include "../dev/files/files.h"
#include "../dev/run/program.h"
#include "../dev/files/sha256.h"
#include "../dev/files/shards.h"
#include "../dev/files/tokenizer.h"
#include <dirent.h>

static const char help[] =
    "usage: data_bytes --out DIR [options] PATH...\n"
    "Writes the bytes of text files as token shards: DIR/train_000000.bin, ..., "
    "DIR/val_000000.bin,\n"
    "... and DIR/tokenizer.bin, replacing those of an earlier run on the same PATHs. A PATH is a "
    "file,\n"
    "a pipe, - for standard input, or a directory to be walked; links, hidden names, empty files "
    "and\n"
    "files with a zero byte in their first 8 KiB are skipped. A byte-order mark is removed.\n"
    "\n"
    "  --out DIR         output directory; created if missing\n"
    "  --val F           fraction of the bytes for validation, 0 to 0.5 (default 0.1). Of a "
    "single\n"
    "                    file: its end. Of several: whole files, chosen by the SHA-256 of their "
    "names\n"
    "                    and thus independent of the order of the PATHs\n"
    "  --shard-tokens N  begin a new shard after N tokens (default: as many as one can hold)\n"
    "  --ext .h,.c       from directories, take only files with one of these endings\n"
    "  --max-bytes N     of a single file: its first N bytes. Of several: as many files as fit,\n"
    "                    chosen by the SHA-256 of their names\n"
    "  --replace         also replace shards made from other PATHs\n"
    "  -h, --help        print this\n"
    "  --version         print version, commit and compiler\n"
    "\n"
    "N is a whole number, which may be written 1e6.\n"
    "Each file is a document and ends with the end-of-text token, 256. A single file gets none.\n";

// ---- Options ----

typedef struct {
    const char *out, *extensions;
    double val;
    int64_t shard_tokens, max_bytes;                     // 0: no limit
    char **path;                                         // (n)
    int n, replace;
} Options;

// The value of option `name` if argv[*i] is that option, as "--name value" or "--name=value"; else
// NULL.
static const char *option_value(char **argv, int *i, const char *name) {
    size_t n = strlen(name);
    if (strncmp(argv[*i], name, n)) return NULL;
    if (argv[*i][n] == '=') return argv[*i] + n + 1;
    if (argv[*i][n]) return NULL;
    if (!argv[*i + 1]) die("%s needs a value\n  hint: --help", name);
    return argv[++*i];
}

static int64_t option_count(const char *name, const char *value) {
    int64_t v;
    if (whole_read(&v, value) != WHOLE_OK || v < 1)
        die("%s %s: a whole number of at least 1 is needed", name, value);
    return v;
}

static double option_fraction(const char *name, const char *value) {
    char *end;
    double v = strtod(value, &end);
    if (end == value || *end || !(v >= 0 && v <= 0.5))
        die("%s %s: a number from 0 to 0.5 is needed", name, value);
    return v;
}

static void NORETURN print_and_exit(const char *text) {
    fputs(text, stdout);
    exit(0);
}

static Options options_parse(char **argv) {
    Options o = {NULL, NULL, 0.1, 0, 0, NULL, 0, 0};
    const char *value;
    for (int i = 1; argv[i]; i++) {
        if (!strcmp(argv[i], "--help") || !strcmp(argv[i], "-h")) print_and_exit(help);
        if (!strcmp(argv[i], "--version")) {
            Text version = {NULL, 0, 0};
            program_version(&version, "data_bytes", NULL);
            print_and_exit(version.s);
        }
        if ((value = option_value(argv, &i, "--out"))) o.out = value;
        else if ((value = option_value(argv, &i, "--ext"))) o.extensions = value;
        else if ((value = option_value(argv, &i, "--val"))) o.val = option_fraction("--val", value);
        else if ((value = option_value(argv, &i, "--shard-tokens")))
            o.shard_tokens = option_count("--shard-tokens", value);
        else if ((value = option_value(argv, &i, "--max-bytes")))
            o.max_bytes = option_count("--max-bytes", value);
        else if (!strcmp(argv[i], "--replace")) o.replace = 1;
        else if (argv[i][0] == '-' && argv[i][1])
            die("unknown option %s\n  hint: --help lists the options", argv[i]);
        else {
            o.path = (char **)xrealloc(o.path, (size_t)o.n + 1, sizeof *o.path);
            o.path[o.n++] = argv[i];
        }
    }
    if (!o.out) die("--out is missing: the directory for the shards\n  hint: --help");
    if (!o.n) die("no text is given\n  hint: list files or directories after the options");
    return o;
}

// ---- Finding documents ----

typedef struct {
    char *path, *name;      // name: path relative to the PATH that it was found in
    char hash[SHA256_HEX];  // of the name
    int64_t size;           // of its text, without the byte-order mark
    size_t mark;            // bytes of that mark
    Text held;              // the content of a pipe, which can be read only once
    int val;
} Document;

typedef struct {
    Document *doc;                                       // (n)
    size_t n;
    int64_t bytes;
    int binary, empty;                                   // files skipped
} Documents;

// Gives the bytes of a document in map; release with document_close. Returns NULL, or what is
// wrong.
static const char *document_open(FileMap *map, const char *path, const Text *held) {
    if (!held->s) return file_map(map, path);
    map->data = (const unsigned char *)held->s;
    map->size = held->n;
    return NULL;
}

static void document_close(FileMap *map, const Text *held) {
    if (!held->s) file_unmap(map);
}

// Reads a pipe, or standard input for "-", to its end; returns nothing if path is neither.
static Text read_pipe(const char *path) {
    Text all = {NULL, 0, 0};
    struct stat st;
    char part[1 << 14];
    const int in = !strcmp(path, "-");
    if (!in && (stat(path, &st) || !S_ISFIFO(st.st_mode))) return all;
    FILE *f = in ? stdin : fopen(path, "rb");
    if (!f) die("cannot read %s: %s", path, strerror(errno));
    text_append(&all, "", 0);
    for (size_t n; (n = fread(part, 1, sizeof part, f)) > 0;) text_append(&all, part, n);
    if (ferror(f)) die("cannot read %s: %s", path, strerror(errno));
    if (!in) fclose(f);
    return all;
}

// Adds a document. named: given by the user, not found in a directory.
static void documents_add(Documents *d, const char *path, const char *name, int named) {
    FileMap map;
    Text held = {NULL, 0, 0};
    if (named) held = read_pipe(path);
    const char *error = document_open(&map, path, &held);
    if (error) die("cannot read %s: %s", path, error);
    if (lfs_pointer_error(map.data, map.size))
        die("%s: %s", path, lfs_pointer_error(map.data, map.size));
    const int packed = map.size >= 2 && !memcmp(map.data, "\x1F\x8B", 2);
    if (packed && named)
        die("%s is compressed\n  hint: zcat FILE | data_bytes --out DIR -, or data/prepare.py",
            path);
    const int binary = packed ||
        (map.size && memchr(map.data, 0, map.size < 8192 ? map.size : 8192) != NULL);
    const size_t mark = map.size >= 3 && !memcmp(map.data, "\xEF\xBB\xBF", 3) ? 3 : 0;
    d->binary += binary;
    d->empty += map.size == mark;
    if (map.size > mark && !binary) {
        d->doc = (Document *)xrealloc(d->doc, d->n + 1, sizeof *d->doc);
        Document *doc = &d->doc[d->n++];
        memset(doc, 0, sizeof *doc);
        doc->path = xstrdup(path);
        doc->name = xstrdup(name);
        doc->size = (int64_t)(map.size - mark);
        doc->mark = mark;
        doc->held = held;
        sha256_hex(doc->hash, name, strlen(name));
        d->bytes += doc->size;
        document_close(&map, &held);
    } else {
        document_close(&map, &held);
        text_free(&held);
    }
}

static int has_extension(const char *name, const char *extensions) {
    if (!extensions) return 1;
    for (const char *e = extensions; ; e++) {
        size_t n = strcspn(e, ","), length = strlen(name);
        if (n && length > n && !memcmp(name + length - n, e, n)) return 1;
        e += n;
        if (!*e) return 0;
    }
}

static int is_visible(const struct dirent *entry) { return entry->d_name[0] != '.'; }
static int by_entry_name(const struct dirent **a, const struct dirent **b) {
    return strcmp((*a)->d_name, (*b)->d_name);
}

// Adds the files below a directory, sorted by name; `name` is the directory's relative name, "" at
// the top.
static void documents_walk(Documents *d, const char *directory, const char *name,
                           const char *extensions) {
    struct dirent **entry;
    int n = scandir(directory, &entry, is_visible, by_entry_name);
    if (n < 0) die("cannot read directory %s: %s", directory, strerror(errno));
    for (int i = 0; i < n; i++) {
        char *path = xprintf("%s/%s", directory, entry[i]->d_name);
        char *within = xprintf("%s%s%s", name, *name ? "/" : "", entry[i]->d_name);
        struct stat st;
        if (lstat(path, &st)) die("cannot read %s: %s", path, strerror(errno));
        if (S_ISDIR(st.st_mode)) documents_walk(d, path, within, extensions);
        else if (S_ISREG(st.st_mode) && has_extension(within, extensions))
            documents_add(d, path, within, 0);
        free(path);
        free(within);
        free(entry[i]);
    }
    free(entry);
}

static Documents documents_find(const Options *o) {
    Documents d = {NULL, 0, 0, 0, 0};
    for (int i = 0; i < o->n; i++) {
        const char *slash = strrchr(o->path[i], '/');
        if (path_is_directory(o->path[i])) documents_walk(&d, o->path[i], "", o->extensions);
        else documents_add(&d, o->path[i], slash ? slash + 1 : o->path[i], 1);
    }
    if (!d.n)
        die("no text was found (skipped: %d binary files, %d empty ones)", d.binary, d.empty);
    return d;
}

static void document_free(Document *doc) {
    free(doc->path);
    free(doc->name);
    text_free(&doc->held);
}

// ---- Choosing: in an order that depends on names only ----

static int by_hash(const void *a, const void *b) {
    const Document *x = (const Document *)a, *y = (const Document *)b;
    int order = strcmp(x->hash, y->hash);
    return order ? order : strcmp(x->path, y->path);
}

static int by_name(const void *a, const void *b) {
    const Document *x = (const Document *)a, *y = (const Document *)b;
    int order = strcmp(x->name, y->name);
    return order ? order : strcmp(x->path, y->path);
}

// Keeps as many documents, in the order of their hashes, as fit in max_bytes.
static void documents_limit(Documents *d, int64_t max_bytes) {
    size_t n = 0;
    d->bytes = 0;
    if (d->n == 1 && d->doc[0].size > max_bytes) d->doc[0].size = max_bytes;
    for (size_t i = 0; i < d->n; i++) {
        Document doc = d->doc[i];
        if (doc.size <= max_bytes - d->bytes) {
            d->bytes += doc.size;
            d->doc[n++] = doc;
        } else document_free(&doc);
    }
    d->n = n;
    if (!n) die("--max-bytes %lld: every file is larger", (long long)max_bytes);
}

// Marks for validation, in the order of the hashes, every document that brings their bytes nearer
// to the fraction; the smallest one if none does. With a fraction of at most one half, some
// document is always left for training.
static void documents_split(Documents *d, double fraction) {
    double wanted = fraction * (double)d->bytes, marked = 0;
    if (fraction == 0) return;
    Document *smallest = &d->doc[0];
    for (size_t i = 0; i < d->n; i++) {
        Document *doc = &d->doc[i];
        if (doc->size < smallest->size) smallest = doc;
        doc->val = marked + 0.5 * (double)doc->size < wanted;
        if (doc->val) marked += (double)doc->size;
    }
    if (marked == 0) smallest->val = 1;
}

// ---- Writing ----

static void append_bytes(ShardWriter *w, const unsigned char *bytes, size_t n) {
    int tokens[4096];
    for (size_t at = 0, m; at < n; at += m) {
        m = n - at < 4096 ? n - at : 4096;
        for (size_t i = 0; i < m; i++) tokens[i] = bytes[at + i];
        shard_writer_append(w, tokens, m);
    }
}

// A single document is split as in nanoGPT: the first int(0.9 n) bytes for training, the rest for
// validation.
static void write_documents(ShardWriter *train, ShardWriter *val, const Documents *d,
                            double fraction) {
    const int end_of_text = TOKENIZER_BYTES_EOT;
    for (size_t i = 0; i < d->n; i++) {
        const Document *doc = &d->doc[i];
        FileMap map;
        const char *error = document_open(&map, doc->path, &doc->held);
        if (!error && (int64_t)map.size < doc->size + (int64_t)doc->mark)
            error = "it was truncated meanwhile";
        if (error) die("cannot read %s: %s", doc->path, error);
        const unsigned char *text = map.data + doc->mark;
        size_t size = (size_t)doc->size, head = (size_t)((1 - fraction) * (double)size);
        if (d->n == 1) {
            append_bytes(train, text, head);
            append_bytes(val, text + head, size - head);
        } else {
            append_bytes(doc->val ? val : train, text, size);
            shard_writer_append(doc->val ? val : train, &end_of_text, 1);
        }
        document_close(&map, &doc->held);
    }
}

// The locations of the PATHs, one per line: stored in DIR/sources.txt, by which a later run
// recognizes its own shards.
static Text sources_of(const Options *o) {
    Text sources = {NULL, 0, 0};
    for (int i = 0; i < o->n; i++) {
        char *real = realpath(o->path[i], NULL);
        text_printf(&sources, "%s\n", real ? real : o->path[i]);
        free(real);
    }
    return sources;
}

static int file_holds(const char *path, const Text *text) {
    FileMap map;
    if (file_map(&map, path)) return 0;
    const int same = map.size == text->n && !memcmp(map.data, text->s, text->n);
    file_unmap(&map);
    return same;
}

// Dies if the directory has shards or a tokenizer file that this program did not make, or made from
// other PATHs.
static void refuse_foreign(const Options *o, const char *sources_path, const Text *sources) {
    const char *out = o->out;
    char *tokenizer = xprintf("%s/tokenizer.bin", out),
        *manifest = xprintf("%s/manifest.json", out);
    char *progress = xprintf("%s/progress.json", out);
    char *shard[2] = {xprintf("%s/train_000000.bin", out), xprintf("%s/val_000000.bin", out)};
    const int shards = path_exists(shard[0]) || path_exists(shard[1]);
    Text ours = {NULL, 0, 0};
    tokenizer_bytes_file(&ours);
    if (path_exists(manifest) || path_exists(progress))
        die("%s holds data of data/prepare.py\n  hint: choose another --out", out);
    if (path_exists(tokenizer) && !file_holds(tokenizer, &ours))
        die("%s belongs to another tokenizer\n  hint: choose another --out", tokenizer);
    // an interrupted run leaves them without a tokenizer
    const int again = file_holds(sources_path, sources);
    if (shards && !path_exists(tokenizer) && !again)
        die("%s has shards of another tokenizer\n  hint: choose another --out", out);
    if (shards && !o->replace && !again)
        die("%s holds shards of another text\n  hint: choose another --out, or --replace them",
            out);
    text_free(&ours);
    free(shard[0]), free(shard[1]);
    free(tokenizer), free(manifest), free(progress);
}

// Finishes a split, removes surplus shards of an earlier run, and prints a summary.
static void finish(ShardWriter *w, const char *out, const char *split) {
    int shards = w->shards + (w->f != NULL);
    long long tokens = (long long)w->total;
    shard_writer_close(w);
    for (int i = shards; ; i++) {
        char *old = xprintf("%s/%s_%06d.bin", out, split, i);
        int failed = unlink(old);
        if (failed && errno != ENOENT) die("cannot remove %s: %s", old, strerror(errno));
        free(old);
        if (failed) break;
    }
    printf("  %-5s %12lld tokens in %d shard%s: %s/%s_*.bin\n", split, tokens, shards,
           shards == 1 ? "" : "s", out, split);
}

int main(int argc, char **argv) {
    (void)argc;
    files_begin();
    Options o = options_parse(argv);
    Documents d = documents_find(&o);
    int found = (int)d.n;
    qsort(d.doc, d.n, sizeof *d.doc, by_hash);
    if (o.max_bytes) documents_limit(&d, o.max_bytes);
    documents_split(&d, o.val);
    qsort(d.doc, d.n, sizeof *d.doc, by_name);

    directory_make(o.out);
    char *sources_path = xprintf("%s/sources.txt", o.out);
    Text sources = sources_of(&o);
    refuse_foreign(&o, sources_path, &sources);
    file_write_whole(sources_path, sources.s, sources.n);
    char *tokenizer = xprintf("%s/tokenizer.bin", o.out);
    char *prefix[2] = {xprintf("%s/train", o.out), xprintf("%s/val", o.out)};
    ShardWriter train, val;
    shard_writer_open(&train, prefix[0], TOKENIZER_BYTES_V, o.shard_tokens);
    shard_writer_open(&val, prefix[1], TOKENIZER_BYTES_V, o.shard_tokens);
    write_documents(&train, &val, &d, o.val);

    printf("%zu of %d text files, %lld bytes (skipped: %d binary, %d empty)\n",
           d.n, found, (long long)d.bytes, d.binary, d.empty);
    finish(&train, o.out, "train");
    finish(&val, o.out, "val");
    tokenizer_write_bytes(tokenizer);                    // last: it marks the data as complete
    printf("  tokenizer of %d tokens: %s\n", TOKENIZER_BYTES_V, tokenizer);

    for (size_t i = 0; i < d.n; i++) document_free(&d.doc[i]);
    free(d.doc);
    text_free(&sources);
    free(sources_path);
    free(o.path);
    free(tokenizer);
    free(prefix[0]);
    free(prefix[1]);
    return 0;
}
