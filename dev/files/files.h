// files.h: every call by which this project changes the disk, in one place, so that a test can make each one fail or be the
// process' last: dev/torture/. Elsewhere the FAULT macros are nothing and these are the plain calls.
//
//   file_try_..., directory_try_...   return NULL, or what is wrong, from malloc
//   file_..., directory_...           die with it
#ifndef FILES_H
#define FILES_H

#include "../check.h"
#include <sys/mman.h>
#include <sys/stat.h>

// ---- Reading ----

// A file to read, -1 with errno: never waits for one at the other end of a pipe, nor reaches a child.
static inline int file_open_read(const char *path) { return open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC); }

// A file mapped read-only. An empty file has data NULL and size 0.
typedef struct { const unsigned char *data; size_t size; } FileMap;

// Maps path. Returns NULL, or what is wrong (errno's text); nothing to release after an error.
static inline const char *file_map(FileMap *map, const char *path) {
    map->data = NULL;
    map->size = 0;
    const int fd = file_open_read(path);
    if (fd < 0) return strerror(errno);
    struct stat st;
    const char *error = NULL;
    if (fstat(fd, &st)) error = strerror(errno);
    else if (!S_ISREG(st.st_mode)) error = "not a regular file";
    else if (st.st_size > 0) {
        void *p = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (p == MAP_FAILED) error = strerror(errno);
        else {
            map->data = (const unsigned char *)p;
            map->size = (size_t)st.st_size;
        }
    }
    close(fd);
    return error;
}

static inline void file_unmap(FileMap *map) {
    if (map->data) munmap((void *)(uintptr_t)map->data, map->size);
    map->data = NULL;
    map->size = 0;
}

// What is wrong with a file that Git LFS has left as a pointer to its content; NULL for every other file.
static inline const char *lfs_pointer_error(const void *mem, size_t size) {
    static const char begin[] = "version https://git-lfs.github.com/spec/";
    if (size < sizeof begin - 1 || memcmp(mem, begin, sizeof begin - 1)) return NULL;
    return "a Git LFS pointer, not the file itself\n  hint: git lfs pull gets the content";
}

static inline int path_exists(const char *path) {
    struct stat st;
    return lstat(path, &st) == 0;
}

// The same, where a wrong answer would lose something: dies if it cannot be known.
static inline int path_must_exist_or_not(const char *path) {
    struct stat st;
    if (lstat(path, &st) == 0) return 1;
    if (errno != ENOENT && errno != ENOTDIR) die("cannot look at %s: %s\n  hint: try again when it can be", path, strerror(errno));
    return 0;
}

// Whether a path still leads to what is open as fd. What cannot be looked at now counts as the same: a
// write will tell.
enum { PATH_SAME, PATH_GONE, PATH_OTHER };

static inline int path_leads_to(const char *path, int fd, int follow_link) {
    struct stat there, held;
    if (follow_link ? stat(path, &there) : lstat(path, &there))
        return errno == ENOENT || errno == ENOTDIR ? PATH_GONE : PATH_SAME;
    if (fstat(fd, &held)) return PATH_SAME;
    return there.st_dev == held.st_dev && there.st_ino == held.st_ino ? PATH_SAME : PATH_OTHER;
}

// A directory itself, not a link to one.
static inline int path_is_own_directory(const char *path) {
    struct stat st;
    return lstat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

static inline int path_is_directory(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

// A program that was started without standard input, output or error (a shell's ">&-") would give their numbers to the next
// files that it opens, and its words would end up in those. Each gets /dev/null, to read: what is written there fails.
static inline void files_begin(void) {
    int fd;
    do fd = open("/dev/null", O_RDONLY);                 // the lowest number that is free
    while (fd >= 0 && fd <= 2);
    if (fd > 2) close(fd);
}

// ---- The calls that change the disk ----

#ifdef FAULTS
#include "../torture/faults.h"
#else
#define FAULT(call, path)               0                // whether this call is to fail; errno says how
#define FAULT_WRITE(fd, path, bytes, n) ((ssize_t)(n))   // how many of the bytes are to be written; -1: as FAULT
#define FAULT_SYNC(fd)                  fsync(fd)
#define FAULT_OPENED(fd, f, path)       ((void)0)
#define FAULT_RENAMED(from, to)         ((void)0)
#endif

static inline int disk_sync(int fd, const char *path) {
    (void)path;
    return FAULT("fsync", path) ? -1 : FAULT_SYNC(fd);
}

static inline int disk_mkdir(const char *path) { return FAULT("mkdir", path) ? -1 : mkdir(path, 0777); }
static inline int disk_rmdir(const char *path) { return FAULT("rmdir", path) ? -1 : rmdir(path); }
static inline int disk_unlink(const char *path) { return FAULT("unlink", path) ? -1 : unlink(path); }

static inline int disk_symlink(const char *target, const char *path) {
    return FAULT("symlink", path) ? -1 : symlink(target, path);
}

static inline int disk_rename(const char *from, const char *to) {
    if (FAULT("rename", to)) return -1;
    FAULT_RENAMED(from, to);
    return rename(from, to);
}

static inline int disk_open(const char *path, int flags) {
    const int fd = FAULT("open", path) ? -1 : open(path, flags, 0666);
    if (fd >= 0) FAULT_OPENED(fd, NULL, path);
    return fd;
}

static inline FILE *disk_fopen(const char *path, const char *mode) {
    FILE *f = FAULT("open", path) ? NULL : fopen(path, mode);
    if (f) FAULT_OPENED(fileno(f), f, path);
    return f;
}

// A new file, to be renamed into place later: what has its name goes, and is never written to, whatever it is or links to.
static inline FILE *disk_fopen_new(const char *path) {
    if (disk_unlink(path) && errno != ENOENT) return NULL;
    const int fd = disk_open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC);
    FILE *f = fd < 0 ? NULL : fdopen(fd, "wb");
    if (f) FAULT_OPENED(fd, f, path);
    return f;
}

// The number of bytes written, as write and fwrite count.
static inline ssize_t disk_write(int fd, const char *path, const void *bytes, size_t n) {
    (void)path;
    const ssize_t m = FAULT_WRITE(fd, path, bytes, n);
    return m < 0 ? -1 : write(fd, bytes, (size_t)m);
}

static inline size_t disk_fwrite(FILE *f, const char *path, const void *bytes, size_t n) {
    (void)path;
    const ssize_t m = FAULT_WRITE(fileno(f), path, bytes, n);
    const size_t done = m < 0 ? 0 : fwrite(bytes, 1, (size_t)m, f);
    if (m >= 0 && (size_t)m < n) errno = ENOSPC;
    return done;
}

// ---- Changing files: NULL, or what is wrong, from malloc ----

// Of several errors the first is kept.
static inline void files_keep(char **error, char *other) {
    if (!*error) *error = other;
    else free(other);
}

static inline char *file_try_open(FILE **f, const char *path, const char *mode) {
    *f = disk_fopen(path, mode);
    return *f ? NULL : xprintf("cannot open %s: %s", path, strerror(errno));
}

static inline char *file_try_open_new(FILE **f, const char *path) {
    *f = disk_fopen_new(path);
    return *f ? NULL : xprintf("cannot open %s: %s", path, strerror(errno));
}

static inline char *file_try_write(FILE *f, const char *path, const void *bytes, size_t n) {
    return n && disk_fwrite(f, path, bytes, n) != n ? xprintf("cannot write %s: %s", path, strerror(errno)) : NULL;
}

// Flushes to the disk, and closes in any case.
static inline char *file_try_sync_close(FILE *f, const char *path) {
    char *error = NULL;
    if (fflush(f) || disk_sync(fileno(f), path)) error = xprintf("cannot write %s: %s", path, strerror(errno));
    const int closed = FAULT("close", path) ? (void)fclose(f), EOF : fclose(f);
    if (closed && !error) error = xprintf("cannot write %s: %s", path, strerror(errno));
    return error;
}

static inline char *file_try_rename(const char *from, const char *to) {
    return disk_rename(from, to) ? xprintf("cannot rename %s to %s: %s", from, to, strerror(errno)) : NULL;
}

// Makes a directory and its missing parents, as mkdir -p.
static inline char *directory_try_make(const char *path) {
    char *p = xstrdup(path), *error = NULL;
    for (size_t i = *p != 0; !error; i++) {
        const char c = p[i];
        if (c && c != '/') continue;
        p[i] = 0;
        if (disk_mkdir(p) && errno != EEXIST) error = xprintf("cannot make directory %s: %s", p, strerror(errno));
        p[i] = c;
        if (!c) break;
    }
    if (!error && !path_is_directory(p)) error = xprintf("%s is in the way: a directory is needed there", p);
    free(p);
    return error;
}

// Makes the directory's entries (names, renames) durable.
static inline char *directory_try_sync(const char *path) {
    const int fd = disk_open(path, O_RDONLY);
    if (fd < 0) return xprintf("cannot open %s: %s", path, strerror(errno));
    char *error = NULL;                                  // EINVAL: this file system has no such thing
    if (disk_sync(fd, path) && errno != EINVAL) error = xprintf("cannot sync %s: %s", path, strerror(errno));
    close(fd);
    return error;
}

// Writes a whole file under a temporary name, syncs it and renames it into place: old or new, never half. What has that name
// and is no regular file (a link, a pipe) is replaced, not written to.
static inline char *file_try_replace(const char *path, const void *bytes, size_t n) {
    char *temporary = xprintf("%s.tmp", path);
    FILE *f;
    char *error = file_try_open_new(&f, temporary);
    if (!error) {
        error = file_try_write(f, temporary, bytes, n);
        files_keep(&error, file_try_sync_close(f, temporary));
        if (!error) error = file_try_rename(temporary, path);
        if (error) disk_unlink(temporary);
    }
    free(temporary);
    return error;
}

// The same for a path that a user has named: what is there and no regular file, as /dev/stdout, is written to.
static inline char *file_try_write_whole(const char *path, const void *bytes, size_t n) {
    struct stat st;
    FILE *f;
    if (stat(path, &st) || S_ISREG(st.st_mode)) return file_try_replace(path, bytes, n);
    char *error = file_try_open(&f, path, "wb");
    if (error) return error;
    error = file_try_write(f, path, bytes, n);
    if (fclose(f) && !error) error = xprintf("cannot write %s: %s", path, strerror(errno));
    return error;
}

// ---- The same, or the end of the program ----

static inline void files_die(char *error) {
    if (error) die("%s", error);
}

static inline FILE *file_open(const char *path, const char *mode) {
    FILE *f;
    files_die(file_try_open(&f, path, mode));
    return f;
}

static inline void file_write(FILE *f, const char *path, const void *bytes, size_t n) {
    files_die(file_try_write(f, path, bytes, n));
}

static inline void file_sync_close(FILE *f, const char *path) { files_die(file_try_sync_close(f, path)); }
static inline void file_rename(const char *from, const char *to) { files_die(file_try_rename(from, to)); }
static inline void directory_make(const char *path) { files_die(directory_try_make(path)); }
static inline void directory_sync(const char *path) { files_die(directory_try_sync(path)); }

static inline void file_replace(const char *path, const void *bytes, size_t n) {
    files_die(file_try_replace(path, bytes, n));
}

static inline void file_write_whole(const char *path, const void *bytes, size_t n) {
    files_die(file_try_write_whole(path, bytes, n));
}

#endif
