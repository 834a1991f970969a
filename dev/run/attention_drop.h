// attention_drop.h: what a run's options say about AttentionDrop and consistency, checked, and the
// edits of a step.
#ifndef ATTENTION_DROP_H
#define ATTENTION_DROP_H

#include "../model/drop_path.h"
#include "../model/layer_list.h"
#include "../model/noise.h"
#include "../model/schedule.h"
#include "options.h"

// The layers that an option names, "all", "last" or a list: (L) from malloc. Dies if they are none
// of this model's.
static inline unsigned char *layer_list_open(const char *option, const char *list, int L) {
    unsigned char *chosen = (unsigned char *)xcalloc((size_t)L, 1),
        *branches = (unsigned char *)xcalloc((size_t)(BRANCHES * L), 1);
    const char *wrong = NULL;
    if (!strcmp(list, "all")) memset(branches, 1, (size_t)(BRANCHES * L));
    else if (!strcmp(list, "last")) memset(branches + BRANCHES * (L - 1), 1, BRANCHES);
    else wrong = strchr(list, '.') ? "it means attention: whole layers"
        : layer_list_parse(branches, L, list);
    if (wrong)
        die("--%s %s: %s\n  hint: all, last, or some of this model's layers, 0 to %d", option, list,
            wrong, L - 1);
    for (int l = 0; l < L; l++) chosen[l] = branches[BRANCHES * l + ATTN];
    free(branches);
    return chosen;
}

static inline void attention_drop_check(const TrainOptions *o) {
    if (o->attentiondrop_width % 2 == 0)
        die("--attentiondrop-width %lld: it must be odd", (long long)o->attentiondrop_width);
    if (o->consistency == 0) return;
    if (o->attentiondrop == SCORES_PLAIN && o->dropout_embd == 0 && o->dropout_attn == 0 &&
        o->dropout_resid == 0 && (o->lora_dropout == 0 || !o->lora))
        die("--consistency needs noise: both passes would be equal\n  hint: --attentiondrop hard, "
            "or --dropout 0.1");
    if (o->record_micro)
        die("--record-micro is for losses under one pass, --consistency has two\n  hint: omit one "
            "of them");
}

// Adds the edits of step t to the noise. `layers` (L): where; warm: how far the warm-up is.
static inline void attention_drop_at(Noise *z, const TrainOptions *o, const unsigned char *layers,
                                     double warm, int64_t t) {
    z->scores = o->attentiondrop, z->layers = layers;
    z->hard = noise_rate_of(warm * o->attentiondrop_p);
    z->k = (int)o->attentiondrop_k, z->masks = o->attentiondrop_mode;
    z->width = (int)o->attentiondrop_width;
    if (z->scores == SCORES_BLUR)
        z->sigma = noise_sigma(z->seed, t, warm * o->attentiondrop_sigma);
}

// to = the plan of twice the rows in which row r and row r + rows run the same branches.
static inline void drop_plan_twins(DropPlan *to, const DropPlan *from) {
    const int B = from->batch;
    to->batch = 2 * B, to->tied = from->tied, to->layers = from->layers;
    for (int i = 0; i < from->layers * BRANCHES; i++) {
        const BranchPlan *b = &from->branch[i];
        int *rows = to->storage + (size_t)i * 2 * (size_t)B;
        for (int r = 0; r < 2 * b->n; r++)
            rows[r] = r < b->n ? b->rows[r] : b->rows[r - b->n] + B;
        to->branch[i].n = 2 * b->n, to->branch[i].rows = rows, to->branch[i].scale = b->scale;
    }
}

#endif
