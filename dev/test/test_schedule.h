// test_schedule.h: the learning rate against closed forms, at its corners and as a whole.
#ifndef TEST_SCHEDULE_H
#define TEST_SCHEDULE_H

#include "../model/schedule.h"
#include "test.h"

// 1000 steps, 100 of warm-up, 200 of decay for wsd, from 6e-4 to a tenth.
static Schedule schedule_example(int kind) {
    Schedule s = {kind, 6e-4, 0.1, 1000, 100, 200};
    return s;
}

// The corners are exact, not merely close: a resumed or constant run must not differ in the last
// bit.
static void test_schedule_corners(void) {
    for (int kind = SCHEDULE_COSINE; kind <= SCHEDULE_CONSTANT; kind++) {
        Schedule s = schedule_example(kind);
        EXPECT(schedule_lr(&s, 0) == s.lr * 0.01, "kind %d: first step %.17g", kind,
               schedule_lr(&s, 0));
        EXPECT(schedule_lr(&s, 99) == s.lr, "kind %d: end of the warm-up %.17g", kind,
               schedule_lr(&s, 99));
        EXPECT(schedule_lr(&s, 100) == s.lr, "kind %d: after the warm-up %.17g", kind,
               schedule_lr(&s, 100));
        double end = kind == SCHEDULE_CONSTANT ? s.lr : s.lr * 0.1;
        EXPECT(schedule_lr(&s, 1000) == end, "kind %d: end %.17g", kind, schedule_lr(&s, 1000));
        s.warmup = 0;
        EXPECT(schedule_lr(&s, 0) == s.lr, "kind %d: without warm-up %.17g", kind,
               schedule_lr(&s, 0));
    }
    Schedule s = schedule_example(SCHEDULE_WSD);
    EXPECT(schedule_lr(&s, 800) == s.lr, "wsd: start of the fall %.17g", schedule_lr(&s, 800));
    EXPECT(schedule_lr(&s, 801) < s.lr, "wsd: second step of the fall %.17g", schedule_lr(&s, 801));
    s.final_fraction = 1;
    for (int64_t t = 100; t <= 1000; t++)
        EXPECT(schedule_lr(&s, t) == s.lr, "fraction 1: step %d falls", (int)t);
}

static void test_schedule_closed_forms(void) {
    Schedule s = schedule_example(SCHEDULE_COSINE);
    // nanoGPT: min_lr + coeff * (lr - min_lr), coeff = (1 + cos(pi * ratio)) / 2; ratio 1/3, 1/2,
    // 2/3
    EXPECT_CLOSE(schedule_lr(&s, 400), 6e-5 + 0.75 * 5.4e-4, 1e-17, "cosine, a third");
    EXPECT_CLOSE(schedule_lr(&s, 550), 6e-5 + 0.50 * 5.4e-4, 1e-17, "cosine, half");
    EXPECT_CLOSE(schedule_lr(&s, 700), 6e-5 + 0.25 * 5.4e-4, 1e-17, "cosine, two thirds");
    s.kind = SCHEDULE_LINEAR;
    EXPECT_CLOSE(schedule_lr(&s, 400), 6e-4 - 5.4e-4 / 3, 1e-17, "linear, a third");
    EXPECT_CLOSE(schedule_lr(&s, 999), 6e-5 + 5.4e-4 / 900, 1e-17, "linear, last step");
    s.kind = SCHEDULE_WSD;
    EXPECT_CLOSE(schedule_lr(&s, 799), 6e-4, 0, "wsd, held");
    EXPECT_CLOSE(schedule_lr(&s, 900), 3.3e-4, 1e-17, "wsd, half of the fall");
    s.kind = SCHEDULE_CONSTANT;
    EXPECT_CLOSE(schedule_lr(&s, 999), 6e-4, 0, "constant");
    EXPECT_CLOSE(schedule_lr(&s, 49), 3e-4, 1e-17, "half of the warm-up");
}

// Rises, then never rises again, and stays within [final, peak].
static void test_schedule_monotone(void) {
    for (int kind = SCHEDULE_COSINE; kind <= SCHEDULE_CONSTANT; kind++) {
        Schedule s = schedule_example(kind);
        for (int64_t t = 1; t <= s.steps; t++) {
            double before = schedule_lr(&s, t - 1), now = schedule_lr(&s, t);
            EXPECT(t < s.warmup ? now > before : now <= before, "kind %d: step %d: %g then %g",
                   kind, (int)t, before, now);
            EXPECT(now <= s.lr && (t < s.warmup || now >= s.lr * s.final_fraction),
                   "kind %d: step %d: %g", kind, (int)t, now);
        }
    }
}

// Spans that do not fit in the run meet without a jump.
static void test_schedule_overlap(void) {
    for (int kind = SCHEDULE_COSINE; kind <= SCHEDULE_CONSTANT; kind++) {
        Schedule s = schedule_example(kind);
        s.warmup = 2000;
        EXPECT(schedule_lr(&s, 999) == s.lr * 0.5, "kind %d: a warm-up longer than the run: %g",
               kind, schedule_lr(&s, 999));
        s.warmup = 900;
        EXPECT(schedule_lr(&s, 900) == s.lr, "kind %d: fall within the warm-up: %g", kind,
               schedule_lr(&s, 900));
    }
    Schedule s = schedule_example(SCHEDULE_WSD);
    s.warmup = 900;
    EXPECT_CLOSE(schedule_lr(&s, 950), 3.3e-4, 1e-17, "wsd, a fall cut to 100 steps");
}

#define SCHEDULE_TESTS(X) \
    X(schedule_corners) X(schedule_closed_forms) X(schedule_monotone) X(schedule_overlap)

#endif
