// lora.h: adapters in peft's format: adapter_config.json, the names of their tensors, and their
// base.
//
//     DIR/adapter_config.json          rank, alpha, targets, the base; see lora_write and
//                                      lora_parse
//     DIR/adapter_model.safetensors    lora_A.weight (r,in) and lora_B.weight (out,r), named as
//                                      base_model.model.transformer.h.0.attn.c_attn.lora_A.weight
//     DIR/base                         a link to the base if it has moved; otherwise
//                                      adapter_config.json names it
//
// Features of peft that this program lacks are refused by name, so that no adapter is misread.
#ifndef LORA_H
#define LORA_H

#include "../files/files.h"
#include "../files/json.h"
#include "../files/sha256.h"
#include "../model/gpt.h"

#define LORA_PREFIX "base_model.model.transformer."
#define LORA_MODEL "adapter_model.safetensors"
#define LORA_CONFIG "adapter_config.json"

typedef struct {
    int rank;                                            // 0: no adapter
    unsigned targets;                                    // GptConfig.lora_targets
    int norms;
    double alpha, dropout;
    char *base;                                          // a path, from malloc
} LoraConfig;

// Our name of matmul t, and peft's.
static const char *const lora_names[LORA_TARGETS] = {"qkv", "attproj", "fc", "fcproj"};
static const char *const lora_modules[LORA_TARGETS] = {"attn.c_attn", "attn.c_proj", "mlp.c_fc",
                                                       "mlp.c_proj"};
static const char *const lora_norm_modules[] = {"ln_1", "ln_2", "ln_f"};
enum { LORA_NORMS = sizeof lora_norm_modules / sizeof lora_norm_modules[0] };

// "qkv,fc" -> targets. Returns NULL or, from malloc, what is wrong.
static inline char *lora_parse_targets(unsigned *targets, const char *list) {
    *targets = 0;
    for (const char *s = list; *list; s += *s == ',') {
        const size_t n = strcspn(s, ",");
        int t = 0;
        while (t < LORA_TARGETS && (strlen(lora_names[t]) != n || memcmp(lora_names[t], s, n))) t++;
        if (t == LORA_TARGETS)
            return xprintf("'%.*s' is no target\n  hint: some of qkv,attproj,fc,fcproj",
                           n < 40 ? (int)n : 40, s);
        if (*targets >> t & 1) return xprintf("%s is there twice", lora_names[t]);
        *targets |= 1u << t;
        s += n;
        if (!*s) return NULL;
    }
    return xstrdup("no target\n  hint: some of qkv,attproj,fc,fcproj");
}

// ---- adapter_config.json ----

static inline void lora_write(Text *t, const LoraConfig *c) {
    text_printf(t, "{\n  \"peft_type\": \"LORA\",\n  \"task_type\": \"CAUSAL_LM\",\n  "
                "\"base_model_name_or_path\": ");
    json_write_string(t, c->base);
    text_printf(t, ",\n  \"r\": %d,\n  \"lora_alpha\": ", c->rank);
    json_write_number(t, c->alpha);
    text_printf(t, ",\n  \"lora_dropout\": ");
    json_write_number(t, c->dropout);
    text_printf(t, ",\n  \"target_modules\": [");
    for (int i = 0, n = 0; i < LORA_TARGETS; i++)
        if (c->targets >> i & 1) text_printf(t, "%s\"%s\"", n++ ? ", " : "", lora_modules[i]);
    text_printf(t, "],\n  \"modules_to_save\": ");
    for (int i = 0; c->norms && i < LORA_NORMS; i++)
        text_printf(t, "%s\"%s\"", i ? ", " : "[", lora_norm_modules[i]);
    text_printf(t, c->norms ? "],\n" : "null,\n");
    text_printf(t, "  \"fan_in_fan_out\": true,\n  \"bias\": \"none\",\n  \"inference_mode\": "
                "true\n}\n");
}

// Whether a setting has no effect: absent, null, false, or empty.
static inline int lora_is_neutral(const Json *doc, int node) {
    const int type = json_type(doc, node);
    return node < 0 || type == JSON_NULL || type == JSON_FALSE || json_equals(doc, node, "") ||
           ((type == JSON_OBJECT || type == JSON_ARRAY) && !json_count(doc, node));
}

// Checks for settings that would give the same tensors a different meaning, or need other tensors.
static inline char *lora_check_neutral(const Json *doc) {
    static const char *const keys[] = {"rank_pattern", "alpha_pattern", "use_dora", "use_rslora",
                                       "lora_bias",
                                       "layers_to_transform", "exclude_modules",
                                       "target_parameters",
                                       "trainable_token_indices", "layer_replication", "use_qalora",
                                       "alora_invocation_tokens", "use_bdlora"};
    // these have changed the base
    static const char *const initial[] = {"pissa", "olora", "corda", "loftq"};
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++)
        if (!lora_is_neutral(doc, json_get(doc, 0, keys[i])))
            return xprintf("\"%s\" is set, which is another kind of adapter\n  hint: let peft "
                           "merge it: merge_and_unload(), then save_pretrained()", keys[i]);
    const int bias = json_get(doc, 0, "bias"), init = json_get(doc, 0, "init_lora_weights");
    if (bias >= 0 && !json_equals(doc, bias, "none")) return xstrdup("\"bias\" must be \"none\"");
    char *name = json_type(doc, init) == JSON_STRING ? json_string(doc, init, NULL) : NULL,
        *error = NULL;
    for (size_t i = 0; name && i < sizeof initial / sizeof initial[0]; i++)
        if (!strncmp(name, initial[i], strlen(initial[i])))
            error = xprintf("\"init_lora_weights\" is %.20s, for which the base is another than "
                            "its file", name);
    free(name);
    return error;
}

// The matmuls that peft's name selects: one in its layer, which must then be named in every layer
// (otherwise weights_check_adapter misses a tensor), or the suffix of a path. None: 0.
static inline unsigned lora_module_targets(const char *name) {
    unsigned targets = 0;
    if (!strncmp(name, "transformer.", 12)) name += 12;
    if (!strncmp(name, "h.", 2) && name[2 + strspn(name + 2, "0123456789")] == '.')
        name += 3 + strspn(name + 2, "0123456789");
    const size_t n = strlen(name);
    for (int t = 0; t < LORA_TARGETS; t++) {
        const size_t have = strlen(lora_modules[t]);
        if (n && n <= have && !strcmp(lora_modules[t] + have - n, name) &&
            (n == have || lora_modules[t][have - n - 1] == '.'))
            targets |= 1u << t;
    }
    return targets;
}

static inline char *lora_read_targets(LoraConfig *c, const Json *doc) {
    const int list = json_get(doc, 0, "target_modules");
    if (json_equals(doc, list, "all-linear")) {
        c->targets = (1u << LORA_TARGETS) - 1;
        return NULL;
    }
    if (json_type(doc, list) != JSON_ARRAY || !json_count(doc, list))
        return xstrdup("\"target_modules\" must be a list of names\n  hint: regular expressions "
                       "are not read");
    for (int i = 0, node = json_first(doc, list); i < json_count(doc, list);
         i++, node = json_next(doc, node)) {
        char *name = json_type(doc, node) == JSON_STRING ? json_string(doc, node, NULL) : NULL;
        const unsigned some = name ? lora_module_targets(name) : 0;
        char *error = some ? NULL : xprintf("\"target_modules\" has %.40s, which is no product of "
                                            "a layer here", name ? name : "what is no name");
        free(name);
        if (error) return error;
        c->targets |= some;
    }
    return NULL;
}

static inline char *lora_read_norms(LoraConfig *c, const Json *doc) {
    const int list = json_get(doc, 0, "modules_to_save");
    unsigned found = 0;
    if (lora_is_neutral(doc, list)) return NULL;
    for (int i = 0, node = json_first(doc, list); i < json_count(doc, list);
         i++, node = json_next(doc, node))
        for (int k = 0; k <= LORA_NORMS; k++) {
            if (k == LORA_NORMS)
                return xstrdup("\"modules_to_save\" has others than ln_1, ln_2 and ln_f");
            if (!json_equals(doc, node, lora_norm_modules[k])) continue;
            found |= 1u << k;
            break;
        }
    if (json_type(doc, list) != JSON_ARRAY || found != (1u << LORA_NORMS) - 1)
        return xstrdup("\"modules_to_save\" must be none or all of ln_1, ln_2 and ln_f");
    c->norms = 1;
    return NULL;
}

static inline char *lora_read(LoraConfig *c, const Json *doc) {
    int64_t rank = 0;
    if (json_type(doc, 0) != JSON_OBJECT) return xstrdup("it is no object");
    if (json_duplicate(doc, 0) >= 0) return xstrdup("a name is there twice");
    if (!json_equals(doc, json_get(doc, 0, "peft_type"), "LORA"))
        return xstrdup("\"peft_type\" must be LORA");
    if (!json_int64(doc, json_get(doc, 0, "r"), &rank) || rank < 1 || rank > 1024)
        return xstrdup("\"r\" must be 1 to 1024");
    c->rank = (int)rank;
    if (!json_number(doc, json_get(doc, 0, "lora_alpha"), &c->alpha) || !(fabs(c->alpha) <= 1e6))
        return xstrdup("\"lora_alpha\" must be a number up to a million");
    const int dropout = json_get(doc, 0, "lora_dropout");
    if (dropout >= 0 && (!json_number(doc, dropout, &c->dropout) ||
                         !(c->dropout >= 0 && c->dropout < 1)))
        return xstrdup("\"lora_dropout\" must be in [0,1)");
    char *error = lora_check_neutral(doc);
    if (!error) error = lora_read_targets(c, doc);
    if (!error) error = lora_read_norms(c, doc);
    if (error) return error;
    const int base = json_get(doc, 0, "base_model_name_or_path");
    c->base = json_type(doc, base) == JSON_STRING ? json_string(doc, base, NULL) : xstrdup("");
    return c->base ? NULL : xstrdup("\"base_model_name_or_path\" contains a NUL");
}

// Reads an adapter_config.json of `size` bytes at mem, ours or peft's. Returns NULL or, from
// malloc, what is wrong; then there is nothing else to free.
static inline char *lora_parse(LoraConfig *c, const void *mem, size_t size) {
    Json doc;
    memset(c, 0, sizeof *c);
    const char *wrong = json_parse(&doc, mem, size);
    if (wrong) return xstrdup(wrong);
    char *error = lora_read(c, &doc);
    json_free(&doc);
    return error;
}

// ---- An adapter's directory ----

// Whether the directory has an adapter, and no weights of its own.
static inline int lora_is_adapter(const char *dir) {
    char *config = xprintf("%s/" LORA_CONFIG, dir), *plain = xprintf("%s/config.json", dir);
    const int is = path_exists(config) && !path_exists(plain);
    free(config), free(plain);
    return is;
}

// Reads its configuration; dies if it is invalid. c->base is set to the base's existing directory
// or file.
static inline void lora_open(LoraConfig *c, const char *dir) {
    char *path = xprintf("%s/" LORA_CONFIG, dir), *link = xprintf("%s/base", dir), *wrong;
    FileMap map;
    const char *error = file_map(&map, path);
    if (error) die("cannot read %s: %s", path, error);
    if ((wrong = lora_parse(c, map.data, map.size))) die("%s: %s", path, wrong);
    file_unmap(&map);
    if (path_exists(link)) {
        free(c->base);
        c->base = xstrdup(link);
    }
    if (!*c->base || !path_exists(c->base))
        die("%s is an adapter for base %s, which is not there\n  hint: put it back, or make %s a "
            "link to it", dir, *c->base ? c->base : "(none named)", link);
    if (lora_is_adapter(c->base)) die("%s is an adapter for base %s, which is an adapter too\n"
                                      "  hint: export the base first, and make %s a link to that",
                                      dir, c->base, link);
    free(path), free(link);
}

// The SHA-256 of the base's weights: DIR/model.safetensors, or an llm.c file. Dies if there is
// none.
static inline void lora_base_sha256(char hex[SHA256_HEX], const char *base) {
    char *path = path_is_directory(base) ? xprintf("%s/model.safetensors", base) : xstrdup(base);
    const int fd = file_open_read(path);
    char *block = (char *)xcalloc(FILE_SUM_BLOCK, 1);
    FileSum sum;
    ssize_t n = 1;
    if (fd < 0)
        die("cannot read %s: %s\n  hint: an adapter's base is one model.safetensors; build/export "
            "makes one", path, strerror(errno));
    file_sum_init(&sum);
    while (n > 0)
        if ((n = read(fd, block, FILE_SUM_BLOCK)) > 0) file_sum_update(&sum, block, (size_t)n);
    if (n < 0) die("cannot read %s: %s", path, strerror(errno));
    file_sum_end(&sum);
    memcpy(hex, sum.hex, SHA256_HEX);
    text_free(&sum.marks);
    close(fd);
    free(block), free(path);
}

// Dies if the base is not the one that the adapter was trained on, according to its parsed
// trainer.json; peft's have none.
static inline void lora_check_base(const Json *trainer, const char *dir) {
    const int sum = json_get(trainer, 0, "base_sha256");
    char hex[SHA256_HEX];
    LoraConfig c;
    if (sum < 0) return;
    lora_open(&c, dir);
    lora_base_sha256(hex, c.base);
    if (!json_equals(trainer, sum, hex))
        die("%s is an adapter for base %s, whose SHA-256 differs\n  hint: the base has been "
            "trained or exported again since: bring back the one of before", dir, c.base);
    free(c.base);
}

#endif
