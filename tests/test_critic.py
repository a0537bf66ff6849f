"""The pitfalls of a learned critic: ends, identical texts, truncation, shared scores, the gradient of its loss, LoRA.

Shapes: R distinct rows, P pairs.
"""

import math
from dataclasses import replace

import pytest
import torch
from tabled import F64, V, packed, prompt, rollout
from transformers import LlamaConfig, LlamaForCausalLM

from opd import world
from opd.assemble import load_tokenizer
from opd.chat import renderer
from opd.critic import Critic, Critics, Pairs, beside, pair_up
from opd.engines.base import Sampling
from opd.loss import Objective
from opd.metrics import length_only_accuracy
from opd.model import CausalModel, load, read_head, trained
from opd.student import Optim
from opd.teachers import Teachers
from opd.types import Message, Prompt

STOP = V - 1
BT, BCE = (Objective(kind, good="teacher", bad="student") for kind in ("bradley_terry", "bce"))


def backbone(dtype=F64, vocab=V, seed=0) -> CausalModel:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    module = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, max_position_embeddings=64, **shape)).eval().to(dtype)
    for layer in module.model.layers:  # Hugging Face's own norm computes in float32, whatever its input
        layer.input_layernorm = torch.nn.RMSNorm(16, eps=1e-6, dtype=dtype)
        layer.post_attention_layernorm = torch.nn.RMSNorm(16, eps=1e-6, dtype=dtype)
    module.model.norm = torch.nn.RMSNorm(16, eps=1e-6, dtype=dtype)
    return CausalModel(module, read_head(module), compute=dtype, stop_ids=(STOP,))


def critic(**optim) -> Critic:
    return beside(backbone(), Optim(**{"lr": 0.01, "clip": 0.0, **optim}), seed=3)


def row(number, speaker, *ids, finish="stop", sample=0):
    """A row that speaks these ids after a prompt, and the stop token if it ended."""
    spoken = [*ids, STOP] if finish != "length" else [*ids]
    return rollout(number, speaker, (0, number % 5), [(i, -1.0) for i in spoken], sample=sample, finish=finish)


def answers(*rows):
    return {r.prompt.id: [s for s in rows if s.prompt.id == r.prompt.id] for r in rows}


def gradients(judge: Critic) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in trained(judge.learner) if p.grad is not None}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative norm of the difference of two gradients."""
    assert a.keys() == b.keys() and a
    flat = lambda g: torch.cat([g[k].flatten() for k in sorted(a)])
    return float((flat(a) - flat(b)).norm() / flat(a).norm())


def learned(pairs: Pairs, objective: Objective = BT, **optim) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """What one update says, and the gradient it made."""
    judge = critic(**optim)
    return judge.update(pairs, objective, 0.0), gradients(judge)


GROUP = [row(0, "student", *ids) for ids in ((1, 2), (3,), (1, 2), (2, 2, 4), (1,), (3, 3), (3,), (1, 2))]
OTHER = [row(1, "student", *ids, sample=k) for k, ids in enumerate(((4, 4), (1, 3, 2)))]
GOOD = answers(row(0, "teacher", 2, 1), row(1, "teacher", 3))


# --- the objective ----------------------------------------------------------------------------------------------------


def scored(*scores: float) -> torch.Tensor:
    return torch.tensor(scores, dtype=F64)


ONE = Pairs(((1,), (2,)), torch.tensor([0]), torch.tensor([1]), torch.ones(1))


def test_bradley_terry_of_one_pair():
    loss = critic().loss(scored(1.0, 0.2), ONE, BT, torch.tensor(1.0))
    assert float(loss) == pytest.approx(0.37110067, abs=1e-8)
    assert float(critic().loss(scored(7.0, 6.2), ONE, BT, torch.tensor(1.0))) == pytest.approx(float(loss))


def test_the_plain_gan_judges_each_score_by_itself():
    loss = float(critic().loss(scored(1.0, 0.2), ONE, BCE, torch.tensor(1.0)))
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    assert loss == pytest.approx(-math.log(sigmoid(1.0)) - math.log(1 - sigmoid(0.2)))


def test_the_penalty_is_on_squared_scores():
    plain, held = critic(), beside(backbone(), Optim(), seed=3, score_l2=0.5)
    at = (scored(1.0, 0.2), ONE, BT, torch.tensor(1.0))
    assert float(held.loss(*at) - plain.loss(*at)) == pytest.approx(0.5 * (1.0 + 0.04) / 2)


@pytest.mark.parametrize("objective", [BT, BCE], ids=lambda o: o.kind)
def test_its_gradient_is_that_of_finite_differences(objective):
    pairs = pair_up(GOOD, [*GROUP, *OTHER])
    stats, gradient = learned(pairs, objective)
    judge = critic()
    named = dict(trained(judge.learner))
    g = torch.Generator().manual_seed(1)
    step = 1e-6
    for name in ("score.weight", "body.model.layers.1.mlp.down_proj.weight", "body.model.embed_tokens.weight"):
        towards = torch.randn(named[name].shape, generator=g, dtype=F64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                named[name].add_(sign * step * towards)
                values.append(judge.loss(judge.score(pairs.rows), pairs, objective, pairs.weight_P.sum()))
                named[name].sub_(sign * step * towards)
        slope = float((values[0] - values[1]) / (2 * step))
        assert slope == pytest.approx(float((gradient[name] * towards).sum()), rel=1e-6, abs=1e-9)
    assert stats["critic/loss"] == pytest.approx(float(values[0]), abs=1e-3)


def test_an_update_ranks_the_teacher_higher():
    judge, pairs = critic(), pair_up(GOOD, [*GROUP, *OTHER])
    first = judge.update(pairs, BT, 0.01)
    for _ in range(20):
        last = judge.update(pairs, BT, 0.01)
    assert last["critic/margin"] > first["critic/margin"] + 1 and last["critic/accuracy"] == 1.0
    assert judge.steps == 21


@pytest.mark.parametrize("tokens", [1, 9999])
def test_fresh_and_earlier_pairs_are_one_mean_and_the_fresh_are_measured(tokens):
    """One of the earlier samples is also fresh, and two answers of the teacher share each earlier sample's weight."""
    fresh = pair_up(GOOD, [*GROUP, OTHER[0]])
    twice = answers(row(1, "teacher", 3), row(1, "teacher", 4))
    earlier = pair_up(twice, [*OTHER, row(1, "student", 1)])
    judge = critic(tokens_per_micro=tokens)
    stats, found = judge.update(fresh, BT, 0.0, earlier=earlier), gradients(judge)
    naive = critic()
    with naive.entered():
        lost, weight = 0.0, 0.0
        for pairs in (fresh, earlier):
            for good, bad, share in zip(pairs.good_P, pairs.bad_P, pairs.weight_P, strict=True):
                two = naive._forward([pairs.rows[good], pairs.rows[bad]])
                lost, weight = lost - share * torch.nn.functional.logsigmoid(two[0] - two[1]), weight + share
        (lost / weight).backward()
    assert weight == 9 + 3 and distance(gradients(naive), found) < 1e-10
    assert stats["critic/loss"] == pytest.approx(float(lost.detach() / weight))
    alone = learned(fresh)[0]
    assert {k: v for k, v in stats.items() if k not in ("critic/loss", "critic/grad_norm")} == pytest.approx(
        {k: v for k, v in alone.items() if k not in ("critic/loss", "critic/grad_norm")}
    )


# --- each distinct text once ------------------------------------------------------------------------------------------


def test_scoring_each_distinct_text_once_is_the_loop_over_the_group():
    pairs = pair_up(GOOD, [*GROUP, *OTHER])
    assert len(pairs.rows) == len(set(pairs.rows)) == 2 + 5 + 2, "two teacher texts, five and two distinct student ones"
    _, once = learned(pairs)
    judge = critic()
    with judge.entered():
        for student in [*GROUP, *OTHER]:
            (teacher,) = GOOD[student.prompt.id]
            two = judge._forward([teacher.tokens, student.tokens])
            (-torch.nn.functional.logsigmoid(two[0] - two[1]) / 10).backward()
    assert distance(once, gradients(judge)) < 1e-10


@pytest.mark.parametrize("tokens", [1, 7, 12])
def test_micro_batches_make_the_same_gradient(tokens):
    pairs = pair_up(GOOD, [*GROUP, *OTHER])
    (whole, one), (cut, several) = learned(pairs), learned(pairs, tokens_per_micro=tokens)
    assert len(critic(tokens_per_micro=tokens)._cuts(pairs.rows)) > 1
    assert cut == pytest.approx(whole, rel=1e-9)
    assert distance(one, several) < 1e-10


def test_several_answers_of_a_teacher_share_a_samples_weight():
    answered = answers(row(0, "teacher", 2, 1), row(0, "teacher", 4), row(0, "teacher", 3, 3), row(1, "teacher", 3))
    pairs = pair_up(answered, [GROUP[0], OTHER[0]])
    assert pairs.weight_P.tolist() == pytest.approx([1 / 3] * 3 + [1.0])
    score = torch.arange(len(pairs.rows), dtype=F64)
    ranks = critic().ranks(score, pairs)
    margin = [float(score[g] - score[b]) for g, b in zip(pairs.good_P, pairs.bad_P, strict=True)]
    assert ranks["critic/margin"] == pytest.approx((sum(margin[:3]) / 3 + margin[3]) / 2)


def test_ties_count_a_half():
    same = pair_up(answers(row(0, "teacher", 1, 2)), [GROUP[0]])
    assert len(same.rows) == 1, "one text, one row, one score"
    assert critic().ranks(critic().score(same.rows), same)["critic/accuracy"] == 0.5


# --- ends -------------------------------------------------------------------------------------------------------------


def test_the_score_is_read_at_the_last_token_and_padding_changes_nothing():
    judge = critic()
    rows = [GROUP[1].tokens, GROUP[3].tokens]
    together = judge.score(rows)
    assert torch.allclose(together, torch.cat([judge.score([r]) for r in rows]), atol=1e-12)
    with judge.entered(), torch.no_grad():
        h_RLH = judge.model.backbone(input_ids=torch.tensor([rows[0]])).last_hidden_state
        assert torch.allclose(judge.module.score(h_RLH[:, -1])[0], together[:1], atol=1e-12)


def test_truncated_texts_of_either_side_are_kept_from_the_loss():
    cut = row(0, "student", 1, 2, finish="length")
    assert pair_up(GOOD, [cut]).count == 0
    assert pair_up(answers(row(0, "teacher", 2, finish="length")), GROUP).count == 0
    assert pair_up(GOOD, [*GROUP, cut]).count == pair_up(GOOD, GROUP).count
    assert critic().update(pair_up(GOOD, [cut]), BT, 0.1) == {}


def test_a_student_without_an_answer_to_compare_with_is_no_pair():
    assert pair_up(answers(row(1, "teacher", 3)), GROUP).count == 0


def told(judge: Critic, rows) -> list[float]:
    """The scores that a group's samples earn."""
    keeps_ids = type("Keeps", (), {"canonical": staticmethod(lambda r: r)})()  # these rows have ids and no text
    return Teachers(keeps_ids, judge.model, critic=Critics((judge,))).scores(packed(rows))[0].tolist()


def test_a_truncated_answer_earns_its_groups_lowest_score():
    cut = row(0, "student", 4, 4, 4, finish="length")
    given = told(critic(), [*GROUP[:4], cut, OTHER[0]])
    assert given[4] == min(given[:4]) and len(set(given[:4])) > 1


def test_a_group_in_which_nothing_ended_earns_the_same():
    rows = [row(0, "student", i, finish="length", sample=i) for i in (1, 2, 3)]
    assert len(set(told(critic(), [*rows, OTHER[0]])[:3])) == 1


def test_texts_that_are_given_earn_no_score():
    given = told(critic(), [GROUP[0], row(0, "teacher", 2, 1)])
    assert not math.isnan(given[0]) and math.isnan(given[1])


# --- rendering --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["pad", "pad==eos"])
def voice(request):
    tokenizer = load_tokenizer("world:student-merged")
    if request.param == "pad==eos":
        tokenizer.pad_token = tokenizer.eos_token
    return renderer(tokenizer, stop_ids=(tokenizer.eos_token_id,))


ASKED = Prompt((Message("user", "rabc,12>"),))


def said(voice, ids, finish="stop"):
    stop = voice.stop_ids[:1] if finish == "stop" else ()
    tokens = (*ids, *stop)
    return voice.spoken(ASKED, voice.prompt_ids(ASKED), tokens, (-1.0,) * len(tokens), finish, "student", 0, 0)


def test_both_sides_end_with_one_stop_token(voice):
    teacher = voice.canonical(voice.given(ASKED, "[abc:12]", "teacher"))
    student = voice.canonical(said(voice, voice.answer_ids("(abc:12)", finished=False)))
    for each in (teacher, student):
        assert each.tokens.count(voice.stop_ids[0]) == 1 and each.tokens[-1] == voice.stop_ids[0]


def test_identical_texts_are_one_row_however_they_were_said(voice):
    merged = voice.answer_ids("[abc:12]", finished=False)
    letters = tuple(i for c in "[abc:12]" for i in voice.answer_ids(c, finished=False))
    assert merged != letters, "`12` is one id of this tokenizer, and two when sampled digit by digit"
    newline = voice.tokenizer.encode("\n", add_special_tokens=False)
    teacher = voice.canonical(voice.given(ASKED, " [abc:12]\n", "teacher"))
    students = [voice.canonical(said(voice, ids)) for ids in (merged, letters, (*letters, *newline))]
    assert {s.tokens for s in students} == {teacher.tokens}
    pairs = pair_up({ASKED.id: [teacher]}, students)
    assert len(pairs.rows) == 1
    judge = beside(backbone(vocab=len(voice.tokenizer)), Optim(), seed=0)
    assert judge.ranks(judge.score(pairs.rows), pairs)["critic/margin"] == 0.0


def test_a_truncated_answer_gets_no_stop_token(voice):
    cut = voice.canonical(said(voice, voice.answer_ids("[abc", finished=False), finish="length"))
    assert voice.stop_ids[0] not in cut.tokens and cut.finish == "length"
    assert voice.given(ASKED, "[abc:12]", "teacher", max_tokens=3).finish == "length"


# --- whose weights ----------------------------------------------------------------------------------------------------


def test_a_copy_learns_and_leaves_the_student_alone():
    student = backbone()
    before = {n: p.clone() for n, p in student.module.named_parameters()}
    judge = beside(student, Optim(lr=0.1), seed=0)
    judge.update(pair_up(GOOD, GROUP), BT, 0.1)
    assert all(torch.equal(p, before[n]) for n, p in student.module.named_parameters())
    assert any(not torch.equal(p, before[n]) for n, p in judge.model.module.named_parameters())


def test_a_lora_critic_shares_the_base_and_moves_its_own_adapter_alone():
    student = load(str(world.path("student")), dtype="float32", device="cpu", lora=4)
    judge = beside(student, Optim(lr=0.1), seed=0)
    assert judge.model.module is student.module and judge.model.adapter != student.adapter
    before = {n: p.detach().clone() for n, p in student.module.named_parameters()}
    judge.update(pair_up(GOOD, GROUP), BT, 0.1)
    moved = {n for n, p in student.module.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(f".{judge.model.adapter}." in n for n in moved)
    assert student.module.active_adapter == student.adapter
    assert [n for n, _ in trained(student.module)] and all(
        f".{student.adapter}." in n for n, _ in trained(student.module)
    )


def test_length_alone_as_a_probe():
    assert length_only_accuracy([3, 4, 5, 6], [9, 9, 8, 9]) == 1.0
    assert length_only_accuracy([5, 5, 5, 5], [5, 5, 5, 5]) == 0.5


# --- what a teacher says ----------------------------------------------------------------------------------------------


def test_recorded_answers_meet_the_samples_of_their_prompt():
    tokenizer = load_tokenizer("world:student")
    voice = renderer(tokenizer, stop_ids=(tokenizer.eos_token_id,))
    texts = {ASKED.id: ("[abc:12]", "[cba:21]")}
    teachers = Teachers(
        voice, backbone(vocab=len(tokenizer)), answers={"teacher": texts}, sampling=Sampling(max_tokens=24)
    )
    students = [
        replace(said(voice, voice.answer_ids(t, finished=False)), sample=k) for k, t in enumerate(("(", "[abc:12]"))
    ]
    pairs = teachers.pairs(students, "teacher")
    assert pairs.count == 4 and len(pairs.rows) == 3 and pairs.weight_P.tolist() == [0.5] * 4
    unasked = replace(students[0], prompt=prompt(7))
    assert teachers.pairs([unasked], "teacher").count == 0
