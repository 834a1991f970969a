// lock.h: one process at a time writes to a directory. The lock is on DIR/.lock and ends with the process, however that ends;
// the file stays. It is of fcntl's kind, which NFS has too, and which a child does not inherit.
#ifndef LOCK_H
#define LOCK_H

#include "files.h"

// Takes the lock of a directory that exists. Returns NULL and a descriptor, which lock_release closes; or what is wrong, from
// malloc: if another process has it, that one's number and host. *fd is -1 then, and where the file system has no locks. What a
// link of that name points to is not written to.
static inline char *lock_take(int *fd, const char *dir) {
    char *path = xprintf("%s/.lock", dir), *error = NULL, host[256] = "", holder[300] = "";
    struct flock lock;
    memset(&lock, 0, sizeof lock);
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;                            // start and length 0: all of the file
    *fd = disk_open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW);
    if (*fd < 0) error = xprintf("cannot open %s: %s", path, strerror(errno));
    else if (fcntl(*fd, F_SETLK, &lock) == 0) {
        gethostname(host, sizeof host - 1);
        char *text = xprintf("process %ld on %s\n", (long)getpid(), host);
        if (ftruncate(*fd, 0) || write(*fd, text, strlen(text)) < 0)           // only for messages
            warn("cannot write %s: %s", path, strerror(errno));
        free(text);
    } else if (errno == EACCES || errno == EAGAIN) {
        const ssize_t n = pread(*fd, holder, sizeof holder - 1, 0);
        holder[n > 0 ? n : 0] = 0;
        holder[strcspn(holder, "\n")] = 0;
        error = xprintf("%s is in use by %s\n  hint: one run at a time writes to a directory: wait, stop that one, or give "
                        "another --out", dir, *holder ? holder : "another process");
    } else warn("%s: no locks on this file system (%s): nothing keeps a second run out of %s", path, strerror(errno), dir);
    if (error && *fd >= 0) {
        close(*fd);
        *fd = -1;
    }
    free(path);
    return error;
}

static inline void lock_release(int *fd) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

#endif
