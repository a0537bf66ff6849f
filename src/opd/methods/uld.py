"""Universal logit distillation: cross entropy, and sorted distributions of teachers with any tokenizer."""

from __future__ import annotations

from opd.loss import Per, match, nll
from opd.method import RETOKENIZED_TEACHER, Coefficient, Method, Positive, one
from opd.spans import ranked


def uld(*, distance: Coefficient = 0.5, temperature: Positive = 1.0, per: Per = "sequence") -> Method:
    """Cross entropy on recorded answers, and the distance of sorted probabilities to a teacher of any tokenizer.

    Speaks: data. Judge: teacher, which reads the same text in its own tokens behind its own rendering of the prompt;
    says DENSE.
    Loss: mean over answers of the mean over tokens of -log student(y_t) + `distance` * sum_i |p_(i) - q_(i)|, both
    distributions sorted by size, the shorter padded with zeros; `temperature` divides both sides' logits in the latter.
    The k-th token of one stands beside the k-th of the other, up to the end of the shorter.
    Gradient: through the student at each answer token; of the sorted part, through the order as it is.
    Source: ULD, arXiv 2402.12030, eq. 4 and 5. The distance is the Wasserstein-1 distance under a uniform cost.
    Differs from the paper in: `distance`, 1.5 in the paper's code. It does not see *which* token is likely: it is 0
    between a distribution and any permutation of it, and holds a student to the tokens that it ranks first already. On
    tables learned from nothing 1.5 never gets past that, and 0.5 does. Equal probabilities share their gradient,
    whatever order a sort leaves them in. Where the teacher's answer is shorter the distance is averaged over its
    length, the cross entropy over the student's.
    """
    loss = nll().per(per) + distance * match(RETOKENIZED_TEACHER, ranked(temperature)).per(per)
    return Method(speaks=one("data"), loss=loss, goal="text")
