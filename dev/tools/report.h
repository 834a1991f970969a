// report.h: what the reports of compare and study are made of: tables, words of a command, numbers
// in JSON, pictures.
#ifndef REPORT_H
#define REPORT_H

#include "../check.h"
#include "../files/files.h"
#include "../files/json.h"
#include "../run/signals.h"
#include <ctype.h>

// ---- Tables: plain text that is Markdown too ----

// (rows, columns) from malloc; row 0 is the heading
typedef struct { int rows, columns; char **cell; } Table;

static inline Table table_new(int rows, int columns) {
    Table t = {rows, columns, (char **)xcalloc((size_t)(rows * columns), sizeof(char *))};
    return t;
}

static inline char **table_cell(const Table *t, int row, int column) {
    return &t->cell[row * t->columns + column];
}

// Characters of a text in UTF-8.
static inline int table_width(const char *s) {
    int n = 0;
    for (; s && *s; s++) n += (*s & 0xC0) != 0x80;
    return n;
}

// The first column is aligned to the left, the others to the right. A cell that is NULL is empty.
static inline void table_print(Text *out, const Table *t) {
    int *width = (int *)xcalloc((size_t)t->columns, sizeof *width);
    for (int i = 0; i < t->rows * t->columns; i++) {
        const int w = table_width(t->cell[i]);
        if (w > width[i % t->columns]) width[i % t->columns] = w;
    }
    for (int r = 0; r < t->rows; r++) {
        for (int k = 0; k < t->columns; k++) {
            const char *s = *table_cell(t, r, k) ? *table_cell(t, r, k) : "";
            const int blanks = width[k] - table_width(s);
            text_printf(out, "| %*s%s%*s ", k ? blanks : 0, "", s, k ? 0 : blanks, "");
        }
        text_printf(out, "|\n");
        for (int k = 0; r == 0 && k < t->columns; k++) {
            text_printf(out, k ? "|" : "|-");
            for (int i = 0; i < width[k] + 1; i++) text_append(out, "-", 1);
            text_printf(out, k ? ":" : "");
        }
        if (r == 0) text_printf(out, "|\n");
    }
    free(width);
}

static inline void table_free(Table *t) {
    for (int i = 0; i < t->rows * t->columns; i++) free(t->cell[i]);
    free(t->cell);
}

// ---- Words and numbers ----

// Appends a word as a shell reads it.
static inline void shell_word(Text *out, const char *word) {
    int plain = *word != 0;
    for (const char *s = word; *s; s++)
        plain &= isalnum((unsigned char)*s) || strchr("-_./=,:%+@", *s) != NULL;
    if (!plain) text_append(out, "'", 1);
    for (const char *s = word; *s; s++) {
        if (*s == '\'') text_printf(out, "'\\''");
        else text_append(out, s, 1);
    }
    if (!plain) text_append(out, "'", 1);
}

// Appends n pairs "name": number.
static inline void json_numbers(Text *out, int n, const char *const *name, const double *value) {
    for (int i = 0; i < n; i++) {
        text_printf(out, "%s\"%s\": ", i ? ", " : "", name[i]);
        json_write_number(out, value[i]);
    }
}

// ---- Programs beside this one ----

// The path of a program in the folder of this one, from malloc; the name alone if the shell found
// this one. Dies if it is not there.
static inline char *program_beside(const char *program, const char *name) {
    const char *slash = strrchr(program, '/');
    if (!slash) return xstrdup(name);
    char *path = xprintf("%.*s/%s", (int)(slash - program), program, name);
    if (!path_exists(path)) die("%s is not there\n  hint: make", path);
    return path;
}

// ---- Pictures, by scripts/plot.py: an extra, whose absence is no failure ----

#define PICTURE_SECONDS 120

// Where plot.py is, from the program's name: in scripts/ of one of the folders above
// build/double/san. From malloc, or NULL.
static inline char *picture_plot(const char *program) {
    static const char *const above[] = {"..", "../..", "../../..", "../../../.."};
    const char *slash = strrchr(program, '/');
    for (int i = 0; slash && i < 4; i++) {
        char *path = xprintf("%.*s/%s/scripts/plot.py", (int)(slash - program), program, above[i]);
        if (path_exists(path)) return path;
        free(path);
    }
    return NULL;
}

// Runs that command, silently; returns whether it has succeeded. One that hangs is ended after a
// while.
static inline int picture_draw(char **arguments) {
    const pid_t pid = fork();
    if (pid == 0) {
        const int null = open("/dev/null", O_RDWR);
        for (int fd = 0; fd < 3; fd++) dup2(null, fd);
        alarm(PICTURE_SECONDS);
        execvp(arguments[0], arguments);
        _exit(127);
    }
    return pid > 0 && child_wait(pid) == 0;
}

#endif
