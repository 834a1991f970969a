// layer_list.h: some of a model's layers: lists of them as text, and shares of the depth.
//
//     layer_list_parse    "0,3-5,7.attn", as --keep, --drop and --keep-layers are written
//     layer_list_share    the layers that a share of the depth keeps: the first ones, or layers at
//                         equal distances
//     depth_shares_parse  "0.25,0.5,0.75", as --eval-depths is written
#ifndef LAYER_LIST_H
#define LAYER_LIST_H

#include "../check.h"
#include "../files/files.h"
#include "gpt.h"
#include <math.h>

// ---- Lists ----

static const char *const layer_list_branch[BRANCHES] = {"attn", "mlp"};

// Reads a layer number below L; returns what follows it, or NULL if there is none.
static inline const char *layer_list_number(const char *s, int L, int *layer) {
    int64_t l = 0;
    if (*s < '0' || *s > '9') return NULL;
    for (; *s >= '0' && *s <= '9'; s++)
        if ((l = 10 * l + (*s - '0')) >= L) return NULL;
    *layer = (int)l;
    return s;
}

// Sets chosen (2L) for the layers, ranges of layers and branches of a list. Returns NULL, or what
// is wrong with it; then chosen is undefined.
static inline const char *layer_list_parse(unsigned char *chosen, int L, const char *list) {
    static const char *const wrong =
        "layers are whole numbers from 0 on, with commas between them, as 3,5-7; branches 3.attn, "
        "4.mlp";
    for (const char *s = list;; s++) {
        int first, last, branch = -1;
        if (*s < '0' || *s > '9') return wrong;
        if (!(s = layer_list_number(s, L, &first))) return "there is no such layer";
        last = first;
        if (*s == '-' && (s[1] < '0' || s[1] > '9')) return wrong;
        if (*s == '-' && !(s = layer_list_number(s + 1, L, &last))) return "there is no such layer";
        if (last < first) return "a range goes from the lower layer to the higher one";
        for (int b = 0; b < BRANCHES && branch < 0 && *s == '.'; b++)
            if (!strncmp(s + 1, layer_list_branch[b], strlen(layer_list_branch[b])))
                branch = b, s += 1 + strlen(layer_list_branch[b]);
        if (*s && *s != ',') return wrong;
        for (int l = first; l <= last; l++)
            for (int b = 0; b < BRANCHES; b++)
                if (branch < 0 || b == branch) chosen[BRANCHES * l + b] = 1;
        if (!*s) return NULL;
    }
}

// Appends the layers of chosen (2L) as a list, "0,1.attn,5"; or "none".
static inline void layer_list_write(Text *t, const unsigned char *chosen, int L) {
    int n = 0;
    for (int l = 0; l < L; l++) {
        const unsigned char *c = chosen + BRANCHES * l;
        if (!c[ATTN] && !c[MLP]) continue;
        text_printf(t, "%s%d", n++ ? "," : "", l);
        if (!c[ATTN] || !c[MLP]) text_printf(t, ".%s", layer_list_branch[c[ATTN] ? ATTN : MLP]);
    }
    if (!n) text_printf(t, "none");
}

// ---- Shares of the depth ----

// prefix: the first layers; even: layers evenly spaced from the first to the last
enum { KEEP_PREFIX, KEEP_EVEN, KEEP_KINDS };
static const char *const keep_kind_name[KEEP_KINDS] = {"prefix", "even"};

// Sets chosen (2L) for round(share * L) layers, at least one; the others are cleared. Returns their
// number.
static inline int layer_list_share(unsigned char *chosen, int L, int kind, double share) {
    const int rounded = (int)lround(share * L), n = rounded < 1 ? 1 : rounded;
    memset(chosen, 0, (size_t)(BRANCHES * L));
    for (int i = 0; i < n; i++) {
        const int even = n == 1 ? 0 : (i * (L - 1) + (n - 1) / 2) / (n - 1);    // rounded
        memset(chosen + BRANCHES * (kind == KEEP_EVEN ? even : i), 1, BRANCHES);
    }
    return n;
}

enum { DEPTH_SHARES = 16 };

// Shares of the depth, ascending, rounded to six digits: equal to what is read back from a file.
typedef struct { int n; double share[DEPTH_SHARES]; } DepthShares;

// Reads one share, rounded to six digits; returns what follows it, or NULL if it is not in (0, 1).
static inline const char *depth_share_read(double *share, const char *text) {
    const char *stop = text + strspn(text, "0123456789.eE-+");
    char *end, digits[32];
    *share = strtod(text, &end);
    if (end == text || end != stop || !(*share > 0 && *share < 1)) return NULL;
    snprintf(digits, sizeof digits, "%g", *share);
    *share = strtod(digits, NULL);
    return *share > 0 && *share < 1 ? end : NULL;
}

// Reads a list of shares; "" is none. Returns NULL, or what is wrong with it.
static inline const char *depth_shares_parse(DepthShares *d, const char *text) {
    d->n = 0;
    for (const char *s = text; *text;) {
        double share;
        if (!(s = depth_share_read(&share, s)) || (*s && *s != ','))
            return "shares of the layers lie between 0 and 1, with commas between them, as "
                   "0.25,0.5,0.75";
        if (d->n == DEPTH_SHARES) return "there are more than 16 shares";
        int at = d->n;
        for (; at > 0 && d->share[at - 1] > share; at--) d->share[at] = d->share[at - 1];
        if (at > 0 && d->share[at - 1] == share) return "a share is there twice";
        d->share[at] = share, d->n++;
        if (!*s) break;
        s += 1 + strspn(s + 1, " ");
    }
    return NULL;
}

#endif
