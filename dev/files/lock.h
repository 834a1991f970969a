// lock.h: one process at a time may write to a directory. The lock is an fcntl lock on DIR/.lock:
// it works over NFS, is not inherited by child processes, and ends with the process however that
// ends. The file itself stays.
#ifndef LOCK_H
#define LOCK_H

#include "files.h"
#include <signal.h>

// Locks an existing directory. Returns NULL and a descriptor for lock_release, or an error message
// from malloc that names the process and host holding the lock. *fd is -1 on error and where the
// file system has no locks. Never writes through a link named .lock.
static inline char *lock_take(int *fd, const char *dir) {
    char *path = xprintf("%s/.lock", dir), *error = NULL, host[256] = "", holder[300] = "";
    struct flock lock;
    memset(&lock, 0, sizeof lock);
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;                            // start and length 0: the whole file
    int taken = 0;
    // the previous owner may have removed the file (lock_forget)
    for (int tries = 0; tries < 10; tries++) {
        *fd = disk_open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW);
        taken = *fd >= 0 && fcntl(*fd, F_SETLK, &lock) == 0;
        if (!taken || path_leads_to(path, *fd, 0) == PATH_SAME) break;
        close(*fd);
        *fd = -1, errno = ESTALE, taken = 0;
    }
    if (*fd < 0) error = xprintf("cannot open %s: %s", path, strerror(errno));
    else if (taken) {
        gethostname(host, sizeof host - 1);
        char *text = xprintf("process %ld on %s\n", (long)getpid(), host);
        if (ftruncate(*fd, 0) || write(*fd, text, strlen(text)) < 0)           // informative only
            warn("cannot write %s: %s", path, strerror(errno));
        free(text);
    } else if (errno == EACCES || errno == EAGAIN) {
        const ssize_t n = pread(*fd, holder, sizeof holder - 1, 0);
        holder[n > 0 ? n : 0] = 0;
        holder[strcspn(holder, "\n")] = 0;
        error = xprintf("%s is in use by %s\n  hint: one run at a time may write to a directory: "
                        "wait, stop that one, or choose another --out", dir,
                        *holder ? holder : "another process");
    } else warn("%s: no locks on this file system (%s): nothing prevents a second run from writing "
                "to %s", path, strerror(errno), dir);
    if (error && *fd >= 0) {
        close(*fd);
        *fd = -1;
    }
    free(path);
    return error;
}

// A directory created for a run that may be refused or interrupted before it begins; it is then
// removed again.
// the first `existed` bytes of dir existed before
typedef struct { char *dir, *lock; size_t existed; pid_t owner; } LockFresh;
static LockFresh lock_fresh;

// Also called from a signal handler: must not allocate or free.
static inline void lock_forget(void) {
    char *dir = lock_fresh.dir;
    if (!dir || lock_fresh.owner != getpid()) return;
    unlink(lock_fresh.lock);
    for (size_t n = strlen(dir); n > lock_fresh.existed && rmdir(dir) == 0;) {
        while (n > lock_fresh.existed && dir[n - 1] != '/') n--;
        while (n > lock_fresh.existed && dir[n - 1] == '/') n--;
        dir[n] = 0;
    }
}

static inline void lock_on_signal(int number) {
    lock_forget();
    signal(number, SIG_DFL);
    raise(number);                                       // delivered when this handler returns
}

// From here on, the directory stays.
static inline void lock_begun(void) {
    char *dir = lock_fresh.dir, *lock = lock_fresh.lock;
    lock_fresh.dir = lock_fresh.lock = NULL;
    free(dir), free(lock);
}

// Creates dir and its missing parents. What is new is removed at exit or by a fatal signal, unless
// lock_begun is called first. Signals that are already handled or ignored are left alone.
static inline void lock_directory_make(const char *dir) {
    char *there = xstrdup(dir);
    size_t n = strlen(there);
    while (n > 0 && !path_exists(there)) {
        while (n > 0 && there[n - 1] == '/') n--;
        while (n > 0 && there[n - 1] != '/') n--;
        there[n] = 0;
    }
    free(there);
    const int fresh = n < strlen(dir);
    if (fresh) {
        static const int ends[] = {SIGTERM, SIGINT, SIGHUP, SIGUSR2, SIGXCPU};
        static int registered;
        char *copy = xstrdup(dir);
        for (size_t end = strlen(dir); end > n && dir[end - 1] == '/';) copy[--end] = 0;
        lock_fresh = (LockFresh){copy, xprintf("%s/.lock", copy), n, getpid()};
        if (!registered++) atexit(lock_forget);
        for (size_t i = 0; i < sizeof ends / sizeof ends[0]; i++) {
            struct sigaction old, now;
            memset(&now, 0, sizeof now);
            now.sa_handler = lock_on_signal;
            sigemptyset(&now.sa_mask);
            if (!sigaction(ends[i], NULL, &old) && old.sa_handler == SIG_DFL)
                sigaction(ends[i], &now, NULL);
        }
    }
    directory_make(dir);
}

static inline void lock_release(int *fd) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

#endif
