"""Methods: what cannot be done is refused in a sentence; who speaks gets exactly its share."""

from dataclasses import replace

import pytest

from opd.anchors import old
from opd.credits import log_ratio, reward
from opd.errors import UsageError
from opd.loss import bradley_terry, learn, nll, push
from opd.method import CRITIC, TEACHER, Method, Setting, bind, both, build, mixture, one
from opd.types import Says

WHITE = Setting({"teacher": Says.DENSE}, reward=True, responses=True)


@pytest.mark.parametrize(
    ("method", "setting", "sentence"),
    [
        ("gkd", Setting({}, responses=True), "needs a judge `teacher`, and the recipe has none: add it under"),
        ("gkd", Setting({"teacher": Says.TOKEN}, responses=True),
         "needs the whole next-token distribution of `teacher`, which gives log-probabilities of given tokens"),
        ("token_opd", Setting({"teacher": Says.TEXT}),
         "needs log-probabilities of given tokens of `teacher`, which gives text only.*gad, seqkd"),
        ("grpo", Setting({}), "reads the task's reward, and the recipe has none: add `reward:"),
        ("sft", Setting({}), "learns from recorded answers, and the training data has none"),
        ("gkd", Setting({"teacher": Says.DENSE}), "learns from recorded answers"),
        ("seqkd", Setting({}, responses=True), "needs a judge `teacher`"),
        ("token_opd", replace(WHITE, truncated_sampling="top_p = 0.9"), r"speak\.top_p = 0\.9 samples from another"),
        ("gad", Setting({}), "needs a judge `teacher`"),
    ],
)  # fmt: skip
def test_refusals(method, setting, sentence):
    with pytest.raises(UsageError, match=f"^{method} .*{sentence}"):
        bind(build(method), setting)


def test_every_problem_is_told_at_once_and_once():
    loss = push(reward()).on("student") + push(log_ratio(TEACHER)) + 0.5 * push(log_ratio(TEACHER))
    method = Method(both("student", "data"), loss, name="mine")
    with pytest.raises(UsageError) as caught:
        bind(method, Setting({"teacher": Says.TEXT}, truncated_sampling="min_p = 0.1"))
    told = caught.value.problems
    assert len(told) == len(set(told)) == 5
    assert any("rows spoken by data have none recorded" in p for p in told)


def test_a_push_on_given_text_needs_another_anchor():
    pushed = push(log_ratio(TEACHER, "old"))
    for speaks in (one("data"), mixture(student=0.5, data=0.5), both("student", "teacher")):
        method = Method(speaks, pushed, name="mine")
        with pytest.raises(UsageError, match=r"restrict the term with `\.on\('student'\)` or anchor it at `old\(\)`"):
            bind(method, WHITE)
    bind(Method(both("student", "data"), pushed.on("student") + nll().on("data"), name="mine"), WHITE)
    bind(Method(one("data"), push(log_ratio(TEACHER, "old"), anchor=old()), name="mine"), WHITE)


def test_scores_come_from_critics_and_nothing_else_does():
    with pytest.raises(UsageError, match=r"a score of each answer of `teacher`.*Only a critic gives scores"):
        bind(Method(one("student"), push(reward(TEACHER), anchor=old()), name="mine"), WHITE)
    with pytest.raises(UsageError, match=r"log-probabilities of given tokens of `critic`, which gives a score"):
        bind(Method(one("student"), push(log_ratio(CRITIC)), name="mine"), WHITE)


def test_truncated_sampling_is_no_matter_to_a_divergence():
    bind(build("gkd"), replace(WHITE, truncated_sampling="top_p = 0.9"))


def test_a_methods_own_refusals_are_sentences():
    nowhere = {"divergence": "skew_forward_kl", "alpha": 1.0}
    for args, sentence in (({"beta": 0.0}, "zero everywhere.*forward_kl"), (nowhere, "alpha = 1 is zero everywhere")):
        with pytest.raises(UsageError, match=f"^method gkd: .*{sentence}"):
            build("gkd", args)


def test_unknown_methods_name_the_known():
    with pytest.raises(UsageError, match=r"there is no method `gdk`; there are .*gkd"):
        build("gdk")
    with pytest.raises(UsageError, match="there is no file"):
        build("./nowhere.py:mine")


def test_a_method_in_a_users_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from opd.loss import nll\nfrom opd.method import Method, one\n\n"
        "def brevity(*, group: int = 2):\n    return Method(one('data'), nll(), group=group, goal='text')\n"
    )
    assert build("./mine.py:brevity", {"group": 3}, tmp_path).group == 3
    with pytest.raises(UsageError, match=r"mine\.py has no function `levity`"):
        build("./mine.py:levity", folder=tmp_path)


# --- who speaks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shares",
    [{"student": 0.5, "data": 0.5}, {"student": 0.9, "data": 0.1}, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3},
     {"a": 0.2, "b": 0.5, "c": 0.3}, {"a": 0.05, "b": 0.05, "c": 0.45, "d": 0.45}],
)  # fmt: skip
def test_shares_are_exact_over_the_run(shares):
    """After any number of prompts every speaker has had its share, give or take one prompt a speaker before it."""
    speakers, had = mixture(**shares), dict.fromkeys(shares, 0)
    for index in range(400):
        (name,) = speakers.of(index)
        had[name] += 1
        for who, share in shares.items():
            assert abs(had[who] - share * (index + 1)) < len(shares) / 2 + 1e-6
    assert all(had[who] == pytest.approx(400 * share, abs=1) for who, share in shares.items())


def test_speakers():
    assert (
        mixture(student=1.0, data=0.0) == one("student")
        and str(mixture(student=0.5, data=0.5)) == "0.5 student + 0.5 data"
    )
    assert both("student", "teacher").of(7) == ("student", "teacher")
    assert build("gkd", {"on_policy": 1.0}).speaks == one("student") and not build("seqkd").on_policy


def test_a_critic_beside_a_method():
    """GAD's warm-up: the teacher's text still teaches alone, the student speaks beside it for the critic."""
    objective = bradley_terry(good="teacher", bad="student")
    warm = build("seqkd").with_critic(objective, 4)
    assert warm.speaks == both("student", "teacher") and warm.group == 4
    assert warm.loss == nll().on("teacher") + learn(CRITIC, objective)
    own = build("gkd").with_critic(objective, 4)  # the student speaks already: who speaks and who counts stay
    assert own.speaks == build("gkd").speaks and own.loss.token_terms == build("gkd").loss.terms
    assert build("gad").with_critic(objective, 4) == build("gad")
