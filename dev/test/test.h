// test.h: shared by all tests. A test is a function; it passes if none of its expectations failed.
//
// A file of tests, dev/test/test_NAME.h, defines functions `static void test_THING(void)` and lists
// them in an X-macro, #define NAME_TESTS(X) X(thing) X(other_thing); test_gpt.c joins the lists
// into its one table.
#ifndef TEST_H
#define TEST_H

#include "../check.h"
#include "../files/files.h"
#include <math.h>
#include <sys/wait.h>

// Tests in C and in C++ (test_emu.cu) are objects of one program, which share these.
#define TEST_SHARED __attribute__((weak))

TEST_SHARED int test_failures;                           // failed expectations of the running test

// Prints the first few failures of a test (one wrong kernel fails a thousand comparisons).
static inline void PRINTF_LIKE(4, 5) test_expect(int ok, const char *file, int line,
                                                 const char *format, ...) {
    if (ok) return;
    if (++test_failures > 5) return;
    printf("    %s:%d: ", file, line);
    va_list args;
    va_start(args, format);
    vprintf(format, args);
    va_end(args);
    printf("\n");
}

// EXPECT(condition, "printf format of the actual values", ...)
#define EXPECT(ok, ...) test_expect(!!(ok), __FILE__, __LINE__, __VA_ARGS__)

// |got - want| <= tolerance; false for NaN.
#define EXPECT_CLOSE(got, want, tolerance, what) \
    test_expect_close(got, want, tolerance, what, __FILE__, __LINE__)
static inline void test_expect_close(double got, double want, double tolerance, const char *what,
                                     const char *file, int line) {
    test_expect(fabs(got - want) <= tolerance, file, line, "%s: got %.17g, want %.17g +- %.3g",
                what, got, want, tolerance);
}

#define EXPECT_TEXT(got, want) \
    test_expect(!strcmp(got, want), __FILE__, __LINE__, "got \"%s\", want \"%s\"", got, want)

// The error of a parser: it must exist and contain `part`.
#define EXPECT_ERROR(error, part) test_expect_error(error, part, __FILE__, __LINE__)
static inline void test_expect_error(const char *error, const char *part, const char *file,
                                     int line) {
    test_expect(error && strstr(error, part), file, line, "error \"%s\" should contain \"%s\"",
                error ? error : "(none)", part);
}

// Runs f(arg) in a child process, which must exit with `code` and print `part` on standard error.
#define EXPECT_EXIT(code, part, f, arg) test_expect_exit(code, part, f, arg, __FILE__, __LINE__)

// The same if parent and child use a GPU. Only an emulated one survives the fork
// (dev/emu/cuda_runtime.h).
#define EXPECT_EXIT_EMULATED(...) \
    (setenv("EMU_FORK", "1", 1), EXPECT_EXIT(__VA_ARGS__), unsetenv("EMU_FORK"))
static inline void test_expect_exit(int code, const char *part, void (*f)(void *), void *arg,
                                    const char *file, int line) {
    int ends[2];
    char seen[4096];
    size_t n = 0;
    fflush(stdout);
    if (pipe(ends)) die("pipe: %s", strerror(errno));
    pid_t child = fork();
    if (child < 0) die("fork: %s", strerror(errno));
    if (child == 0) {
        leave_memory();
        dup2(ends[1], 2);
        if (!freopen("/dev/null", "w", stdout)) _exit(99);
        close(ends[0]);
        f(arg);
        fflush(NULL);
        _exit(0);
    }
    close(ends[1]);
    for (ssize_t got; n < sizeof seen - 1 && (got = read(ends[0], seen + n, sizeof seen - 1 - n)) >
         0; n += (size_t)got) {}
    // a sanitizer prints more than that
    for (char rest[4096]; read(ends[0], rest, sizeof rest) > 0;) {}
    close(ends[0]);
    seen[n] = 0;
    int status = 0;
    waitpid(child, &status, 0);
    // a signal: minus its number
    const int end = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    test_expect(end == code, file, line, "exit status %d, want %d; it said: %s", end, code, seen);
    test_expect(strstr(seen, part) != NULL, file, line, "it said \"%s\", which lacks \"%s\"", seen,
                part);
}

// ---- Directories ----

enum { TEST_DIRECTORIES = 1000 };
TEST_SHARED char test_root[256];                         // this run's folder, or ""
TEST_SHARED char test_made[TEST_DIRECTORIES][300];       // its contents
TEST_SHARED int test_made_count;

// Creates this run's folder under TMPDIR.
static inline void test_root_make(void) {
    const char *base = getenv("TMPDIR");
    snprintf(test_root, sizeof test_root, "%s/droppath_test_XXXXXX", base ? base : "/tmp");
    if (!mkdtemp(test_root)) die("cannot make %s: %s", test_root, strerror(errno));
    test_made_count = 0;
}

// A new empty directory for the running test; the process that created the run's folder removes
// them all.
static inline const char *test_directory(void) {
    CHECK(test_made_count < TEST_DIRECTORIES, "more than %d directories", TEST_DIRECTORIES);
    char *current = test_made[test_made_count];
    if (!test_root[0]) test_root_make();
    snprintf(current, sizeof test_made[0], "%s/%d", test_root, test_made_count++);
    directory_make(current);
    return current;
}

// Removes everything that test_directory() returned.
static inline void test_directories_remove(void) {
    if (!test_root[0]) return;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        execlp("rm", "rm", "-rf", test_root, (char *)NULL);
        _exit(127);
    }
    int status = 1;
    if (child < 0 || waitpid(child, &status, 0) < 0 || status) warn("cannot remove %s", test_root);
    test_root[0] = 0;
}

// ---- The built programs, as a user starts them ----

// Reads a whole file; dies if it cannot be read.
static inline Text test_read_file(const char *path) {
    FileMap map;
    const char *error = file_map(&map, path);
    if (error) die("cannot read %s: %s", path, error);
    Text t = {(char *)xcalloc(map.size + 1, 1), map.size, map.size + 1};
    if (map.size) memcpy(t.s, map.data, map.size);
    file_unmap(&map);
    return t;
}

// The folder of the programs: the variable BUILD.
static inline const char *test_build(void) {
    const char *build = getenv("BUILD");
    return build ? build : "build";
}

// Whether BUILD starts with a program that runs the tested ones: a processor emulator.
static inline int test_emulated(void) { return strchr(test_build(), ' ') != NULL; }

// Whether the programs are many times slower than usual.
static inline int test_slow(void) {
#ifdef SANITIZED
    return 1;
#else
    return test_emulated();
#endif
}

// BUILD with an absolute path, for commands that run in another directory; from malloc.
static inline char *test_build_absolute(void) {
    const char *build = test_build(), *last = strrchr(build, ' '), *path = last ? last + 1 : build;
    char *absolute = realpath(path, NULL);
    if (!absolute) die("%s: %s", path, strerror(errno));
    char *all = xprintf("%.*s%s", (int)(path - build), build, absolute);
    free(absolute);
    return all;
}

typedef struct { int code; Text out, err; } ToolRun;     // exit code, standard output and error

// Runs a command line.
static inline ToolRun shell_run(const char *line) {
    static const char *dir;
    if (!dir) dir = test_directory();
    char *out = xprintf("%s/out", dir), *err = xprintf("%s/err", dir);
    // Waiting threads should sleep: such small models mostly wait, and the machine may have other
    // work.
    char *command = xprintf("export OMP_WAIT_POLICY=passive; { %s\n} > %s 2> %s", line, out, err);
    const int status = system(command);
    ToolRun r = {WIFEXITED(status) ? WEXITSTATUS(status) : -1, test_read_file(out),
                 test_read_file(err)};
    free(out), free(err), free(command);
    return r;
}

// The same for a formatted command line.
static inline ToolRun PRINTF_LIKE(1, 2) shell_runf(const char *format, ...) {
    int length;
    va_list args;
    va_start(args, format);
    char *line = xprintf_v(&length, format, args);
    va_end(args);
    ToolRun r = shell_run(line);
    free(line);
    return r;
}

// Runs a program with arguments as a shell reads them: "train_gpt --steps 3".
static inline ToolRun PRINTF_LIKE(1, 2) tool_run(const char *format, ...) {
    int length;
    va_list args;
    va_start(args, format);
    char *arguments = xprintf_v(&length, format, args);
    va_end(args);
    char *command = xprintf("%s/%s", test_build(), arguments);
    ToolRun r = shell_run(command);
    free(arguments), free(command);
    return r;
}

static inline void tool_free(ToolRun *r) {
    text_free(&r->out);
    text_free(&r->err);
}

// Expects that the run ended with this code and printed `part` on standard error; frees it. Returns
// whether it did.
static inline int tool_expect(int code, const char *part, ToolRun r, const char *file, int line) {
    const int ok = r.code == code && strstr(r.err.s, part);
    test_expect(ok, file, line, "exit code %d, want %d with \"%s\": %s", r.code, code, part,
                r.err.s);
    tool_free(&r);
    return ok;
}

#endif
