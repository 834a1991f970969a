// logits.c: a checkpoint's logits on given tokens, for the tests in this directory.
//
//     build/interop_logits CHECKPOINT B T tokens.i32 logits.f32
//
// tokens (B,T) int32, logits (B,T,V) float; raw arrays without a header.

#include "../../check.h"
#include "../../files/files.h"
#include "../../model/engines.h"
#include "../../tools/load.h"

int main(int argc, char **argv) {
    if (argc != 6) die("five arguments: CHECKPOINT B T tokens.i32 logits.f32");
    const int B = atoi(argv[2]), T = atoi(argv[3]);
    const size_t BT = (size_t)B * (size_t)T;
    Loaded m;
    FileMap tokens;
    load_config(&m, argv[1]);
    load_model(&m, engine_cpu(), B, T, 0);
    const char *error = file_map(&tokens, argv[4]);
    if (error || tokens.size != BT * sizeof(int))
        die("%s: %s", argv[4], error ? error : "not B x T tokens");

    const size_t V = (size_t)m.config.V;
    real *logits = xcalloc(V, sizeof *logits);
    float *out = xcalloc(V, sizeof *out);
    FILE *f = file_open(argv[5], "wb");
    drop_plan_keep_all(&m.plan, m.scale, m.tied, B);
    engine_forward(m.engine, m.model, T, (const int *)(const void *)tokens.data, NULL, &m.plan);
    for (int b = 0; b < B; b++)
        for (int t = 0; t < T; t++) {
            m.engine->logits(m.model, b, t, logits);
            for (size_t i = 0; i < V; i++) out[i] = (float)logits[i];
            file_write(f, argv[5], out, V * sizeof *out);
        }
    if (fclose(f)) die("cannot write %s: %s", argv[5], strerror(errno));
    file_unmap(&tokens);
    free(logits), free(out);
    load_close(&m);
    return 0;
}
