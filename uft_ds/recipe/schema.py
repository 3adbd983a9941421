"""The recipe: one strict, typed tree of everything that defines a run.

`recipe/file.py` reads it from YAML. `recipe/to_settings.py` turns it into plain values; no
module below reads this tree.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from uft_ds.objectives.reference import HowForwarded, RewardBy
from uft_ds.objectives.reward_shift import Center, ShiftName
from uft_ds.recipe.combinations import impossible
from uft_ds.recipe.online import GeneratorSection, ScoreBySection, scored_by
from uft_ds.recipe.rules import DEFAULT_BETA, GivenObjective, with_kinds
from uft_ds.recipe.section import (
    INT32,
    FiniteFloat,
    Location,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    UnitInterval,
)
from uft_ds.recipe.tasks import EvaluateSection


class ModelSection(Section):
    base: Location
    """The base model: a local folder in Hugging Face's layout, or a hub name."""
    revision: str | None = None
    """Commit or tag of a hub model."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the frozen base weights and of the activations."""
    quantization: Literal["nf4"] | None = None
    """nf4: the base's linear layers in 4 bits (QLoRA), 0.516 bytes a weight instead of 2; base and reference are then
    the rounded model, and so is what is converted. Adapters alone can be trained; needs the extra nf4. null: none."""
    attention: Literal["auto", "packed", "flash_attention_2", "sdpa", "eager"] = "auto"
    """`packed`: each sequence of a row by itself, without a mask of all tokens. `auto`: packed for the families that
    the tests cover; else flash_attention_2 if it is installed, a GPU is present and dtype is bfloat16; else sdpa."""
    chat_template: Location | None = None
    """Path of a Jinja chat template, to be used instead of the tokenizer's own or if it has none."""
    gradient_checkpointing: bool | Literal["selective", "auto"] = True
    """What of a layer is computed again in the backward pass instead of being kept. true: all of it. selective: what
    costs little (norms, activations, products); the results of matrix products and of the attention are kept, which
    saves a third of the policy's operations. false: nothing. auto: the least of these three for which there is memory,
    as `uft plan` counts it, with a tenth to spare."""
    activation_offload: bool = False
    """Keep the layer inputs that gradient checkpointing saves in host memory."""
    logits_mib: Positive | None = None
    """Memory for logits at one time, in MiB, both streams together; null: 8 on a CPU, 512 on a GPU."""


class LoraSection(Section):
    rank: Positive = 16
    """Rank of every adapter pair."""
    alpha: PositiveFloat = 16.0
    """Adapters are scaled by alpha / rank."""
    dropout: float = 0.0
    """Must be 0: dropout makes the log-ratio noise, which B = 0 hides at the start."""
    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """The linear layers that get an adapter: all except the head, or a list of module names."""
    experts: bool = False
    """Adapt a mixture's routed experts too, each by its own pair of this rank. Not for online sources, whose servers
    take no such adapters, and not for reward models."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the trainable adapter weights."""


class SourceSection(Section):
    format: str
    """The format of the rows; `uft data formats` lists the names."""
    path: Location
    """A local file or folder (jsonl, json, csv, each also .gz or .zst; parquet, arrow), or a hub name: owner/name, or
    owner/name/folder for one folder of it."""
    split: str | None = None
    """Split of a hub data set; in a folder, only files whose names begin with it are read."""
    where: dict[str, str | int | float | bool] = {}
    """Take only rows whose columns have these values."""
    columns: dict[str, str | None] = {}
    """Names of the data's columns where they are not the format's: {prompt: question, response: answer}, the format's
    name first. Null leaves a column out: {system: null}. `where` takes the names in the data."""
    examples: Positive | None = None
    """Number of responses to take, drawn by the seed; null: all."""
    epochs: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    """Number of passes over the source in one epoch of the mixture, at most a million; null: 1."""
    share: UnitInterval | list[Annotated[list[UnitInterval], Field(min_length=2, max_length=2)]] | None = None
    """Share of the mixture's responses; the source is repeated as needed. Or a schedule [[progress, share], ...]:
    progress through the run from 0 to 1, with linear interpolation."""
    score: UnitInterval | None = None
    """Score of rows that have no score; null: 1 for instruction data."""
    score_range: Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)] | None = None
    """[lowest, highest] score that the rows may have, which are mapped to 0 and 1, linearly between; null: the scale of
    the format, 0 to 1 in jsonl. A score outside is a bad row. score_map follows."""
    score_map: Literal["quantile"] | Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)] | None = None
    """Maps the source's scores. [scale, offset]: scale * score + offset, which must stay within 0 and 1. quantile: the
    share of the source's responses with a lower score (equal scores count half)."""
    pairs: Literal["keep", "split"] = "keep"
    """keep: the two sides of a pair stay together, as kind `pair`. split: each side is a scored response (UNA)."""
    mixed_kinds: bool = False
    """Accept files whose rows are of several kinds (instruction, score, binary, pair); each row's keys decide. A row
    that has lost its score then counts as an instruction, with score 1."""
    allow_one_score: bool = False
    """Accept feedback in which all responses have the same score."""
    answers: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Number of answers that the policy gives to each prompt, for `format: prompts`: an online source."""
    score_by: Annotated[ScoreBySection | None, BeforeValidator(scored_by)] = None
    """What scores these answers, for `format: prompts`. A text alone is its `by`."""


class DataSection(Section):
    max_length: Annotated[int, Field(ge=8, lt=INT32)] = 2048
    """Longest sequence, in tokens."""
    too_long: Literal["drop", "trim_prompt", "refuse"] = "drop"
    """What happens to a response that ends past max_length. drop: it is left out. trim_prompt: it gets only the end of
    its prompt (whole turns, then the end of the question). refuse: the source is refused. A response is never cut."""
    on_bad_row: Literal["refuse", "quarantine"] = "refuse"
    """What happens to a row that cannot be read. refuse: the source is refused. quarantine: the row is left out and
    written to a file."""
    max_quarantined: UnitInterval = 0.01
    """Largest share of a source's rows that may be quarantined."""
    merge_conversations: bool = True
    """Make a conversation of k assistant turns one sequence with k responses (the same loss, one forward)."""
    share_prompts: bool = True
    """Draw the answers to one prompt into the same step, where they follow each other in the data, and forward their
    prompt once (the same loss). false: each row is drawn by itself, and each sequence forwards its own prompt."""
    workers: Positive | None = None
    """Number of processes that tokenise; null: one per core."""
    cache_dir: Location | None = None
    """Folder in which runs share tokenised sources; null: uft_ds/tokenized in the user's cache folder."""
    sources: Annotated[list[SourceSection], Field(min_length=1)]
    """The training mixture."""
    held_out: list[SourceSection] = []
    """Evaluated during and after training, never trained on."""


class ObjectiveSection(Section):
    loss: Annotated[str | dict[str, str | dict[str, float]], BeforeValidator(with_kinds)] = "mse"
    """One name for all kinds, or a map from kind to a name, or to a map from names to weights: {pair: {dpo: 1, nll:
    0.2}}. Pointwise: mse (UFT), bce, l1, raw. Pairwise: dpo, cdpo, robust, ipo, hinge, rpo_sq, rpo_fwd, rpo_bwd, dpop;
    without reference simpo, orpo, cpo. Likelihood: nll (SFT), nll_sum. Of the policy's own answers, {score: NAME}:
    rloo, reinforce, grpo. With `reward: head`: bradley_terry, bce, mse."""
    reward: RewardBy = "implicit"
    """What the reward of a response is. implicit: beta * its log-ratio, of a policy. head: the value of a scalar head
    at its last token, which makes a reward model: adapters and head are trained, and there is no reference."""
    beta: PositiveFloat | dict[str, PositiveFloat] = DEFAULT_BETA
    """Implicit reward per nat of log-ratio: one value, or a map from kind to value; a kind that is not named has the
    default. For rloo, reinforce and grpo the price of a nat of KL, in the unit of scores."""
    beta_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How beta changes over the run."""
    beta_end: PositiveFloat = 1.0
    """Factor by which a schedule multiplies beta at the last step."""
    length_normalized: bool = False
    """Log-ratios are means over a response's tokens, not sums; beta is then per nat per token, and must be given."""
    reward_shift: ShiftName = "none"
    """Value subtracted from the implicit rewards of pointwise losses. ema: their running mean (BCO). kl: the reward of
    mismatched prompts and responses (KTO), which costs one more forward pass of both streams. prompt_mean: the mean
    over the step's responses to the same prompt; those that the packing divides cost one more forward pass."""
    reward_shift_value: FiniteFloat = 0.0
    """The shift, for `reward_shift: constant`."""
    reward_shift_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the running mean: the part that is kept at each step, for `reward_shift: ema`."""
    center: Center = "none"
    """prompt: compare the answers to one prompt with each other: reward - mean reward with 1/2 + score - mean score, in
    mse, l1 and raw, where a step has two answers or more. Of instruction data nothing is centred. It costs what
    `prompt_mean` does, which it replaces."""
    weights: float | dict[str, float] = 1.0
    """Weight of the losses: one value, or a map from kind to value; a kind that is not named has weight 1."""
    undesirable_weight: NonNegativeFloat = 1.0
    """Weight of binary responses labelled false, against 1 for those labelled true (KTO)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = None
    """Probability that a preference is reversed; cdpo and robust need it."""
    rpo_scale: PositiveFloat = 1.0
    """Factor of the difference of a pair's scores, for rpo_sq, rpo_fwd and rpo_bwd."""
    dpop_penalty: NonNegativeFloat = 50.0
    """Weight of the penalty for a lower likelihood of the chosen response, for dpop."""
    simpo_margin: NonNegativeFloat = 0.5
    """Margin by which the chosen reward must exceed the rejected one, for simpo."""
    margin: Literal["none", "scores"] = "none"
    """Margin by which the chosen reward must exceed the rejected one, for bradley_terry. scores: the difference of the
    pair's scores, which are between 0 and 1."""
    centering: NonNegativeFloat = 0.0
    """Coefficient of the mean of (chosen + rejected reward)^2, for bradley_terry, which keeps rewards around 0; 0.01 is
    usual."""

    @property
    def given(self) -> GivenObjective:
        """The same values as plain values, and the keys that the recipe names."""
        fields = type(self).model_fields
        values = {key: getattr(self, key) for key in fields}
        changed = frozenset(key for key, value in values.items() if value != fields[key].default)
        return GivenObjective(**values, named=frozenset(self.model_fields_set), changed=changed)


class ReferenceSection(Section):
    mode: HowForwarded = "lockstep"
    """lockstep: each layer is visited once for policy and reference (Gemma 2, Gemma 3, GPT-NeoX, Granite, Llama,
    Mistral, Mixtral, OLMo 2, OLMoE, Phi-3, Qwen2, Qwen2-MoE, Qwen2.5-VL, Qwen3, Qwen3-MoE). separate: a second forward
    with the adapters off, inside the same root call; for other models. With `lora: null` the reference has weights of
    its own, and is always forwarded by itself."""
    cache: bool = True
    """Cache the reference's log-probs of each response, so that neither this run nor another computes them again.
    false with `lora: null`: a frozen copy of the base is forwarded in each step instead."""
    cache_dir: Location | None = None
    """Folder in which runs share these log-probs; null: uft_ds/reference in the user's cache folder."""
    adapter: Location | None = None
    """A frozen adapter: with it the base is the reference, and the policy starts from it. An adapter's folder, a
    checkpoint or a run; its rank, alpha, targets and experts must be those of lora."""
    step_zero_tolerance: NonNegativeFloat = 0.0
    """Largest log-ratio, in nats, that is accepted before the first step. It is exactly 0 by design; GPU
    kernels that choose another algorithm without gradients may need more."""


class StartSection(Section):
    adapter: Location | None = None
    """An adapter that the policy starts from, while the base stays the reference; not together with reference.adapter,
    which is the start and the reference. An adapter's folder, a checkpoint or a run; its rank, alpha, targets
    and experts must be those of lora."""


class TrainSection(Section):
    examples_per_step: Annotated[int, Field(gt=0, le=2**20)] = 64
    """Number of responses of an optimiser step, over all ranks and micro-batches; at most a million (2^20)."""
    tokens_per_micro_batch: Annotated[int, Field(ge=8, lt=INT32)] = 16384
    """Largest number of tokens that a rank forwards at once."""
    epochs: Positive = 1
    """Number of passes over the mixture; ignored if steps is given. A resumed run may change it."""
    steps: Positive | None = None
    """Number of optimiser steps; the mixture is repeated as often as needed. A resumed run may change it."""
    lr: PositiveFloat = 3.0e-5
    """Peak learning rate of AdamW."""
    head_lr: PositiveFloat | None = None
    """Peak learning rate of a reward model's head, `objective.reward: head`; null: lr."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up; cosine and linear end at 0."""
    warmup: UnitInterval = 0.1
    """Share of all steps over which the learning rate rises linearly from 0."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """AdamW's decay rates of the two moments. 0.95 for the second suits runs of few steps; the paper states none."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are clipped to this norm."""
    max_skipped_steps: Annotated[int, Field(ge=0, lt=INT32)] = 5
    """Steps with a non-finite loss or gradient are skipped; more than this number of them ends the run."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Seed of the data order and of the adapters' initial values, below 2^63."""
    deterministic: bool = True
    """Use deterministic kernels only, and refuse an operation that has no such kernel."""
    checkpoint_every: Positive = 200
    """Number of steps between checkpoints; one is always written at the end."""
    keep_checkpoints: Positive = 3
    """Number of newest checkpoints that are kept."""
    keep_best: str | None = None
    """A held-out metric, such as held_out/loss: the checkpoint with its best value is kept, too. The best value is the
    lowest for losses and errors; the highest for pair_accuracy, pair_margin, rank_correlation, logp_chosen and
    implicit_reward_chosen; the nearest to 0 for length_correlation. Or tasks/NAME/score of evaluate.tasks: the highest.
    """
    evaluate_every: Positive = 100
    """Number of steps between evaluations of the held-out data; one always follows the last step."""
    samples: Annotated[int, Field(ge=0, le=4096)] = 0
    """Number of held-out prompts that the policy answers before the first step and at each evaluation, by greedy
    decoding; the answers are in samples.jsonl and in the report. They change nothing of the training."""
    sample_tokens: Positive = 128
    """Largest number of tokens of such an answer."""


class LaunchSection(Section):
    ranks: Literal["auto"] | Positive = "auto"
    """Number of processes on this machine; auto: one per GPU, two on a CPU."""
    sequence_parallel: Positive = 1
    """Number of ranks that compute each row together, a part of its tokens each, and exchange them round the attention:
    for sequences that are too long for one. tokens_per_micro_batch is what one rank computes: a row, and with it the
    longest sequence, may have as many times that. It divides the number of ranks and the model's attention heads."""
    collective_timeout_minutes: Annotated[float, Field(gt=0, le=525_600, allow_inf_nan=False)] = 30.0
    """A rank that waits longer than this for the other ranks ends the run; at most a year."""


COMBINATIONS_CHECKED = {"combinations": "checked"}
"""Validation context of a recipe whose combinations of keys have been checked before; only paths are respelt."""


class Recipe(Section):
    name: str
    """Name of the run."""
    model: ModelSection
    lora: LoraSection | None = LoraSection()
    """null: no adapters, all parameters of the base are trained. The reference is then the cache of its log-probs,
    which is filled before the first step; or, with `reference.cache: false`, `reward_shift: kl` or online sources, a
    frozen copy of the base, which under ZeRO-3 lies in host memory."""
    data: DataSection
    objective: ObjectiveSection = ObjectiveSection()
    reference: ReferenceSection = ReferenceSection()
    start: StartSection = StartSection()
    generator: GeneratorSection = GeneratorSection()
    evaluate: EvaluateSection = EvaluateSection()
    train: TrainSection = TrainSection()
    launch: LaunchSection = LaunchSection()
    tracking: list[Literal["tensorboard", "wandb"]] = ["tensorboard"]
    """Trackers that receive the metrics, besides metrics.jsonl."""
    deepspeed: Location = "zero3"
    """Name of a file in ds_configs/, or path of a DeepSpeed JSON file."""
    output: Location
    """The run's folder."""

    @model_validator(mode="after")
    def _combinations(self, info: ValidationInfo) -> Recipe:
        if info.context == COMBINATIONS_CHECKED:
            return self
        problems = [f"{key}: {problem}" for key, problem in impossible(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self
