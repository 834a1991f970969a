// adapter.h: low-rank adapters (LoRA, Hu et al. 2021) for the CPU engine's matmuls:
//     y = x w + b + s D(x) A^T B^T,  A (r,in), B (out,r), s = alpha / r, D dropout of the
//     adapter's input only.
// The engine computes the matmul with w; these functions add to it. u = D(x) A^T is recomputed in
// the backward pass.
#ifndef ADAPTER_H
#define ADAPTER_H

#include "matmul.h"

typedef struct {
    const real *A, *B;  // (r,in) (out,r); A NULL: no adapter
    real *dA, *dB;      // NULL: no gradients
    real *u, *v;        // (nT,r) (nT,r) workspace; v NULL: evaluation
    size_t in, out, r;
    real scale;         // alpha / r
} Adapter;

// Writes y.scale * s D(x) A^T B^T to y, or adds it if y adds; returns how to write the matmul with
// w: added to that, with the bias and GELU, which apply to the sum. x (nT,in): D(x).
static inline Result adapter_forward(const Adapter *a, Result y, const PackWorkspace *work,
                                     const real *x, size_t nT) {
    Result only = y;
    multiply(fresh(a->u, a->r, NULL), work, matrix(x, a->in), transposed(a->A, a->in), nT, a->r,
             a->in, NULL);
    only.scale *= a->scale, only.bias = only.h = NULL, only.gelu = NULL;
    multiply(only, work, matrix(a->u, a->r), transposed(a->B, a->r), nT, a->out, a->r, NULL);
    y.add = 1;
    return y;
}

// v = s dx.scale dy B, and dx = v A: the gradient of D(x), still without dropout and the matmul
// with w, as described by the returned Result. dy (nT,out).
static inline Result adapter_backward_input(const Adapter *a, Result dx, const PackWorkspace *work,
                                            Matrix dy, size_t nT) {
    multiply(scaled(a->v, a->r, dx.scale * a->scale, 0), work, dy, matrix(a->B, a->r), nT, a->r,
             a->out, NULL);
    multiply(fresh(dx.at, dx.ld, NULL), work, matrix(a->v, a->r), matrix(a->A, a->in), nT, a->in,
             a->r, NULL);
    dx.add = 1;
    return dx;
}

// dA = v^T D(x) and dB = s dy^T u, scaled by `scale`, or += with `add`. After
// adapter_backward_input, with x (nT,in): D(x).
static inline void adapter_backward(const Adapter *a, int add, real scale,
                                    const PackWorkspace *work, Matrix dy, const real *x,
                                        size_t nT) {
    Matrix across = dy;
    across.transposed = 1;
    multiply(fresh(a->u, a->r, NULL), work, matrix(x, a->in), transposed(a->A, a->in), nT, a->r,
             a->in, NULL);
    multiply(scaled(a->dB, a->r, scale * a->scale, add), work, across, matrix(a->u, a->r), a->out,
             a->r, nT, NULL);
    multiply(scaled(a->dA, a->in, 1, add), work, transposed(a->v, a->r), matrix(x, a->in), a->r,
             a->in, nT, NULL);
}

#endif
