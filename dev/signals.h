// signals.h: the signals by which a run is asked to stop or to save. A handler sets a flag and nothing else; the trainer looks
// at it once in a step and once in a batch of an evaluation, where all processes agree on what was asked.
//
//     SIGTERM, SIGINT   end the step, save, exit 0; so does SIGHUP, of a terminal that goes away. A second one of the same
//                       kind ends the process at once, as if it had never been caught (a shell says 128 + its number). Of the
//                       same kind: launchers forward Ctrl-C's SIGINT, which all processes of a terminal get, as SIGTERM.
//     SIGUSR1           save after this step and go on
//     SIGXFSZ           ignored: a write beyond `ulimit -f` fails with EFBIG, and says so
//     SIGPIPE           ignored: a run does not need its console (`| head`)
#ifndef SIGNALS_H
#define SIGNALS_H

#include "check.h"
#include <signal.h>

static volatile sig_atomic_t signals_stop, signals_save; // the number of the signal that asked, or 0

static inline void signals_on_stop(int number) { signals_stop = number; }
static inline void signals_on_save(int number) { signals_save = number; }

// A signal that the parent has had ignored (nohup, a shell's background jobs) stays so.
static inline void signals_set(int number, void (*handler)(int), int flags) {
    struct sigaction now, old;
    memset(&now, 0, sizeof now);
    now.sa_handler = handler;
    now.sa_flags = flags | SA_RESTART;                   // no call of anyone is cut short
    sigemptyset(&now.sa_mask);
    if (sigaction(number, NULL, &old)) die("sigaction: %s", strerror(errno));
    if (old.sa_handler != SIG_IGN && sigaction(number, &now, NULL)) die("sigaction: %s", strerror(errno));
}

// At the start: what must not end the process from then on.
static inline void signals_begin(void) {
    signals_set(SIGXFSZ, SIG_IGN, 0);
    signals_set(SIGPIPE, SIG_IGN, 0);
    signals_set(SIGUSR1, signals_on_save, 0);
}

// When there is something to save: until then, to end at once is right.
static inline void signals_catch(void) {
    signals_set(SIGTERM, signals_on_stop, (int)SA_RESETHAND);
    signals_set(SIGINT, signals_on_stop, (int)SA_RESETHAND);
    signals_set(SIGHUP, signals_on_stop, (int)SA_RESETHAND);
}

// Whether a save was asked for since the last look.
static inline int signals_take_save(void) {
    const int asked = signals_save != 0;
    if (asked) signals_save = 0;
    return asked;
}

// "SIGTERM"; where this process has got none, another one has.
static inline const char *signals_name(void) {
    switch (signals_stop) {
    case SIGTERM: return "SIGTERM";
    case SIGINT:  return "SIGINT";
    case SIGHUP:  return "SIGHUP";
    default:      return "a signal to another rank";
    }
}

#endif
