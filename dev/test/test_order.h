// test_order.h: train_gpt.c and train_gpt.cu read side by side: what both define stands in the same
// order.
#ifndef TEST_ORDER_H
#define TEST_ORDER_H

#include "../files/files.h"
#include "test.h"
#include <ctype.h>

#define ORDER_TESTS(X) X(engines_read_alike)

enum { ORDER_NAMES = 1024 };
typedef struct { char *name[ORDER_NAMES]; int n; } Order;

static int order_find(const Order *o, const char *name) {
    for (int i = 0; i < o->n; i++)
        if (!strcmp(o->name[i], name)) return i;
    return -1;
}

// The name of the function that a line begins to define, from malloc; NULL: none. Definitions begin
// at the left margin, and their first line ends neither as a declaration nor as a macro.
static char *order_defined(const char *line, size_t n) {
    const char *open = memchr(line, '(', n), *end = open;
    if (!n || !open || !(isalpha((unsigned char)*line) || *line == '_')) return NULL;
    if (line[n - 1] == ';' || !strncmp(line, "typedef", 7) || !strncmp(line, "enum", 4))
        return NULL;
    while (end > line && (isalnum((unsigned char)end[-1]) || end[-1] == '_')) end--;
    return end == open || end == line ? NULL : xprintf("%.*s", (int)(open - end), end);
}

// The functions of a file, each once, in order.
static Order order_read(const char *path) {
    Order o = {{NULL}, 0};
    FileMap map;
    const char *error = file_map(&map, path);
    if (error) die("cannot read %s: %s", path, error);
    for (size_t at = 0, end; at < map.size; at = end + 1) {
        for (end = at; end < map.size && map.data[end] != '\n';) end++;
        char *name = order_defined((const char *)map.data + at, end - at);
        if (name && order_find(&o, name) < 0 && o.n < ORDER_NAMES) o.name[o.n++] = name;
        else free(name);
    }
    file_unmap(&map);
    return o;
}

static void order_free(Order *o) {
    while (o->n) free(o->name[--o->n]);
}

static void test_engines_read_alike(void) {
    Order cpu = order_read("train_gpt.c"), gpu = order_read("train_gpt.cu");
    int shared = 0, last = -1;
    for (int i = 0; i < cpu.n; i++) {
        const int at = order_find(&gpu, cpu.name[i]);
        if (at < 0) continue;
        EXPECT(at > last, "%s comes after %s in train_gpt.c, before it in train_gpt.cu",
               cpu.name[i], last < 0 ? "" : gpu.name[last]);
        if (at > last) last = at;
        shared++;
    }
    EXPECT(10 * shared >= 6 * cpu.n, "only %d functions are in both train_gpt.c (%d) and "
           "train_gpt.cu (%d)", shared, cpu.n, gpu.n);
    EXPECT(order_find(&gpu, "attention_branch_backward") >= 0 && order_find(&cpu, "adamw") >= 0,
           "not read");
    order_free(&cpu), order_free(&gpu);
}

#endif
