"""On-policy distillation from a teacher of another tokenizer: spans of text, mapped tokens, and the rest by size."""

from __future__ import annotations

from typing import Literal

from opd.credits import log_ratio
from opd.divergences import Divergence
from opd.loss import Loss, Per, match, push
from opd.method import RETOKENIZED_TEACHER, Method, NotNegative, Positive, Share, mixture
from opd.spans import hybrid


def gold(
    *,
    form: Literal["match", "push"] = "match",
    on_policy: Share = 1.0,
    beta: Share = 0.5,
    mapped: NotNegative | None = None,
    rest: NotNegative | None = None,
    temperature: Positive = 1.0,
    stop: bool = True,
    per: Per = "sequence",
) -> Method:
    """The teacher reads the student's text in its own tokens; both are compared where their tokens end together.

    Speaks: student on a share `on_policy` of the prompts, data on the rest. Judge: teacher, which may have any
    tokenizer and reads the text behind its own rendering of the prompt; says DENSE (at `form: push`, TOKEN).
    Loss: mean over rollouts of the mean over spans of w_m JSD_beta(p, q) over the tokens that both vocabularies have +
    w_u sum_i |p_(i) - q_(i)| over the others, sorted by size. A span is the shortest run of the student's tokens and of
    the teacher's that cover the same bytes; p and q are "its tokens as they are, then any last one", by the chain rule,
    not normalised (as in TRL's hybrid): they sum to less than 1 in a span of several tokens. Last tokens are compared
    where they make the span the same text. (A token that both have stands for all text that begins so where its owner
    has no longer one: a student with longer tokens than the teacher's is drawn to shorter ones.) `mapped` and `rest`
    are w_m and w_u; unless given, the share of the teacher's vocabulary that is mapped (tokens that spell the same
    bytes, and the stop tokens), and the rest of 1. `stop: false` leaves the stop token out. `form: push` is `token_opd`
    on spans: each token of a span has the credit log teacher(span) - log student(span), and there is no vocabulary in
    memory.
    Gradient: through the student's distribution at the last token of a span, and its log-probability of those before.
    Source: GOLD, Hugging Face (2025), and TRL's `GOLDTrainer`; ULD, arXiv 2402.12030, for the sorted part.
    Differs from the paper in: the chain rule is TRL's "bayesian" merge; its default, "observed", reads every
    distribution one token late (position k for token k, which is what predicts k + 1). TRL compares last tokens by name
    whatever stands before them: where a student says "ab" and the teacher "a", "b", it teaches the student to say "b"
    as often as the teacher says "ab" (on the built-in world: from 68 % right to none within 62 steps; here to 96 % in
    100). Spans that do not meet are masked, not paired; tokens map by the bytes they spell. Probabilities are not
    clamped at 1e-8; equal ones share the sorted part's gradient. `on_policy` is 0.5 in TRL, and the stop token is left
    out there.
    """
    if form == "push":
        if (beta, mapped, rest, temperature, stop) != (0.5, None, None, 1.0, True):
            raise ValueError(
                "form: push reads one number a span: beta, mapped, rest, temperature and stop are of match"
            )
        loss: Loss = push(log_ratio(RETOKENIZED_TEACHER, "behaviour"))
    else:
        if beta in (0.0, 1.0):
            raise ValueError(f"the JSD with beta = {beta:g} is zero everywhere: choose one between 0 and 1")
        loss = match(
            RETOKENIZED_TEACHER,
            hybrid(Divergence("jsd", (("beta", beta),), temperature), mapped=mapped, rest=rest, stop=stop),
        )
    return Method(speaks=mixture(student=on_policy, data=1 - on_policy), loss=loss.per(per))
