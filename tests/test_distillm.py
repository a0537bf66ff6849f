"""DistiLLM: each speaker's rows by their own skewed divergence, and what it becomes without the skew."""

import pytest
import torch
from tabled import V, gradient, hear, packed, random_rollouts, random_table, relative, table

from opd.divergences import Divergence
from opd.errors import UsageError
from opd.loss import match
from opd.method import TEACHER, both, build


def rows(method):
    return hear(packed(random_rollouts(method.speaks.names)), method.needs, {"*": random_table(2)})


def mixtures(logits, teacher, alpha):
    """KL(p || alpha p + (1 - alpha) q) and KL(q || (1 - alpha) p + alpha q) at every state, from probabilities."""
    q, p = logits.softmax(-1), table(teacher).detach().exp()
    forward = (p * (p / (alpha * p + (1 - alpha) * q)).log()).sum(-1)
    reverse = (q * (q / ((1 - alpha) * p + alpha * q)).log()).sum(-1)
    return forward, reverse


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_each_half_is_averaged_over_its_own_speaker(alpha):
    model, method = random_table(1), build("distillm", {"alpha": alpha})
    batch = rows(method)
    got, _ = gradient(model, batch, method.loss)
    logits = model.module.model.logits_SV.detach().clone().requires_grad_()
    forward, reverse = mixtures(logits, random_table(2), alpha)
    places = zip(batch.row_N.tolist(), batch.position_N.tolist(), strict=True)
    at = torch.tensor([(i - 1) * V + batch.rollouts[r].tokens[i - 1] for r, i in places])
    taught = torch.tensor([batch.rollouts[r].speaker == "teacher" for r in batch.row_N.tolist()])
    assert taught.any() and (~taught).any() and taught.sum() != (~taught).sum()
    (0.5 * forward[at][taught].mean() + 0.5 * reverse[at][~taught].mean()).backward()
    assert relative(got, logits.grad) < 1e-12


def test_without_a_skew_it_is_forward_and_reverse_kl():
    method = build("distillm", {"alpha": 0.0})
    plain = 0.5 * match(TEACHER, Divergence("forward_kl")).on("teacher")
    plain = plain + 0.5 * match(TEACHER, Divergence("reverse_kl")).on("student")
    batch, model = rows(method), random_table(1)
    assert relative(gradient(model, batch, method.loss)[0], gradient(model, batch, plain)[0]) < 1e-13


@pytest.mark.parametrize("name", ["skew_forward_kl", "skew_reverse_kl"])
def test_the_first_paper_is_gkd_with_a_skew(name):
    mine = build("distillm", {"form": name, "on_policy": 0.25})
    gkd = build("gkd", {"divergence": name, "alpha": 0.1, "on_policy": 0.25, "per": "token"})
    assert (mine.speaks, mine.loss) == (gkd.speaks, gkd.loss)


def test_the_teacher_must_speak_and_be_read():
    method = build("distillm")
    assert method.speaks == both("teacher", "student") and {str(j): s.name for j, s in method.needs.items()} == {
        "teacher": "DENSE"
    }
    with pytest.raises(UsageError, match="compares a distribution with itself"):
        build("distillm", {"alpha": 1.0})
