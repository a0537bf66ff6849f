"""best_of_n: only each group's winner is imitated, whoever ties or was cut."""

from dataclasses import replace

import pytest
import torch
from tabled import F64, V, gradient, packed, prefix, random_rollouts, random_table, relative, rollout, table

from opd.batch import Score
from opd.errors import OpdError
from opd.loss import nll
from opd.math.credit import best_of_group
from opd.method import CRITIC, TEACHER
from opd.methods.best_of_n import best_of_n
from opd.methods.gad import gad
from opd.types import Says

T, F = True, False


@pytest.mark.parametrize(
    ("scores", "finished", "weights"),
    [
        ([1, 3, 2], [T, T, T], [0, 3, 0]),
        ([3, 3, 2], [T, T, T], [1.5, 1.5, 0]),  # equals share
        ([2, 2, 2], [T, T, T], [0, 0, 0]),  # nobody won
        ([3, 3, 2], [F, T, T], [0, 3, 0]),  # of equals the one that ended
        ([2, 2, 2], [F, T, F], [0, 3, 0]),  # the only one that ended, scored as the others for want of a worse
        ([0, 0, 0], [F, F, F], [0, 0, 0]),  # all cut: nothing to imitate
        ([5], [T], [0]),
    ],
)
def test_who_wins(scores, finished, weights):
    """And groups do not see each other: the same beside another group, in another order."""
    score, ended = torch.tensor(scores, dtype=F64), torch.tensor(finished)
    group = torch.full((len(scores),), 7)
    assert best_of_group(score, group, ended).tolist() == weights
    beside = best_of_group(
        torch.cat([score, torch.tensor([9.0, 8.0], dtype=F64)]),
        torch.cat([group, torch.tensor([2, 2])]),
        torch.cat([ended, torch.tensor([True, True])]),
    )
    assert beside.tolist() == [*weights, 2, 0]


def scored(rows, scores):
    return replace(packed(rows), signals={CRITIC: Score(torch.tensor(scores, dtype=F64))})


def test_it_is_cross_entropy_on_the_best_rows():
    """Exactly their mean: what the others say changes nothing."""
    model, rows = random_table(1), random_rollouts(("student",))
    scores = [0.3, 0.9, 0.1, 5.0, 4.0, 4.5, -3.0, -2.0, -2.5, 0.0, 0.1, 0.2]
    best = [1, 3, 7, 11]
    batch = scored(rows, scores)
    got, stats = gradient(model, batch, best_of_n().loss, tile=3, micro=9)
    want, alone = gradient(model, packed([rows[i] for i in best]), nll().per("sequence_sum"))
    assert relative(got, want) < 1e-14 and stats["loss/nll"] == pytest.approx(alone["loss/nll"])
    shifted = scored(rows, [s + 10 * (i // 3) for i, s in enumerate(scores)])
    assert torch.equal(gradient(model, shifted, best_of_n().loss, tile=3, micro=9)[0], got)


def test_one_text_said_by_all_teaches_nothing_and_said_twice_counts_once():
    model = random_table(1)
    same = [rollout(0, "student", prefix(0), [(1, -1.0), (5, -1.0)], sample=k) for k in range(3)]
    assert gradient(model, scored(same, [2.0] * 3), best_of_n().loss)[0].norm() == 0
    other = rollout(0, "student", prefix(0), [(3, -1.0)], sample=3)
    twice = gradient(model, scored([*same[:2], other], [2.0, 2.0, 1.0]), best_of_n().loss)[0]
    once = gradient(model, scored([same[0], other], [2.0, 1.0]), best_of_n().loss)[0]
    assert relative(twice, once) < 1e-14 and once.norm() > 0


def test_a_critic_that_knows_nothing_teaches_nothing():
    """Over all answers of at most two tokens, each winning as often as it is said: summed, nothing; by the mean of each
    answer's tokens, shorter answers."""
    model = random_table(1)
    given, logp = prefix(0), table(model).detach()
    after = lambda *said: logp[(len(given) + len(said) - 1) * V + [*given, *said][-1]]
    stop = V - 1
    said = [(stop,)] + [(v, w) for v in range(V - 1) for w in range(V)]
    total = {"sequence_sum": 0.0, "sequence": 0.0}
    for y in said:
        chance = sum(after(*y[:k])[token] for k, token in enumerate(y)).exp()
        won = rollout(0, "student", given, [(token, -1.0) for token in y])
        batch = scored([won, rollout(0, "student", given, [(0, -1.0)], sample=1)], [1.0, 0.0])
        for per in total:
            total[per] = total[per] + chance * gradient(model, batch, best_of_n(per=per).loss)[0]
    assert total["sequence_sum"].abs().max() < 1e-14
    state = (len(given) - 1) * V + given[-1]
    assert total["sequence"][state, stop] < -0.01  # descended, it stops sooner


def test_a_missing_score_is_refused():
    rows = random_rollouts(("student",), prompts=1)
    with pytest.raises(OpdError, match=r"nll have no finite value for \[n \[score_critic = max of group\]\]"):
        gradient(random_table(1), scored(rows, [1.0, float("nan"), 0.0]), best_of_n().loss)


def test_the_critic_is_gads():
    ours, theirs = best_of_n(), gad(kl=0)
    assert ours.loss.learned == theirs.loss.learned and ours.needs == theirs.needs
    assert ours.needs == {CRITIC: Says.SCORE, TEACHER: Says.TEXT}
    assert str(ours.loss).startswith("mean_y Σ_t[n [score_critic = max of group] · -log π(y)] + learn(critic")
