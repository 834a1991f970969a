// signals.h: the signals that ask a run to stop or to save. A handler only sets a flag; the trainer
// checks it once per step and once per evaluation batch, where all processes agree on the request.
//
//     SIGTERM, SIGINT   finish the step, save, exit 0; SIGHUP, sent when a terminal closes, does
//                       the same. A second one of the same kind ends the process at once, as if it
//                       had not been caught (a shell reports 128 + its number). Repetitions within
//                       SIGNALS_ONE seconds count as one request: timeout(1) sends each signal
//                       twice, to its child and to the process group, and launchers forward theirs.
//     SIGUSR2, SIGXCPU  the same, however often they arrive: schedulers send them to warn of the
//                       time limit, and the system sends SIGXCPU every second once `ulimit -t` is
//                       used up
//     SIGUSR1           save after this step and continue
//     SIGXFSZ           ignored: a write beyond `ulimit -f` fails with EFBIG, which is reported
//     SIGPIPE           ignored: a run does not need its console (`| head`)
#ifndef SIGNALS_H
#define SIGNALS_H

#include "../check.h"
#include <signal.h>
#include <sys/wait.h>
#include <time.h>

enum { SIGNALS_ONE = 2 };

// For --help.
#define SIGNALS_HELP                                                                               \
    "Signals: SIGTERM, SIGINT (Ctrl-C), SIGHUP, SIGUSR2 and SIGXCPU (schedulers' warnings) "\
    "finish the step, save and exit with code 0. SIGUSR1 saves and continues"

static volatile sig_atomic_t signals_stop, signals_save; // the number of the signal received, or 0

// Waits for a child to end, whatever signals arrive; returns its status as waitpid does.
static inline int child_wait(pid_t pid) {
    int status;
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR) die("waitpid: %s", strerror(errno));
    return status;
}

static inline void signals_on_warning(int number) { signals_stop = number; }

static inline void signals_on_stop(int number) {
    static struct timespec first[32];                    // by number: SIGHUP, SIGINT and SIGTERM
                                                         // are 1, 2 and 15
    struct timespec now, *f = &first[number];
    const int keep = errno;
    clock_gettime(CLOCK_MONOTONIC, &now);
    signals_stop = number;
    if (!f->tv_sec) *f = now, f->tv_sec += !now.tv_sec;
    else if ((double)(now.tv_sec - f->tv_sec) + 1e-9 * (double)(now.tv_nsec - f->tv_nsec) >
             SIGNALS_ONE) {
        signal(number, SIG_DFL);
        raise(number);                                   // delivered when this handler returns
    }
    errno = keep;
}

static inline void signals_on_save(int number) { signals_save = number; }

// A signal that the parent has set to be ignored (nohup, background jobs of a shell) stays ignored.
static inline void signals_set(int number, void (*handler)(int)) {
    struct sigaction now, old;
    memset(&now, 0, sizeof now);
    now.sa_handler = handler;
    now.sa_flags = SA_RESTART;                           // no system call is interrupted
    sigemptyset(&now.sa_mask);
    if (sigaction(number, NULL, &old)) die("sigaction: %s", strerror(errno));
    if (old.sa_handler != SIG_IGN && sigaction(number, &now, NULL))
        die("sigaction: %s", strerror(errno));
}

// At startup: ignores what must not end the process from then on.
static inline void signals_begin(void) {
    signals_set(SIGXFSZ, SIG_IGN);
    signals_set(SIGPIPE, SIG_IGN);
    signals_set(SIGUSR1, signals_on_save);
}

// Call when there is something to save: until then, ending at once is right.
static inline void signals_catch(void) {
    signals_set(SIGTERM, signals_on_stop);
    signals_set(SIGINT, signals_on_stop);
    signals_set(SIGHUP, signals_on_stop);
    signals_set(SIGUSR2, signals_on_warning);
    signals_set(SIGXCPU, signals_on_warning);
}

// Whether a save has been requested since the last call.
static inline int signals_take_save(void) {
    const int asked = signals_save != 0;
    if (asked) signals_save = 0;
    return asked;
}

// E.g. "SIGTERM"; if this process received none, another rank did.
static inline const char *signals_name(void) {
    switch (signals_stop) {
    case SIGTERM: return "SIGTERM";
    case SIGINT:  return "SIGINT";
    case SIGHUP:  return "SIGHUP";
    case SIGUSR2: return "SIGUSR2";
    case SIGXCPU: return "SIGXCPU";
    default:      return "a signal to another rank";
    }
}

#endif
