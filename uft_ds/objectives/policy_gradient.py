"""Policy gradient losses of the policy's own answers: -A log pi(y|x), with an advantage A that carries no gradient.

k answers y_i to one prompt x are drawn from the policy that the step trains (temperature 1, one gradient step), so no
ratio to an older policy appears: at that policy its gradient is that of the logarithm. s_i is the score of an answer,
l_i = log pi(y_i|x) - log pi_ref(y_i|x) its log-ratio in nats, and beta the price of a nat, in the unit of scores.

    rloo       A_i = R_i - mean of the other R_j of its prompt, R_i = s_i - beta l_i
                   = k / (k - 1) (R_i - mean R)                                        arXiv 2402.14740
    reinforce  A_i = R_i - mean R over all n own answers of the step                  2501.03262, without its std
    grpo       A_i = (s_i - mean s) / (std s + 1e-4) - beta k / (k - 1) (l_i - mean l)     2402.03300

rloo's expected gradient is exactly that of E[s] - beta KL(pi || pi_ref); reinforce's is (n - 1) / n of it, because each
answer is in its own baseline.

GRPO divides by the standard deviation of the group's scores (of the sample, as TRL does). So scores that hardly differ
count as much as scores that differ widely, and prompts that are too easy or too hard get the greatest weight
(2503.20783). As published it adds the KL as a term of the loss with a gradient of its own (Schulman's k3), whose
expectation is not the gradient of the KL. Here the KL is a detached penalty as in rloo, which has that expectation; it
is not divided by the deviation. No term is divided by the length of its answer, which 2503.20783 found to favour long
wrong answers.
"""

from __future__ import annotations

from torch import Tensor

from uft_ds.objectives.losses import OF_PROMPT, PolicyGradient

GRPO_EPSILON = 1e-4
"""Added to the standard deviation of scores, as in TRL."""


def policy_gradient_loss(logps_R: Tensor, advantages_R: Tensor) -> Tensor:
    """-A log pi(y|x) of each response; its value says nothing, its gradient is what trains.

    Args:
        logps_R: [responses], nats, summed over tokens. Carries the gradient.
        advantages_R: [responses], without gradient.
    Returns:
        [responses], in the dtype of `logps_R`.
    """
    return -advantages_R.detach() * logps_R


def advantage_of_score(
    loss: PolicyGradient, score: float, *, mean_score: float, score_std: float, num_answers: int
) -> float:
    """The advantage of an answer whose log-ratio is the mean of its group.

    Args:
        mean_score, score_std: of the group, the latter of the sample.
        num_answers: of the group, 2 or more.
    """
    above = score - mean_score
    if loss == "grpo":
        return above / (score_std + GRPO_EPSILON)
    return above * leave_one_out(num_answers) if loss == "rloo" else above


def kl_factor(loss: PolicyGradient, beta: float, num_answers: int) -> float:
    """What one nat above the group's mean log-ratio takes from the advantage; arguments as above."""
    return beta * leave_one_out(num_answers) if loss in OF_PROMPT else beta


def leave_one_out(num_answers: int) -> float:
    """k / (k - 1): what makes value - mean of all k the value - mean of the k - 1 others."""
    return num_answers / (num_answers - 1)
