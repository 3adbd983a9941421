"""Messages for unknown names: the nearest known name, or our name for a setting of another stack."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from uft_ds.objectives.losses import PRESETS

_LOSSES_ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("kto", "kto_pair"), "l1 with reward_shift: kl"),
    "bco": "bce with reward_shift: ema",
    "bco_pair": "bce, at twice the weight",
    "apo_zero": "l1, at twice the weight",
    "apo_zero_unpaired": "l1",
    **dict.fromkeys(("sppo_hard", "sppo"), "raw, at 2 / beta^2 times the weight"),
    "sigmoid": "dpo",
    "sigmoid_norm": "dpo with length_normalized: true",
    "sft": "nll",
    "uft": "mse",
    "una": "mse",
    "slic": "hinge",
    "rpo": "{dpo: 1, nll: 1} as TRL has it, or rpo_sq, rpo_fwd, rpo_bwd as NVIDIA has it",
    "dr_grpo": "rloo, at (k - 1) / k times the weight for k answers to a prompt",
    "reinforce_plus_plus": "reinforce, without the division by the deviation",
    "rebel": "raw with center: prompt",
    "mpo": "{dpo: 0.8, bce: 0.4, nll: 1.0}",
    **{name: f"{{{', '.join(f'{k}: {v:g}' for k, v in sums.items())}}} in a map" for name, sums in PRESETS.items()},
}
"""Our names for losses of other stacks and papers, and for presets, which are sums of losses."""

_KEYS_ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("gamma", "simpo_gamma"), "objective.simpo_margin"),
    "gamma_beta_ratio": "objective.simpo_margin, beta times as large",
    **dict.fromkeys(("loss_type", "loss_weights", "objective"), "objective.loss"),
    **dict.fromkeys(("rpo_alpha", "nll_weight"), "a weight in a map, loss: {pair: {dpo: 1, nll: 0.2}}"),
    **dict.fromkeys(("pref_beta", "dpo_beta", "rl_beta", "kl_coef", "kl_beta"), "objective.beta"),
    **dict.fromkeys(("stage", "rl", "pref_loss", "rlhf_type"), "objective.loss"),
    "cpo_alpha": "a weight in a map, loss: {pair: {contrast: 1, nll: 0.2}}",
    **dict.fromkeys(("desirable_weight", "lambda_d"), "objective.weights.binary, which multiplies both sides"),
    "lambda_u": "objective.undesirable_weight, against 1 for the desirable",
    **dict.fromkeys(("learning_rate", "peak_lr"), "train.lr"),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), "train.schedule"),
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), "train.warmup, a share of all steps"),
    **dict.fromkeys(("max_steps", "num_steps"), "train.steps"),
    **dict.fromkeys(("num_train_epochs", "num_epochs"), "train.epochs"),
    **dict.fromkeys(("save_steps", "checkpoint_steps"), "train.checkpoint_every"),
    "save_total_limit": "train.keep_checkpoints",
    "eval_steps": "train.evaluate_every",
    **dict.fromkeys(
        (
            "batch_size",
            "micro_batch_size",
            "per_device_train_batch_size",
            "train_batch_size",
            "gradient_accumulation_steps",
        ),
        "train.examples_per_step, over all ranks, and train.tokens_per_micro_batch",
    ),
    **dict.fromkeys(
        ("max_seq_length", "max_seq_len", "max_model_len", "cutoff_len", "sequence_len"), "data.max_length"
    ),
    **dict.fromkeys(("r", "lora_r", "lora_rank"), "lora.rank"),
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    **dict.fromkeys(("target_modules", "lora_target", "lora_target_modules", "lora_target_linear"), "lora.targets"),
    "target_parameters": "lora.experts: true",
    **dict.fromkeys(("model_name_or_path", "model_name"), "model.base"),
    **dict.fromkeys(("attn_implementation", "flash_attention", "flash_attn", "attn_impl"), "model.attention"),
    "torch_dtype": "model.dtype",
    **dict.fromkeys(("ref_model", "reference_model"), "model.base with reference.adapter"),
    **dict.fromkeys(
        ("adapter_name_or_path", "lora_model_dir", "resume_adapter"),
        "start.adapter, or reference.adapter where it is the reference too",
    ),
    "precompute_ref_log_probs": "reference.cache",
    "output_dir": "output",
    **dict.fromkeys(("report_to", "use_wandb", "wandb_project"), "tracking"),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), "train.evaluate_every"),
    **dict.fromkeys(("val_size", "val_set_size", "test_datasets", "eval_dataset"), "data.held_out.0.path"),
    "data_seed": "train.seed",
    **dict.fromkeys(("template", "chat_template_path"), "model.chat_template"),
    **dict.fromkeys(("dataset", "dataset_name", "dataset_path", "train_file"), "data.sources.0.path"),
    "dataset_split": "data.sources.0.split",
    "bf16": "model.dtype: bfloat16",
    **dict.fromkeys(("packing", "sample_packing"), "train.tokens_per_micro_batch; rows are always packed"),
}
"""Our keys for settings of other stacks, by their names there."""

_NOT_HERE: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("load_in_4bit", "load_in_8bit", "use_4bit", "use_8bit", "qlora", "use_qlora"),
            *(
                "quantization_bit",
                "quantization_config",
                "quantization_method",
                "quant_method",
                "quant_type",
                "bnb_config",
            ),
            *("bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant", "double_quantization"),
        ),
        "a base in 4 bits is model.quantization: nf4 (QLoRA, with double quantisation); there is no other, and none in "
        "8 bits (`uft plan` says what fits)",
    ),
    **dict.fromkeys(
        ("optim", "optimizer"), "the optimiser is AdamW; its keys are train.lr, train.betas and train.weight_decay"
    ),
    **dict.fromkeys(
        ("use_rslora", "lora_use_rslora", "use_dora", "lora_use_dora", "use_peft", "finetuning_type"),
        "a plain LoRA is trained, of lora.rank and lora.alpha",
    ),
    **dict.fromkeys(
        ("train_on_inputs", "train_on_prompt", "mask_history", "assistant_only_loss", "completion_only_loss"),
        "only responses are learned, never prompts; a turn of the data is left out by `train: false`",
    ),
    **dict.fromkeys(("neftune_noise_alpha", "neftune_alpha"), "no noise is added to the embeddings"),
    "resume_from_checkpoint": "`uft train RECIPE --resume` goes on from the last checkpoint",
    "logging_steps": "every step is recorded",
    "fp16": "no float16 training; take model.dtype: bfloat16, or float32",
}
"""Settings of other stacks that do not exist here, and what to do instead."""

NULL_MEANS: Mapping[str, str] = {"lora": "all parameters are trained, without adapters"}
KEYS_MEAN: Mapping[str, str] = {"lora": "adapters are trained instead"}
"""What a run does without a section that may be null, and with its keys."""

_NEAR_ELSEWHERE = 0.8
"""Least likeness of a name in another section or of another stack; within a section difflib's own 0.6 is enough."""


def unknown_name(given: str, known: Iterable[str]) -> str:
    """The message for an unknown name: the nearest known name, and all known names."""
    known = tuple(known)
    near = difflib.get_close_matches(given, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown name {given!r}; {hint}allowed: {', '.join(known)}"


def unknown_loss(given: str, known: Iterable[str]) -> str:
    """The message for an unknown loss: our name for it (case is ignored), or the nearest known name."""
    known = tuple(known)
    ours = _LOSSES_ELSEWHERE.get(given.lower(), given.lower() if given.lower() in known else None)
    return f"unknown name {given!r}; here it is {ours}" if ours else unknown_name(given, known)


def unknown_key(given: str, known: Iterable[str], elsewhere: Iterable[str] = ()) -> str:
    """The message for an unknown key: the nearest known key, our name for it, or all keys known at this place.

    Args:
        known: the names that are known at this place.
        elsewhere: the whole keys of all sections, such as train.lr.
    """
    known, of_all = tuple(known), tuple(elsewhere)
    word = given.lower()
    if word in _NOT_HERE:
        return f"unknown key; {_NOT_HERE[word]}"
    same = [key for key in of_all if _leaf(key) in (given, word)]
    if not same and word in _KEYS_ELSEWHERE:
        return f"unknown key; here it is {_KEYS_ELSEWHERE[word]}"
    near = same or difflib.get_close_matches(given, known, n=1) or _near_leaves(given, of_all)
    if not near and (alias := difflib.get_close_matches(word, _KEYS_ELSEWHERE, n=1, cutoff=_NEAR_ELSEWHERE)):
        return f"unknown key; did you mean {alias[0]!r}? Here it is {_KEYS_ELSEWHERE[alias[0]]}"
    if not near:
        return f"unknown key; known here: {', '.join(known)}"
    return f"unknown key; did you mean {' or '.join(map(repr, near))}?"


def _near_leaves(given: str, keys: tuple[str, ...]) -> list[str]:
    near = difflib.get_close_matches(given, {_leaf(key): None for key in keys}, n=1, cutoff=_NEAR_ELSEWHERE)
    return [key for key in keys if _leaf(key) in near]


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]
