// faults.h: what files.h calls before each disk operation when built with -DFAULTS: it counts the
// calls, and at one of them fails, kills the process, or cuts the power. Set `faults` before the
// first call.
//
// A power cut is simulated on the files themselves, as adversely as POSIX allows: of a file that
// was not synced, everything written after its last sync is lost except half; a name that was
// created or moved is restored to its old state if its directory has not been synced since. (For
// names that replaced others, like `latest`, only the new state is simulated.)
#ifndef FAULTS_H
#define FAULTS_H

#include "../check.h"
#include <signal.h>

enum { FAULT_NONE, FAULT_KILL, FAULT_HALF, FAULT_POWER, FAULT_ERROR, FAULT_SHORT };
// KILL: before the call. HALF: in the middle of a write, if it is one. POWER: like KILL, and see
// above. ERROR: fails with `error`. SHORT: like ERROR, but a write first writes half.

enum { FAULTS_OPEN = 256, FAULTS_NAMES = 256, FAULTS_PATH = 512 };
// from: "" for one that was created
typedef struct { char from[FAULTS_PATH], to[FAULTS_PATH]; } FaultName;

typedef struct {
    int64_t calls, at, last;       // calls so far; faults from call `at` to call `last`, counted
                                   // from 1
    int mode, error;
    FILE *log;                     // receives "NUMBER CALL PATH" for each, unless NULL
    int files, names;
    struct { int fd; off_t synced; } file[FAULTS_OPEN];
    FaultName name[FAULTS_NAMES];  // since their directory's last sync
} Faults;

static Faults faults;

static inline void faults_kill(void) {
    if (faults.log) fflush(faults.log);
    raise(SIGKILL);
}

static inline void faults_power(void) {
    for (int i = 0; i < faults.files; i++) {
        struct stat st;
        if (fstat(faults.file[i].fd, &st)) continue;
        const off_t lost = st.st_size - faults.file[i].synced;
        if (lost > 0 && ftruncate(faults.file[i].fd, faults.file[i].synced + lost / 2))
            perror("ftruncate");
    }
    while (faults.names > 0) {
        const FaultName *n = &faults.name[--faults.names];
        if (*n->from ? rename(n->to, n->from) : unlink(n->to)) perror(n->to);
    }
    faults_kill();
}

// Counts a call. Returns the mode of its fault.
static inline int faults_meet(const char *call, const char *path) {
    faults.calls++;
    if (faults.log) fprintf(faults.log, "%lld %s %s\n", (long long)faults.calls, call, path);
    if (!faults.mode || faults.calls < faults.at || faults.calls > faults.last) return FAULT_NONE;
    if (faults.mode == FAULT_POWER) faults_power();
    if (faults.mode == FAULT_KILL || (faults.mode == FAULT_HALF && strcmp(call, "write")))
        faults_kill();
    errno = faults.error;
    return faults.mode;
}

static inline int faults_fail(const char *call, const char *path) {
    return faults_meet(call, path) != FAULT_NONE;
}

static inline ssize_t faults_write(int fd, const char *path, const void *bytes, size_t n) {
    const int mode = faults_meet("write", path);
    if (mode == FAULT_ERROR || (mode == FAULT_SHORT && n < 2)) return -1;
    if (mode == FAULT_HALF) {
        if (write(fd, bytes, n / 2) < 0) perror(path);
        faults_kill();
    }
    return (ssize_t)(mode == FAULT_SHORT ? n / 2 : n);
}

// A directory's names, or a file's bytes, are safe now. The disk itself is not synced: it is not
// being tested.
static inline int faults_sync(int fd) {
    struct stat st, other;
    int kept = 0;
    if (fstat(fd, &st)) return -1;
    for (int i = 0; i < faults.files; i++)
        if (!fstat(faults.file[i].fd, &other) && other.st_ino == st.st_ino)
            faults.file[i].synced = st.st_size;
    for (int i = 0; i < faults.names; i++) {
        char *to = xstrdup(faults.name[i].to), *slash = strrchr(to, '/');
        if (slash) *slash = 0;
        if (stat(slash ? to : ".", &other) || other.st_ino != st.st_ino)
            faults.name[kept++] = faults.name[i];
        free(to);
    }
    faults.names = kept;
    return 0;
}

static inline void faults_note(const char *from, const char *to) {
    CHECK(faults.names < FAULTS_NAMES && strlen(from) < FAULTS_PATH && strlen(to) < FAULTS_PATH,
          "too many names: %s", to);
    FaultName *n = &faults.name[faults.names++];
    strcpy(n->from, from);
    strcpy(n->to, to);
}

// Before a rename: the contents of a moved directory move with it; a replaced name is not recorded.
static inline void faults_renamed(const char *from, const char *to) {
    const size_t n = strlen(from);
    for (int i = 0; i < faults.names; i++) {
        FaultName *name = &faults.name[i];
        if (strncmp(name->to, from, n) || (name->to[n] && name->to[n] != '/')) continue;
        char *moved = xprintf("%s%s", to, name->to + n);
        CHECK(strlen(moved) < FAULTS_PATH, "%s", moved);
        if (!name->to[n] && path_exists(to)) *name = faults.name[--faults.names], i--;
        else strcpy(name->to, moved);
        free(moved);
    }
    if (path_is_directory(from) && !path_exists(to)) faults_note(from, to);
}

// Records a file open for writing, and its present size.
static inline void faults_opened(int fd, FILE *f, const char *path) {
    struct stat st;
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) return;
    if (f) setvbuf(f, NULL, _IONBF, 0);                  // each write is a call
    CHECK(faults.files < FAULTS_OPEN, "too many files: %s", path);
    faults.file[faults.files].fd = dup(fd);
    faults.file[faults.files++].synced = st.st_size;
    if (!st.st_size) faults_note("", path);
}

#define FAULT(call, path)               faults_fail(call, path)
#define FAULT_WRITE(fd, path, bytes, n) faults_write(fd, path, bytes, n)
#define FAULT_SYNC(fd)                  faults_sync(fd)
#define FAULT_OPENED(fd, f, path)       faults_opened(fd, f, path)
#define FAULT_RENAMED(from, to)         faults_renamed(from, to)

#endif
