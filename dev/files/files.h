// files.h: every call that changes the disk, in one place, so that a test can make any of them fail
// or be the last one before the process dies (dev/torture/). Without FAULTS the macros expand to
// the plain calls.
//
//   file_try_..., directory_try_...   return NULL, or an error message from malloc
//   file_..., directory_...           die with that message
#ifndef FILES_H
#define FILES_H

#include "../check.h"
#include <sys/mman.h>
#include <sys/stat.h>

// ---- Reading ----

// Opens a file for reading; -1 with errno on failure. Never blocks on a pipe; closed on exec.
static inline int file_open_read(const char *path) {
    return open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
}

// A file mapped read-only. An empty file has data NULL and size 0.
typedef struct { const unsigned char *data; size_t size; } FileMap;

// Maps path. Returns NULL, or errno's text; after an error there is nothing to release.
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

// The error message if the contents are a Git LFS pointer instead of the file; NULL otherwise.
static inline const char *lfs_pointer_error(const void *mem, size_t size) {
    static const char begin[] = "version https://git-lfs.github.com/spec/";
    if (size < sizeof begin - 1 || memcmp(mem, begin, sizeof begin - 1)) return NULL;
    return "a Git LFS pointer, not the file itself\n  hint: git lfs pull gets the content";
}

static inline int path_exists(const char *path) {
    struct stat st;
    return lstat(path, &st) == 0;
}

// The same where a wrong answer could lose data: dies if it cannot be determined.
static inline int path_must_exist_or_not(const char *path) {
    struct stat st;
    if (lstat(path, &st) == 0) return 1;
    if (errno != ENOENT && errno != ENOTDIR)
        die("cannot inspect %s: %s\n  hint: retry once it is accessible", path, strerror(errno));
    return 0;
}

// Whether path still refers to the file open as fd. If that cannot be determined, PATH_SAME: the
// next write will report the problem.
enum { PATH_SAME, PATH_GONE, PATH_OTHER };

static inline int path_leads_to(const char *path, int fd, int follow_link) {
    struct stat there, held;
    if (follow_link ? stat(path, &there) : lstat(path, &there))
        return errno == ENOENT || errno == ENOTDIR ? PATH_GONE : PATH_SAME;
    if (fstat(fd, &held)) return PATH_SAME;
    return there.st_dev == held.st_dev && there.st_ino == held.st_ino ? PATH_SAME : PATH_OTHER;
}

// True for a directory itself, not for a link to one.
static inline int path_is_own_directory(const char *path) {
    struct stat st;
    return lstat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

static inline int path_is_directory(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

// A program started without standard input, output or error (a shell's ">&-") would reuse those
// descriptors for the next files it opens and print into them. Each missing one gets /dev/null,
// opened read-only so that writes to it fail.
static inline void files_begin(void) {
    int fd;
    do fd = open("/dev/null", O_RDONLY);                 // the lowest free descriptor
    while (fd >= 0 && fd <= 2);
    if (fd > 2) close(fd);
}

// ---- The calls that change the disk ----

#ifdef FAULTS
#include "../torture/faults.h"
#else
#define FAULT(call, path)               0                // whether this call shall fail; sets errno
#define FAULT_WRITE(fd, path, bytes, n) ((ssize_t)(n))   // how many bytes shall be written; -1: as
                                                         // FAULT
#define FAULT_SYNC(fd)                  fsync(fd)
#define FAULT_OPENED(fd, f, path)       ((void)0)
#define FAULT_RENAMED(from, to)         ((void)0)
#endif

static inline int disk_sync(int fd, const char *path) {
    (void)path;
    return FAULT("fsync", path) ? -1 : FAULT_SYNC(fd);
}

static inline int disk_mkdir(const char *path) {
    return FAULT("mkdir", path) ? -1 : mkdir(path, 0777);
}
static inline int disk_rmdir(const char *path) { return FAULT("rmdir", path) ? -1 : rmdir(path); }
static inline int disk_unlink(const char *path) {
    return FAULT("unlink", path) ? -1 : unlink(path);
}

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

// Creates a file that will be renamed into place. Whatever has its name is unlinked first, never
// written to, not even through a link.
static inline FILE *disk_fopen_new(const char *path) {
    if (disk_unlink(path) && errno != ENOENT) return NULL;
    const int fd = disk_open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC);
    FILE *f = fd < 0 ? NULL : fdopen(fd, "wb");
    if (f) FAULT_OPENED(fd, f, path);
    return f;
}

// Return values as for write and fwrite: what was written.
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

// ---- Changing files: NULL, or an error message from malloc ----

// Keeps the first of several errors.
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
    return n && disk_fwrite(f, path, bytes, n) != n ? xprintf("cannot write %s: %s", path,
                                                              strerror(errno)) : NULL;
}

// Flushes to the disk; closes in every case.
static inline char *file_try_sync_close(FILE *f, const char *path) {
    char *error = NULL;
    if (fflush(f) || disk_sync(fileno(f), path))
        error = xprintf("cannot write %s: %s", path, strerror(errno));
    const int closed = FAULT("close", path) ? (void)fclose(f), EOF : fclose(f);
    if (closed && !error) error = xprintf("cannot write %s: %s", path, strerror(errno));
    return error;
}

static inline char *file_try_rename(const char *from, const char *to) {
    return disk_rename(from, to) ? xprintf("cannot rename %s to %s: %s", from, to, strerror(errno))
        : NULL;
}

// Creates a directory and its missing parents, like mkdir -p.
static inline char *directory_try_make(const char *path) {
    char *p = xstrdup(path), *error = NULL;
    for (size_t i = *p != 0; !error; i++) {
        const char c = p[i];
        if (c && c != '/') continue;
        p[i] = 0;
        if (disk_mkdir(p) && errno != EEXIST)
            error = xprintf("cannot make directory %s: %s", p, strerror(errno));
        p[i] = c;
        if (!c) break;
    }
    if (!error && !path_is_directory(p))
        error = xprintf("%s is in the way: a directory is needed there", p);
    free(p);
    return error;
}

// Makes the directory's entries (names, renames) durable.
static inline char *directory_try_sync(const char *path) {
    const int fd = disk_open(path, O_RDONLY);
    if (fd < 0) return xprintf("cannot open %s: %s", path, strerror(errno));
    // EINVAL: this file system cannot sync directories
    char *error = NULL;
    if (disk_sync(fd, path) && errno != EINVAL)
        error = xprintf("cannot sync %s: %s", path, strerror(errno));
    close(fd);
    return error;
}

// Replaces a file atomically: writes a temporary file, syncs it and renames it into place. Anything
// at that path that is not a regular file (a link, a pipe) is replaced, not written to.
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

// The same for a path named by the user: an existing special file, such as /dev/stdout, is written
// to.
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

// ---- The same, dying on error ----

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

static inline void file_sync_close(FILE *f, const char *path) {
    files_die(file_try_sync_close(f, path));
}
static inline void file_rename(const char *from, const char *to) {
    files_die(file_try_rename(from, to));
}
static inline void directory_make(const char *path) { files_die(directory_try_make(path)); }
static inline void directory_sync(const char *path) { files_die(directory_try_sync(path)); }

static inline void file_replace(const char *path, const void *bytes, size_t n) {
    files_die(file_try_replace(path, bytes, n));
}

static inline void file_write_whole(const char *path, const void *bytes, size_t n) {
    files_die(file_try_write_whole(path, bytes, n));
}

#endif
