"""The recipe's objective: what each key reaches, and which losses and keys do not go together."""

import re

import pytest
from recipes import refusal

from uft_ds.data.example import KINDS
from uft_ds.objectives.objective import KindObjective, Objective
from uft_ds.objectives.pairwise import PairConstants
from uft_ds.objectives.reward_shift import RewardShift
from uft_ds.recipe.schema import ObjectiveSection
from uft_ds.recipe.to_settings import load_settings


def test_a_loss_for_each_kind(minimal: str) -> None:
    """A map gives each kind its own loss, and weights that are not named are 1."""
    overrides = ("objective.loss={instruction: nll, score: bce}", "objective.weights={score: 0.5}")
    given = load_settings(minimal, overrides).given
    assert (given.losses_of("instruction"), given.losses_of("score")) == ({"nll": 1.0}, {"bce": 1.0})
    assert given.losses_of("pair") == {}
    assert (given.weight_of("instruction"), given.weight_of("score")) == (1.0, 0.5)
    assert load_settings(minimal, ("objective.weights=2",)).given.weight_of("pair") == 2


def test_a_kind_may_have_several_losses(minimal: str) -> None:
    """With weights; the papers' sums have names of their own."""
    given = load_settings(minimal, ("objective.loss={instruction: mse, pair: {dpo: 0.8, bce: 0.2, nll: 1}}",)).given
    assert given.losses_of("pair") == {"dpo": 0.8, "bce": 0.2, "nll": 1.0}
    assert load_settings(minimal, ("objective.loss=orpo",)).given.losses_of("pair") == {"nll": 1.0, "odds_ratio": 0.1}


def test_beta_for_each_kind(minimal: str) -> None:
    """One for all, or a map; a kind that is not named has the default."""
    given = load_settings(minimal, ("objective.beta={pair: 0.1}",)).given
    assert [given.beta_of(kind) for kind in KINDS] == [0.01, 0.01, 0.01, 0.1]
    assert load_settings(minimal, ("objective.beta=2",)).given.beta_of("score") == 2


HEAD = "objective.reward=head objective.loss=bradley_terry"


def test_the_objective_is_what_the_recipe_says(minimal: str) -> None:
    """Every key of the section reaches the losses."""
    overrides = (
        "objective.loss={score: bce, pair: {dpop: 1, robust: 2, rpo_sq: 3, mse: 4}}",
        "objective.beta={score: 0.2, pair: 0.3}", "objective.weights={pair: 3}",
        "objective.beta_schedule=cosine", "objective.beta_end=0.5", "objective.length_normalized=true",
        "objective.reward_shift=constant", "objective.reward_shift_value=-0.5",
        "objective.undesirable_weight=0.75", "objective.label_smoothing=0.2", "objective.rpo_scale=2",
        "objective.dpop_penalty=5",
    )  # fmt: skip
    sums = {"dpop": 1.0, "robust": 2.0, "rpo_sq": 3.0, "mse": 4.0}
    expected = Objective(
        {
            "instruction": KindObjective({}, 1.0, 0.01),
            "score": KindObjective({"bce": 1.0}, 1.0, 0.2),
            "binary": KindObjective({}, 1.0, 0.01),
            "pair": KindObjective(sums, 3, 0.3),
        },
        RewardShift("constant", -0.5),
        length_normalized=True,
        undesirable_weight=0.75,
        beta_schedule="cosine",
        beta_end=0.5,
        constants=PairConstants(label_smoothing=0.2, rpo_scale=2, dpop_penalty=5),
    )
    assert load_settings(minimal, overrides).objective == expected
    others = ("objective.loss={score: mse, pair: simpo}", "objective.beta={pair: 2}", "objective.simpo_margin=1.5")
    shift = ("objective.reward_shift=ema", "objective.reward_shift_decay=0.25")
    found = load_settings(minimal, (*others, *shift)).objective
    assert found.constants.simpo_margin == 1.5
    assert found.shift == RewardShift("ema", 0.0, 0.25)
    own = ("objective.loss={instruction: mse, score: rloo}", "objective.beta={score: 0.05}")
    of_own = load_settings(minimal, own).objective.of_kind["score"]
    assert of_own == KindObjective({"rloo": 1.0}, 1.0, 0.05)
    assert load_settings(minimal, ("objective.center=prompt",)).objective.center == "prompt"
    head = ("objective.reward=head", "objective.loss={pair: bradley_terry}", "objective.margin=scores")
    of_head = load_settings(minimal, (*head, "objective.centering=0.01")).objective
    assert (of_head.reward, of_head.constants) == ("head", PairConstants(score_margin=True, centering=0.01))
    further = ("objective.centering=0.01", "objective.center=prompt")
    tried = {key.partition("=")[0] for key in (*overrides, *others, *shift, *own, *head, *further)}
    assert tried == {f"objective.{name}" for name in ObjectiveSection.model_fields}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("objective.loss={score: dpo}", "objective.loss.score: 'dpo' needs pairs"),
        ("objective.loss={score: {mse: 1, simpo: 1}} objective.beta=2", "objective.loss.score: 'simpo' needs pairs"),
        (
            "objective.loss={pair: {dpo: 0}}",
            "objective.loss.pair: {'dpo': 0.0} given, expected losses with weights above 0",
        ),
        ("objective.loss={pair: {}}", "objective.loss.pair: {} given"),
        (
            "objective.loss={dpo: 1, nll: 0.2}",
            "objective.loss: {dpo: 1, nll: 0.2} given, without the kind that it is for; give it as {pair: {dpo: 1",
        ),
        ("objective.loss=[dpo, nll]", "objective.loss: ['dpo', 'nll'] given; a sum of losses is a map with weights"),
        (
            "objective.loss={pair: dpo, nll: 0.2}",
            "objective.loss: 'nll' is a loss, but the other keys are kinds; a sum is {pair: {dpo: 1, nll: 0.2}}",
        ),
        (
            "objective.loss={pair: simpo, score: mse} objective.beta=2",
            "objective.beta: 2.0 for all kinds, but simpo takes one per nat per token, mse one per nat; give a map",
        ),
        ("objective.loss={instruction: cpo}", "objective.loss.instruction: 'cpo' needs pairs"),
        ("objective.loss={pair: {orpo: 1}}", "unknown name 'orpo'; here it is {nll: 1, odds_ratio: 0.1} in a map"),
        ("objective.loss=kto", "objective.loss: unknown name 'kto'; here it is l1 with reward_shift: kl"),
        ("objective.loss=BCO", "objective.loss: unknown name 'BCO'; here it is bce with reward_shift: ema"),
        ("objective.weights=0", "objective.weights: 0 given: nothing would be learned"),
        (
            "data={max_length: 64}",
            "it would replace all of data; give its keys one by one, such as data.max_length=",
        ),
        (
            "objective.loss=ipo",
            "objective.beta: not given: the default 0.01 is per nat, ipo takes one per nat per token",
        ),
        ("objective.loss=simpo", "objective.beta: not given"),
        ("objective.length_normalized=true", "objective.beta: not given"),
        ("objective.beta={paar: 1.0}", "objective.beta: unknown name 'paar'; did you mean 'pair'?"),
        ("objective.beta={}", "objective.beta: {} given, expected a number or a map from kind"),
        ("objective.beta_schedule=linear", "objective.beta_end: not given; beta_schedule: linear needs it"),
        ("objective.beta_end=0.5", "objective.beta_end: 0.5 given, but beta_schedule is constant"),
        ("objective.reward_shift=constant", "objective.reward_shift_value: not given"),
        (
            "objective.reward_shift=kl objective.loss=dpo",
            "objective.reward_shift: 'kl' given, but no loss is pointwise",
        ),
        ("objective.reward_shift=kl train.examples_per_step=1", "objective.reward_shift: 'kl' compares the responses"),
        ("objective.loss=cdpo objective.label_smoothing=0", "0 given, with which cdpo is dpo; take dpo"),
        ("objective.loss=orpo objective.length_normalized=true", "objective.length_normalized: True given, but only"),
        ("objective.label_smoothing=0.5", "objective.label_smoothing: 0.5 given"),
        ("objective.label_smoothing=0.1", "label_smoothing: 0.1 given, but only cdpo, robust would use it"),
        ("objective.loss=cdpo", "objective.label_smoothing: not given; cdpo needs it"),
        ("objective.rpo_scale=2", "objective.rpo_scale: 2.0 given, but only rpo_bwd, rpo_fwd, rpo_sq would use it"),
        ("objective.reward_shift_decay=0.5", "objective.reward_shift_decay: 0.5 given, but only ema would use it"),
        ("objective.loss=orpo objective.beta=0.5", "objective.beta: 0.5 given, but orpo has no beta"),
        (
            "objective.loss=cpo objective.length_normalized=true objective.beta=2",
            "objective.length_normalized: true given",
        ),
        (
            "objective.loss={pair: ipo, score: mse} objective.beta={score: 0.05}",
            "objective.beta: not given for pair: the default 0.01 is per nat, ipo takes one per nat per token",
        ),
        (
            "objective.loss={pair: {dpo: 1, ipo: 0.1}} objective.beta=1",
            "objective.beta: ipo takes one per nat per token, dpo one per nat: they cannot be summed",
        ),
        ("objective.reward_shift_decay=1", "objective.reward_shift_decay: 1 given"),
        ("objective.loss=bradley_terry", "objective.loss: 'bradley_terry' compares the rewards of a head; take dpo"),
        ("objective.margin=scores", "objective.margin: scores given, but only bradley_terry would use it"),
        ("objective.centering=0.01", "objective.centering: 0.01 given, but only bradley_terry would use it"),
        ("train.head_lr=1e-4", "train.head_lr: 0.0001 given, but only objective.reward: head has a head"),
        (
            "objective.loss=rloo",
            "objective.loss: 'rloo' trains on the policy's own answers, which are of kind score; give it as {score: r",
        ),
        ("objective.loss={pair: grpo}", "objective.loss.pair: 'grpo' trains on the policy's own answers, which are of"),
        (
            "objective.loss={score: {rloo: 1, mse: 0.5}}",
            "objective.loss.score: 'rloo' given in a sum; the kind's beta is its price of a nat, which other losses",
        ),
        (
            "objective.loss={instruction: mse, score: rloo} objective.length_normalized=true objective.beta=2",
            "objective.length_normalized: true given, but rloo compares sums over tokens",
        ),
        (
            "objective.center=prompt objective.loss=dpo",
            "objective.center: prompt given, but no kind other than instruc",
        ),
        (
            "objective.center=prompt objective.loss={instruction: mse, score: rloo}",
            "objective.center: prompt given, but no kind other than instruction has a pointwise loss",
        ),
        (
            "objective.center=prompt objective.loss={instruction: mse, score: bce}",
            "objective.center: prompt given, but its targets, 1/2 + score - mean score, may leave [0, 1], and then bce",
        ),
        (
            "objective.center=prompt objective.reward_shift=ema",
            "objective.center: prompt given, which is a reward shift itself; leave out reward_shift: ema",
        ),
        ("objective.center=prompt train.examples_per_step=1", "objective.center: prompt compares the responses of a"),
        (
            "objective.loss={instruction: mse, score: grpo} generator.temperature=0.7",
            "generator.temperature: 0.7 given, but the gradient of grpo is that of answers drawn from the policy",
        ),
        (
            "objective.loss={instruction: mse, score: rloo} generator.top_p=0.9",
            "generator.top_p: 0.9 given, but the gradient of rloo",
        ),
        (f"{HEAD} objective.center=prompt", "objective.center: prompt given, but only implicit rewards have it"),
        (f"{HEAD} objective.loss={{score: rloo}}", "objective.loss: 'rloo' is not a loss of reward: head"),
        (f"{HEAD} objective.loss=dpo", "objective.loss: 'dpo' is not a loss of reward: head (bce, bradley_terry, mse)"),
        (f"{HEAD} objective.loss=nll", "objective.loss: 'nll' is not a loss of reward: head"),
        (f"{HEAD} objective.beta=0.1", "objective.beta: 0.1 given, but only implicit rewards have it; leave it out"),
        (f"{HEAD} objective.reward_shift=ema", "objective.reward_shift: ema given, but only implicit rewards"),
        (f"{HEAD} objective.beta_schedule=linear", "objective.beta_schedule: linear given, but only implicit rewards"),
        (f"{HEAD} objective.length_normalized=true", "objective.length_normalized: True given, but only implicit"),
        (f"{HEAD} objective.loss=bce objective.margin=scores", "objective.margin: scores given, but only bradley"),
        (f"{HEAD} objective.loss={{score: bradley_terry}}", "objective.loss.score: 'bradley_terry' needs pairs"),
        (f"{HEAD} reference.adapter=runs/sft", "reference.adapter: runs/sft given, but objective.reward: head has no"),
        (f"{HEAD} reference.mode=separate", "reference.mode: separate given, but objective.reward: head has no"),
        (f"{HEAD} train.samples=2", "train.samples: 2 given, but a reward model answers no prompts; leave it out"),
        (f"{HEAD} train.keep_best=held_out/logp_chosen/pair", "which a reward model lacks; take held_out/pair_acc"),
        (f"{HEAD} model.logits_mib=8", "model.logits_mib: 8 given, but a reward model has no logits; leave it out"),
    ],
)
def test_an_objective_that_cannot_be_is_refused(minimal: str, overrides: str, message: str) -> None:
    """A key that would change nothing, or a default that would be far off, is no run."""
    assert message in refusal(minimal, *re.split(r" (?=(?:objective|train|reference|model|generator)\.)", overrides))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.loss={}", "objective.loss: no loss for any kind"),
        ("objective.loss={instruction: nll, scor: mse}", "objective.loss: unknown name 'scor'; did you mean 'score'?"),
        (
            "objective.loss={instruction: nll, score: msee}",
            "objective.loss.score: unknown name 'msee'; did you mean 'mse'?",
        ),
        ("objective.weights={scores: 1.0}", "objective.weights: unknown name 'scores'; did you mean 'score'?"),
        ("objective.weights={score: .nan}", "objective.weights: nan given, must be finite"),
        ("objective.weights=-1.0", "objective.weights: -1.0 given"),
        ("objective.weights=.inf", "objective.weights: inf given"),
    ],
)
def test_a_bad_map_of_kinds_is_refused(minimal: str, override: str, message: str) -> None:
    """Maps from kind know the kinds and name at least one, and weights are finite and not negative."""
    assert message in refusal(minimal, override)


def test_a_beta_for_another_kind_is_no_beta_for_orpo(minimal: str) -> None:
    """One number serves the kinds that read it; orpo's own would be a mistake."""
    given = load_settings(minimal, ("objective.loss={pair: orpo, score: mse}", "objective.beta=0.1")).given
    assert given.beta_of("score") == 0.1
    own = refusal(minimal, "objective.loss={pair: orpo, score: mse}", "objective.beta={pair: 0.1}")
    assert "objective.beta: 0.1 given, but orpo has no beta" in own


def test_a_misspelt_kind_is_one_problem(minimal: str) -> None:
    """Nothing is said of what would only follow from it."""
    assert len(refusal(minimal, "objective.beta={paar: 1.0}", "objective.loss=ipo").splitlines()) == 1
    assert len(refusal(minimal, "objective.loss={paar: mse, pair: ipo}").splitlines()) == 1
    assert len(refusal(minimal, "data.sources.0.share=20%").splitlines()) == 1, "one line for a union's members"
