"""What is observed beside the loss, against numbers done by hand or naively in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tabled import F64, V, gradient, hear, packed, prompt, random_rollouts, random_table, table

from opd import observe
from opd.batch import Batch
from opd.credits import log_ratio
from opd.divergences import Divergence
from opd.gates import band, unsure
from opd.loss import match, push
from opd.math.agreement import overlap
from opd.math.divergence import entropy
from opd.method import TEACHER, build
from opd.metrics import refuses
from opd.student import Optim, Student
from opd.tally import Tally, over_updates
from opd.texts import copied_share, described
from opd.types import Message, Prompt
from opd.views import View

S = torch.tensor([[2.0, 1.0, 0.5, -1.0, 0.0]], dtype=F64).log_softmax(-1)
T = torch.tensor([[0.5, 2.5, 1.0, -2.0, 0.3]], dtype=F64).log_softmax(-1)


# --- overlap: the golden numbers, and by sets -------------------------------------------------------------------------


def test_overlap_has_the_golden_numbers():
    two, three = overlap(S, T, 2), overlap(S, T, 3)
    assert (float(two.ratio_n), float(two.advantage_n)) == (0.5, 0.0)
    assert float(three.ratio_n) == 1.0
    assert float(three.advantage_n) == pytest.approx(-0.28927549, abs=1e-8)
    assert float(three.student_mass_n) == pytest.approx(0.89577219, abs=1e-8)
    assert float(three.teacher_mass_n) == pytest.approx(0.91764793, abs=1e-8)
    assert float((entropy(T) - entropy(S)).abs()) == pytest.approx(0.20683127, abs=1e-8)


def likeliest(p: list[float], k: int) -> set[int]:
    return set(sorted(range(len(p)), key=lambda v: -p[v])[:k])


@pytest.mark.parametrize("k", [1, 3, 16, 40])
def test_overlap_is_that_of_the_two_sets(k):
    g = torch.Generator().manual_seed(k)
    s, t = (torch.randn(50, 40, generator=g, dtype=F64).log_softmax(-1) for _ in range(2))
    found = overlap(s, t, k)
    for i in range(50):
        p, q = s[i].exp().tolist(), t[i].exp().tolist()
        both = likeliest(p, k) & likeliest(q, k)
        assert float(found.ratio_n[i]) == pytest.approx(len(both) / k)
        mass_p, mass_q = sum(p[v] for v in both), sum(q[v] for v in both)
        assert float(found.student_mass_n[i]) == pytest.approx(mass_p)
        assert float(found.teacher_mass_n[i]) == pytest.approx(mass_q)
        if both:
            kl = sum(p[v] / mass_p * math.log(p[v] * mass_q / (q[v] * mass_p)) for v in both)
            assert float(found.advantage_n[i]) == pytest.approx(-kl / len(both), abs=1e-12)
        else:
            assert found.advantage_n[i].isnan()


def test_equals_overlap_wholly_and_tokens_outside_the_vocabulary_never():
    same = overlap(S, S, 16)
    assert (float(same.ratio_n), float(same.advantage_n)) == pytest.approx((1.0, 0.0), abs=1e-12)
    cut = S.clone()
    cut[0, 4] = -torch.inf
    padded = overlap(cut.log_softmax(-1), cut.log_softmax(-1), 5)
    assert (float(padded.ratio_n), float(padded.advantage_n)) == pytest.approx((0.8, 0.0), abs=1e-12)


# --- a batch, token by token ------------------------------------------------------------------------------------------


def awkward(name: str) -> tuple:
    """A batch in which every log-probability differs, with the loss of a method by name."""
    loss = build(name).loss
    batch = packed(random_rollouts(build(name).speaks.names), 1.3)
    batch = hear(batch, loss.needs, {"*": random_table(2), "reference": random_table(3)}, lambda r: 0.0)
    wobble = torch.sin(torch.arange(len(batch.row_N), dtype=F64))
    model = random_table(1)
    old = Student(model, Optim()).logp(batch) + wobble / 4
    return model, replace(batch, old_N=old, behaviour_N=batch.behaviour_N + wobble / 2), loss


def states(batch: Batch) -> torch.Tensor:
    """The row of a table model that predicts each loss token."""
    places = zip(batch.row_N.tolist(), batch.position_N.tolist(), strict=True)
    return torch.tensor([(p - 1) * V + batch.rollouts[r].tokens[p - 1] for r, p in places])


def test_distances_by_place_add_up_to_the_whole_and_are_the_tables():
    model, batch, loss = awkward("gkd")
    _, stats = gradient(model, batch, loss, tile=3, micro=9)
    at = states(batch)
    s, t = table(model).detach()[at], table(random_table(2)).detach()[at]
    kl = (s.exp() * (s - t)).sum(-1)
    assert stats["kl/reverse_nats"] == pytest.approx(float(kl.mean()))
    assert stats["entropy/gap_nats"] == pytest.approx(float((entropy(t) - entropy(s)).abs().mean()))
    assert stats["overlap/ratio"] == pytest.approx(float(overlap(s, t).ratio_n.mean()))
    place = torch.tensor(
        [sum(batch.rollouts[r].mask[:p]) for r, p in zip(batch.row_N.tolist(), batch.position_N.tolist(), strict=True)]
    )
    for start in (1, 2, 4):
        inside = (place + 1 >= start) & (place + 1 < 2 * start)
        if inside.any():
            assert stats[f"position/kl_nats_from_{start}"] == pytest.approx(float(kl[inside].mean()))
    assert sum(name.startswith("position/kl") for name in stats) == int(place.max() + 1).bit_length()


def test_sampler_against_trainer():
    model, batch, loss = awkward("token_opd")
    _, stats = gradient(model, batch, loss, tile=2)
    gap = (batch.behaviour_N - batch.old_N).abs()
    assert stats["mismatch/mean_nats"] == pytest.approx(float(gap.mean()))
    assert stats["mismatch/nats_max"] == pytest.approx(float(gap.max()))
    ratio = (batch.behaviour_N - batch.old_N).exp()
    assert 0 < stats["mismatch/outside_share"] < 1
    assert stats["mismatch/outside_share"] == pytest.approx(float(((ratio < 0.5) | (ratio > 2)).double().mean()))


def test_after_an_update_the_sampler_is_no_longer_held_against_a_student_that_moved():
    loss = build("gkd").loss
    batch = packed(random_rollouts(["student"]))
    batch = hear(batch, loss.needs, {"*": random_table(2)})
    model = random_table(1)
    exact = Student(model, Optim()).logp(batch)
    student = Student(model, Optim(passes=3))
    stats = student.update(replace(batch, behaviour_N=exact), loss, 0, lr=0.1)
    assert stats["mismatch/nats_max"] < 1e-12 and stats["kl/reverse_nats"] > 0


def test_the_clip_is_counted_by_the_side_it_stops():
    model, batch, loss = awkward("grpo")
    _, stats = gradient(model, batch, loss, micro=7)
    (term,) = [t for t in loss.token_terms if getattr(t.head, "clip", None)]
    low, high = term.head.clip
    ratio = (Student(model, Optim()).logp(batch) - batch.old_N).exp()
    total = torch.zeros(max(batch.group_B) + 1, dtype=F64).index_add(0, batch.group_B, batch.reward_B)
    mean_B = (total / batch.group_B.bincount())[batch.group_B]
    up = (batch.reward_B > mean_B)[batch.row_N]  # a credit has the sign of the reward above its group's mean
    assert stats["clip/positive_stopped_share"] == pytest.approx(float((ratio[up] > 1 + high).double().mean()))
    assert stats["clip/negative_stopped_share"] == pytest.approx(float((ratio[~up] < 1 - low).double().mean()))
    assert stats["clip/above_share"] == pytest.approx(float((ratio > 1 + high).double().mean()))
    assert 0 < stats["ratio/clipped_share"] < stats["clip/above_share"] + stats["clip/below_share"]


def test_gates_are_counted_whole_and_one_by_one():
    model, batch, _ = awkward("token_opd")
    both = match(TEACHER, Divergence("forward_kl")).where(unsure(TEACHER, 1.2)).where(band(0.7, 1.4))
    inner = push(log_ratio(TEACHER).where(band(0.7, 1.4)))
    batch = hear(batch, (both + inner).needs, {"*": random_table(2)})
    _, stats = gradient(model, batch, both + inner, tile=4)
    ratio = (batch.old_N - batch.behaviour_N).exp()
    near = (ratio >= 0.7) & (ratio <= 1.4)
    doubt = entropy(table(random_table(2)).detach()[states(batch)]) > 1.2
    share = lambda x: pytest.approx(float(x.double().mean()))
    assert stats["gate/match_teacher_open_share"] == share(near & doubt)
    assert stats["gate/match_teacher_band_open_share"] == stats["gate/push_teacher_band_open_share"] == share(near)
    assert stats["gate/match_teacher_unsure_open_share"] == share(doubt)
    assert "gate/push_teacher_open_share" not in stats


def test_a_wide_vocabulary_is_read_at_some_tokens_and_cuts_do_not_choose_them(monkeypatch):
    model, batch, loss = awkward("gkd")
    _, whole = gradient(model, batch, loss)
    monkeypatch.setattr(observe, "WIDE", V - 1)
    monkeypatch.setattr(observe, "EVERY", 3)
    _, some = gradient(model, batch, loss)
    assert some["kl/reverse_nats"] != pytest.approx(whole["kl/reverse_nats"])
    order = torch.randperm(len(batch.rollouts), generator=torch.Generator().manual_seed(1)).tolist()
    for layout in ({"tile": 3, "micro": 9}, {"layout": "packed", "tile": 1}):
        assert gradient(model, batch.rows(order), loss, **layout)[1] == pytest.approx(some, rel=1e-10)
    chosen = states(batch)[batch.lot_N % 3 == 0]
    s, t = table(model).detach()[chosen], table(random_table(2)).detach()[chosen]
    assert some["kl/reverse_nats"] == pytest.approx(float((s.exp() * (s - t)).sum(-1).mean()))
    assert some["mismatch/mean_nats"] == whole["mismatch/mean_nats"]


def test_a_judge_that_was_shown_more_and_is_sure_where_the_student_is_not():
    loss = build("opsd").loss
    model, sure = random_table(None), random_table(None)
    batch = packed(random_rollouts(["student"]))
    at = states(batch)
    with torch.no_grad():
        sure.module.model.logits_SV[at[0], 2] += 8.0  # certain of one token where the student gives each the same
    batch = hear(batch, loss.needs, {"*": sure})
    _, stats = gradient(model, batch, loss)
    told = (at == at[0]).double().mean() if 1 / V < 0.1 else torch.tensor(0.0)
    assert stats["leak/certain_share"] == pytest.approx(float(told))
    with torch.no_grad():  # a student that all but rules it out
        model.module.model.logits_SV[at[0], 2] -= 8.0
    assert gradient(model, batch, loss)[1]["leak/certain_share"] == pytest.approx(float((at == at[0]).double().mean()))


def test_maxima_and_updates():
    tally = Tally()
    for x in ([1.0, 3.0], [2.0]):
        tally.max("a_max", torch.tensor(x))
        tally.means("b_from_{}", torch.tensor(x), torch.arange(len(x)) + 6)
    assert tally.result(None) == {"a_max": 3.0, "b_from_4": 1.5, "b_from_8": 3.0}
    assert over_updates([{"a": 1.0, "b_max": 2.0}, {"a": 3.0, "b_max": 1.0, "c": 5.0}]) == {"a": 2, "b_max": 2, "c": 5}
    assert over_updates([]) == {}


# --- texts ------------------------------------------------------------------------------------------------------------


def test_refusals_open_an_answer():
    assert (
        refuses("I'm sorry, but that is not possible.") and refuses("I can\u2019t do this.") and refuses("As an AI, I")
    )
    assert not refuses("The door will not open. " * 9 + "I cannot see why.") and not refuses("Sure: 42.")


def rows(*texts: str, told: Prompt) -> list:
    (one, *_) = random_rollouts(["student"])
    return [replace(one, prompt=told, text=text) for text in texts]


def test_repetition_is_flagged_where_a_text_does_nothing_else():
    prose = "The quick brown fox jumps over the lazy dog, and later it sleeps under an old tree near the river."
    found = described(rows(prose, "again and " * 400, told=prompt(0)), [])
    assert found["text/repeating_share"] == 0.5 and found["text/refusal_share"] == 0.0 and found["text/repetition"] > 10
    assert "leak/copied_share" not in found and described([], []) == {}


def test_what_only_the_judge_was_shown_is_counted_in_the_answer():
    told = Prompt((Message("user", "What is the capital?"),), answer="the capital of France is Paris")
    view = View("answer", "{prompt} Known: {answer}")
    (copy, own, short) = rows("the capital of France is Paris", "What is the capital ?", "yes", told=told)
    assert copied_share(copy, view) == 1.0
    assert copied_share(own, view) == 0.0  # it stands in the prompt as well
    assert copied_share(short, view) is None
    assert described([copy, own, short], [view, View("same", "{prompt}")])["leak/copied_share"] == 0.5
