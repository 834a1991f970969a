// synonyms.h: what other training programs call this project's options. An unknown option is looked
// up here before the nearest spelling is suggested. The names come from nanoGPT, transformers
// (TrainingArguments), Megatron-LM, LitGPT, timm and fairseq; those of one or two letters are
// llm.c's (train_gpt2cu).
//
// Synonyms are suggested, never accepted: units or meanings may differ.
#ifndef SYNONYMS_H
#define SYNONYMS_H

typedef struct {
    const char *ours, *note;  // note: how the value differs, or how to give it
    const char *names;        // with '-', separated by blanks
} Synonym;

// A name may be in several rows: the first whose option the running program has is suggested.
static const Synonym synonyms[] = {
    // Drop path
    {"drop-path", "",
     "drop drop-path-rate drop-path-prob droppath-rate stochastic-depth stochastic-depth-prob "
     "stochastic-depth-rate layer-drop layerdrop encoder-layerdrop decoder-layerdrop "
     "layer-dropout layer-dropout-prob drop-rate"},

    // Beside drop path
    {"dropout", ", or --dropout-embd, -attn and -resid individually",
     "dropout-rate dropout-prob dropout-p hidden-dropout-prob"},
    {"dropout-embd", "", "embd-pdrop embed-dropout embedding-dropout"},
    {"dropout-attn", "", "attn-pdrop attention-dropout attn-dropout attention-probs-dropout-prob"},
    {"dropout-resid", "", "resid-pdrop resid-dropout hidden-dropout residual-dropout"},
    {"label-smoothing", "", "label-smoothing-factor smoothing"},
    {"exit-scale", "", "early-exit-loss-scale e-scale early-exit-scale"},
    {"exit-curriculum", "", "early-exit-curriculum early-exit-loss-curriculum"},
    {"attentiondrop", "", "attention-drop attn-drop attention-drop-type"},
    {"consistency", "", "rdrop r-drop rdrop-alpha rdrop-coef consistency-weight kl-coef"},
    {"teacher", "", "teacher-model teacher-path teacher-checkpoint teacher-model-name-or-path"},
    {"align", "", "attention-transfer attention-distillation attn-distill attention-alignment"},
    {"align-gamma", "", "attention-loss-weight attn-loss-weight align-weight"},
    {"distill", ", the share of the loss",
     "alpha-distill distill-alpha distillation-alpha kd-weight kd-alpha distill-weight "
     "distill-loss-weight kd"},
    {"distill-temperature", "", "kd-temperature distillation-temperature kd-temp"},
    {"train-last", ", the number of trained layers, not of frozen ones",
     "freeze-layers frozen-layers num-frozen-layers unfreeze-last trainable-layers"},

    {"lora", "", "lora-r lora-rank lora-dim adapter-rank"},
    {"lora-targets", ", some of qkv,attproj,fc,fcproj",
     "target-modules lora-target-modules lora-modules"},
    {"lora-norms", "", "train-norms modules-to-save"},

    // Model
    {"layers", "", "n-layer n-layers num-layers num-hidden-layers n-blocks depth"},
    {"heads", "", "n-head n-heads num-heads num-attention-heads"},
    {"channels", "", "n-embd n-embed embed-dim hidden-size hidden-dim d-model dim width"},
    {"seq-len", "",
     "block-size context context-length n-ctx n-positions seq-length sequence-length "
     "max-seq-len max-seq-length max-position-embeddings"},
    {"vocab-size", ", without padding", "padded-vocab-size"},
    {"vocab-size", "", "n-vocab"},
    {"preset", "", "model model-name model-type model-size config-name"},
    {"init-from", "", "model-name-or-path pretrained initial-checkpoint-dir finetune ckpt-path"},
    {"init-from", ", for weights alone; --resume continues a run", "load"},

    // Looking into a model
    {"calib", "", "calibration-data calib-data calibration-set calibration-dataset"},
    {"calib-tokens", ", in tokens", "nsamples num-samples-calib calib-samples max-calib-samples"},
    {"ridge", ", a multiple of the mean square of what the map reads",
     "alpha ridge-alpha l2-alpha"},
    {"min-count", "", "min-per-class min-samples-per-class"},

    // Data and output
    {"train", "",
     "data data-path data-dir dataset train-file train-data train-data-path input-bin"},
    {"val", "",
     "data dataset val-data valid-data-path validation-file eval-file input-val-bin val-file"},
    {"tokenizer", ", a file", "tokenizer-name tokenizer-dir"},
    {"tokenizer", "", "tokenizer-path tokenizer-model vocab-file"},
    {"out", "", "out-dir output output-dir output-path save save-dir checkpoint-dir log-dir"},
    {"out", ", a directory", "run-name"},

    // Length and batch
    {"steps", "",
     "max-iters max-steps num-steps n-steps iters iterations num-iterations train-iters "
     "train-steps total-steps train.max-steps"},
    {"steps", ", of --total-batch tokens", "max-tokens train.max-tokens"},
    {"epochs", "", "num-epochs num-train-epochs max-epochs train.epochs n-epochs"},
    {"batch", ", rows of a micro-batch", "batch-size"},
    {"batch", "",
     "micro-batch micro-batch-size train.micro-batch-size per-device-train-batch-size "
     "device-batch-size per-device-eval-batch-size eval-batch-size"},
    {"total-batch", ", in tokens",
     "total-batch-size global-batch-size train.global-batch-size effective-batch-size"},
    {"total-batch", ", in tokens of a whole step",
     "gradient-accumulation gradient-accumulation-steps grad-accum grad-accum-steps "
     "accumulate-grad-batches"},
    {"resume", "", "resume-from resume-from-checkpoint continue restart"},
    {"seed", "", "random-seed manual-seed"},
    {"threads", "", "num-threads n-threads nproc num-workers"},
    {"dtype", "", "precision torch-dtype"},
    {"dtype", " bf16", "amp bf16 fp16"},
    {"dtype", " fp32", "fp32"},
    {"dtype", " tf32", "tf32"},
    {"recompute", " branch",
     "gradient-checkpointing activation-checkpointing recompute-activations"},
    {"recompute", "", "recompute-granularity"},
    {"graphs", "", "cuda-graph"},
    {"zero", " 1", "use-distributed-optimizer"},
    {"zero", "", "zero-stage"},
    {"rendezvous", " tcp://HOST:PORT", "master-addr master-port"},
    {"rendezvous", "", "init-method dist-url"},

    // Optimizer
    {"lr", "", "learning-rate max-lr peak-lr lr-max base-lr optimizer.lr optimizer.init-args.lr"},
    {"lr-final", ", a fraction of --lr", "min-lr lr-min final-lr train.min-lr"},
    {"lr-final", "", "min-lr-ratio learning-rate-decay-frac"},
    {"lr-schedule", "",
     "lr-scheduler lr-scheduler-type lr-decay-style scheduler schedule decay-lr"},
    {"steps", ", after which the learning rate is --lr-final; only wsd has --lr-decay",
     "lr-decay-iters"},
    {"lr-decay", "", "lr-wsd-decay-iters cooldown cooldown-iters"},
    {"warmup", "",
     "warmup-steps warmup-iters lr-warmup-iters lr-warmup-steps train.lr-warmup-steps "
     "num-warmup-steps"},
    {"warmup", ", as in 2%", "warmup-ratio warmup-fraction lr-warmup-fraction"},
    {"weight-decay", "", "wd decay l2"},
    {"beta1", "", "adam-beta1"},
    {"beta2", "", "adam-beta2"},
    {"beta1", ", and --beta2", "betas"},
    {"eps", "", "adam-eps adam-epsilon epsilon"},
    {"grad-clip", "",
     "clip clip-grad clip-norm max-norm max-grad-norm gradient-clip-val train.max-norm"},

    // Evaluation, samples, checkpoints
    {"eval-every", "",
     "eval-interval eval-steps eval.interval val-interval val-every val-loss-every"},
    {"eval-tokens", ", in tokens", "eval-iters eval.max-iters val-max-steps eval-batches"},
    {"eval-tokens", "", "val-tokens"},
    {"save-every", "",
     "save-interval save-steps train.save-interval checkpoint-every checkpoint-interval "
     "ckpt-every"},
    {"keep", "", "save-total-limit keep-last max-checkpoints"},
    {"sample-every", "", "sample-interval generate-every"},
    {"log-every", "", "log-interval logging-steps print-every train.log-interval"},
    {"prompt", "", "start text input"},
    {"prompt-file", "", "file"},
    {"tokens", ", that follow the prompt", "max-new-tokens max-tokens max-length"},
    {"tokens", "", "length n-predict num-tokens"},
    {"sample-tokens", "", "max-new-tokens"},
    {"samples", "", "num-samples n-samples num-return-sequences"},
    {"top-p", "", "nucleus"},
    {"temperature", "", "temp"},
    {"choices", "", "hellaswag"},
    {"choices", ", a file created by data/choices.py", "tasks"},
    {"examples", "", "limit num-examples"},
    {"json", "", "output-json"},
    {"seeds", "", "num-seeds n-seeds"},
    {"format", "", "output-format"},
    {"picture", "", "plot"},
    {"n", ", layers to remove",
     "layers-to-skip num-layers-to-skip n-prune-layers num-prune-layers"},
    {"fraction", ", of the layers", "sparsity prune-ratio pruning-ratio"},
    {"drop", ", counted from 0", "prune-layers remove-layers layers-to-remove"},

    // llm.c's letters
    {"train", "", "i"},
    {"val", "", "j"},
    {"init-from", "", "e"},
    {"out", "", "o"},
    {"save-every", "", "n"},
    {"keep", "", "nk"},
    {"resume", "", "y"},
    {"batch", "", "b"},
    {"seq-len", "", "t"},
    {"total-batch", "", "d"},
    {"steps", "", "x"},
    {"lr-schedule", "", "k"},
    {"lr", "", "l"},
    {"warmup", "", "u"},
    {"lr-final", "", "q"},
    {"weight-decay", "", "c"},
    {"skip-loss-zscore", "", "sl"},
    {"skip-norm-zscore", "", "sg"},
    {"eval-every", "", "v"},
    {"eval-tokens", ", in tokens", "m"},
    {"sample-every", "", "s"},
    {"sample-tokens", "", "g"},
    {"zero", "", "z"},
    {"recompute", "", "r"},
    {"dtype", " tf32", "f"},
};

enum { SYNONYMS = sizeof synonyms / sizeof synonyms[0] };

#endif
