// teacher.h: where the GPU's model meets a teacher: the maps that a teacher saves, and when a layer
// is compared with them. A part of train_gpt.cu, which includes it after struct Model; align.h has
// the kernels, dev/model/teacher_cpu.h is the CPU's.
#ifndef CUDA_TEACHER_H
#define CUDA_TEACHER_H

// Where the maps of layer l stay after a run.
static Maps maps_at(const Model *m, int l) {
    const size_t qkv = round_up((size_t)m->args.B * (size_t)m->args.T * 3 * (size_t)m->config.C *
                                size_of_number(&m->gpu), ALIGN);
    const char *at = m->maps;
    CHECK(m->args.maps && l < m->config.L && m->args.maps[l], "layer %d has no maps", l);
    for (int i = 0; i < l; i++) at += m->args.maps[i] ? maps_bytes(m) : 0;
    const Maps maps = {at, (const float *)(const void *)(at + qkv)};
    return maps;
}

static void maps_save(Model *m, int l, const AttentionSaved *k, size_t nT) {
    if (m->decoding || !m->args.maps || !m->args.maps[l]) return;
    const Maps to = maps_at(m, l);
    CHECK(nT == (size_t)m->last_B * (size_t)m->last_T, "a teacher's layer has dropped rows");
    CUDA_CHECK(cudaMemcpyAsync((void *)(uintptr_t)to.qkv, k->qkv,
                               nT * 3 * (size_t)m->config.C * size_of_number(&m->gpu),
                               cudaMemcpyDeviceToDevice, m->gpu.stream));
    CUDA_CHECK(cudaMemcpyAsync((void *)(uintptr_t)to.lse, k->lse,
                               nT * (size_t)m->config.NH * sizeof(float), cudaMemcpyDeviceToDevice,
                               m->gpu.stream));
}

// The comparison of layer l, on the rows that it runs; works.s NULL: there is none.
static Alignment alignment_of(Model *m, const Pass *pass, int l) {
    const Align *a = pass_align(pass, l, m->args.frozen, m->last_T);
    const BranchPlan *b = &pass->plan->branch[BRANCHES * l + ATTN];
    const size_t of_layer = 2 * (size_t)m->args.B * (size_t)m->args.T;
    Alignment to;
    memset(&to, 0, sizeof to);
    if (!a) return to;
    CHECK(a->teacher->last_B == m->last_B && a->teacher->last_T == m->last_T,
          "the teacher has not run on this batch");
    to.student.qkv = m->attention[l].qkv, to.student.lse = m->attention[l].lse;
    to.teacher = maps_at(a->teacher, a->layer[l]);
    to.works = rows_for(&a->teacher->score_rows, (size_t)m->last_T);
    to.rows = m->device.row + (size_t)(BRANCHES * l + ATTN) * m->rows;
    to.kl = a->kl, to.B = (size_t)m->last_B, to.sums = m->aligned + (size_t)l * of_layer;
    to.weight = (float)(pass->weight * a->gamma * align_share(a, m->last_B, m->last_T) *
                        b->scale / m->config.NH);
    m->compared[l] = 1;
    return to;
}

// Compares layer l, unless its gradient is needed: then returns the comparison, which is part of
// attention's backward pass; otherwise with works.s NULL.
static Alignment align_layer(Model *m, const Pass *pass, int l) {
    Alignment a = alignment_of(m, pass, l);
    if (!a.works.s || a.weight != 0) return a;
    align_maps(&m->gpu, &m->score_rows, &a, (size_t)pass->plan->branch[BRANCHES * l + ATTN].n,
               (size_t)m->last_T);
    a.works.s = NULL;
    return a;
}

// Copies what was compared to the host, at the end of a call; then adds it up.
static void align_send(Model *m) {
    if (m->compared)
        CUDA_CHECK(cudaMemcpyAsync(m->host_aligned, m->aligned, (size_t)m->config.L * 2 *
                                   (size_t)m->args.B * (size_t)m->args.T * sizeof(float),
                                   cudaMemcpyDeviceToHost, m->gpu.stream));
}

static void align_finish(Model *m, const Pass *pass) {
    const size_t BT = (size_t)m->last_B * (size_t)m->last_T;
    m->part[PART_ALIGN] = m->part[PART_COSINE] = m->part[PART_COMPARED] = 0;
    for (int l = 0; m->compared && l < m->config.L; l++) {
        const BranchPlan *b = &pass->plan->branch[BRANCHES * l + ATTN];
        const float *sums = m->host_aligned + (size_t)l * 2 * (size_t)m->args.B * (size_t)m->args.T;
        double distance = 0, cosine = 0;
        if (!m->compared[l]) continue;
        const double share = align_share(pass->objective->align, m->last_B, m->last_T);
        for (size_t t = 0; t < tokens_of(m, b); t++)
            distance += (double)sums[t], cosine += (double)sums[BT + t];
        m->part[PART_ALIGN] += share * b->scale * distance, m->part[PART_COSINE] += share * cosine;
        m->part[PART_COMPARED] += share * b->n * (m->last_T - 1);
    }
}

#endif
