// teacher_cpu.h: where the CPU's model meets a teacher, or itself: soft targets, twins, and the
// comparison of attention maps, layer by layer.
#ifndef TEACHER_CPU_H
#define TEACHER_CPU_H

#include "align.h"
#include "cpu_model.h"
#include "pass.h"

// The teacher of the loss read after layer l, if that has one, for tokens of this weight; its last
// run was on this batch. Exits have none.
static inline Soft soft_targets(const Model *m, const Pass *pass, int l, double weight) {
    if (pass_distill(pass) == 0 || pass_exits(pass, l)) return (Soft){0};
    const Model *teacher = pass->objective->teacher;
    CHECK(teacher && teacher->last_B == m->last_B && teacher->last_T == m->last_T &&
          teacher->config.V == m->config.V, "the teacher has not run on this batch");
    return (Soft){teacher->lnf, params_at(teacher, SLOT_PARAM, 0).wte, teacher->logits,
                  &teacher->pack, (size_t)teacher->config.C,
                  (real)(weight * pass_distill(pass)), (real)pass->objective->temperature};
}

// The pairs of tokens of the loss read after layer l, if it compares twins. Exits do not.
static inline Pairs twin_tokens(const Model *m, const Pass *pass, int l, double weight) {
    if (pass_consistency(pass) == 0 || pass_exits(pass, l)) return (Pairs){0};
    return (Pairs){m->pairs, (real)(2 * weight * pass_consistency(pass)), 1,
                   pass->objective->symmetric};
}

// ---- A teacher's maps, with which a student's are compared (dev/model/align.h) ----

// Where the maps of layer l stay after a run.
static inline Maps maps_at(const Model *m, int l) {
    const size_t BT = (size_t)m->args.B * (size_t)m->args.T, C = (size_t)m->config.C,
        NH = (size_t)m->config.NH;
    const real *at = m->maps;
    CHECK(m->args.maps && l < m->config.L && m->args.maps[l], "layer %d has no maps", l);
    for (int i = 0; i < l; i++) at += m->args.maps[i] ? BT * (3 * C + NH) : 0;
    return (Maps){at, at + BT * 3 * C, C, NH};
}

static inline void maps_save(Model *m, int l, const AttentionSaved *k, size_t nT) {
    if (!m->args.maps || !m->args.maps[l]) return;
    const Maps to = maps_at(m, l);
    CHECK(nT == (size_t)m->last_B * (size_t)m->last_T, "a teacher's layer has dropped rows");
    memcpy((real *)(uintptr_t)to.qkv, k->qkv, nT * 3 * to.C * sizeof(real));
    memcpy((real *)(uintptr_t)to.lse, k->lse, nT * to.NH * sizeof(real));
}

// Adds layer l's part to the terms of Align. In training with a weight also makes the gradient,
// m->align, and returns it; otherwise NULL.
static inline const real *align_layer(Model *m, const Pass *pass, int l) {
    const Align *a = pass_align(pass, l, m->args.frozen, m->last_T);
    const BranchPlan *b = &pass->plan->branch[BRANCHES * l + ATTN];
    const AttentionSaved *k = &m->attention[l];
    if (!a) return NULL;
    const double share = align_share(a, m->last_B, m->last_T);
    const Maps student = {k->qkv, k->lse, (size_t)m->config.C, (size_t)m->config.NH},
        teacher = maps_at(a->teacher, a->layer[l]);
    real *more = pass->weight != 0 && a->gamma != 0 ? m->align : NULL;
    CHECK(a->teacher->last_B == m->last_B && a->teacher->last_T == m->last_T,
          "the teacher has not run on this batch");
    const AlignSums sum = align_maps(more, &m->score_rows, &student, &teacher, a->kl,
                                     pass->weight * a->gamma * share * b->scale, b->rows,
                                     (size_t)b->n, (size_t)m->last_T);
    m->part[PART_ALIGN] += share * b->scale * sum.distance;
    m->part[PART_COSINE] += share * sum.cosine, m->part[PART_COMPARED] += share * sum.n;
    return more;
}

#endif
