"""One contract for every method: a new file in `opd/methods/` is held to it without a line here.

Arguments are the signature's defaults; judges say exactly what `method.needs` asks; the goal is `method.goal`.
"""

from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tabled import (
    F64,
    GOOD,
    LENGTH,
    V,
    expected,
    gradient,
    hear,
    knowing,
    packed,
    prefix,
    prompt,
    random_rollouts,
    random_table,
    relative,
    rollout,
    speak,
    table,
)

from opd import student as student_module
from opd.batch import Batch, Total, WholeScope, prepare
from opd.errors import OpdError, UsageError
from opd.loss import Loss, Push
from opd.math import divergence as D
from opd.method import REFERENCE, Setting, bind, build, catalogue
from opd.model import CausalModel
from opd.projector import InsideScope
from opd.student import Optim, Student
from opd.tile import TileScope
from opd.types import Judge, Rollout, Says

METHODS = tuple(catalogue())
every_method = pytest.mark.parametrize("name", METHODS)


def score(said: Rollout) -> float:
    """A critic's number: any function of the row will do."""
    return sum((i + 1) * t for i, t in enumerate(said.tokens)) % 7 / 3


def awkward(name: str, dtype: torch.dtype = F64, prompts: int = 4) -> tuple[CausalModel, Batch]:
    """A batch in which every ratio differs from 1: several lengths, several turns, three judges of their own."""
    method = build(name)
    batch = packed(random_rollouts(method.speaks.names, prompts), 1.3, dtype)
    judges = {"*": random_table(2, dtype=dtype), "reference": random_table(3, dtype=dtype)}
    batch = hear(batch, method.needs, judges, score)
    wobble = torch.sin(torch.arange(len(batch.row_N), dtype=F64)).to(dtype) / 4
    model = random_table(1, dtype=dtype)
    old = Student(model, Optim()).logp(batch) + wobble
    return model, replace(batch, old_N=old, behaviour_N=batch.behaviour_N + wobble / 2)


# --- what is asked ----------------------------------------------------------------------------------------------------


def enough(name: str) -> Setting:
    roles: dict[str, Says] = {}
    for judge, says in build(name).needs.items():
        roles[judge.role] = max(says, roles.get(judge.role, Says.TEXT))
    return Setting(roles, reward=True, responses=True)


@every_method
def test_binds_with_enough_and_is_refused_one_step_below(name):
    method, setting = build(name), enough(name)
    bind(method, setting)
    for role, says in setting.roles.items():
        steps = (None, Says.TEXT, Says.TOKEN, Says.TOP, Says.DENSE, Says.LAYERS)
        below = Says.DENSE if says is Says.SCORE else steps[steps.index(says) - 1]
        if below is None and role == REFERENCE.role:
            continue  # the student's earlier self can always speak
        weaker = {r: s for r, s in setting.roles.items() if r != role} | ({} if below is None else {role: below})
        with pytest.raises(UsageError) as caught:
            bind(method, replace(setting, roles=weaker))
        assert any(f"`{role}`" in p and p.startswith(name) and len(p.split()) > 8 for p in caught.value.problems)
    for field, read in (("reward", "reward" in method.loss.reads), ("responses", "data" in method.speaks.names)):
        if read:
            with pytest.raises(UsageError, match=name):
                bind(method, replace(setting, **{field: False}))
        else:
            bind(method, replace(setting, **{field: False}))


@every_method
def test_asks_exactly_what_it_reads(name, monkeypatch):
    """Every judge is read, as strongly as it is asked and no stronger; and nothing is read that nobody asked."""
    heard: dict[Judge, Says] = {}
    depth = [0]

    def recorded(cls: type, method: str, says: Says) -> None:
        plain = getattr(cls, method)

        def read(self, judge, *args):
            if not depth[0]:  # what a reading reads in turn is its own affair
                heard[judge] = max(says, heard.get(judge, says))
            depth[0] += 1
            try:
                return plain(self, judge, *args)
            finally:
                depth[0] -= 1

        monkeypatch.setattr(cls, method, read)

    recorded(TileScope, "distribution", Says.DENSE)
    recorded(TileScope, "crossed", Says.DENSE)
    recorded(TileScope, "top", Says.TOP)
    recorded(TileScope, "judged", Says.TOKEN)
    recorded(InsideScope, "layer", Says.LAYERS)
    recorded(WholeScope, "judged", Says.TOKEN)
    recorded(WholeScope, "scored", Says.SCORE)
    monkeypatch.setattr(student_module, "observe", lambda *_: None)
    method = build(name)
    gradient(*awkward(name), method.loss)
    token_needs = {j: s for j, s in method.needs.items() if s is not Says.TEXT}
    assert heard == token_needs
    texts = {j for j, s in method.needs.items() if s is Says.TEXT}
    spoken = {Judge(n) for n in method.speaks.names} | {Judge(x.objective.good) for x in method.loss.learned}
    assert texts <= spoken


@every_method
def test_reads_exactly_the_log_probabilities_it_says(name):
    """What it does not read may be missing; what it reads may not."""
    method = build(name)
    model, batch = awkward(name)
    want, _ = gradient(model, batch, method.loss)
    holes = {"behaviour": "behaviour_N", "reward": "reward_B"}
    for what, field in holes.items():
        missing = replace(batch, **{field: torch.full_like(getattr(batch, field), float("nan"))})
        if what in method.loss.reads:
            with pytest.raises(OpdError, match="no finite value"):
                gradient(model, missing, method.loss)
        else:
            assert torch.equal(gradient(model, missing, method.loss)[0], want)
    moved = gradient(model, replace(batch, old_N=batch.old_N + 0.1 * torch.cos(batch.old_N)), method.loss)[0]
    assert torch.equal(moved, want) == ("old" not in method.loss.reads)


# --- it learns --------------------------------------------------------------------------------------------------------

PROMPTS, STEPS, ROWS = 3, 30, 48


def gap(goal: str, student: CausalModel, teacher: CausalModel) -> float:
    """Distance from the goal, exact: nats of KL along the speaker's own walk, or the reward that is still missing."""
    s, t = table(student).detach(), table(teacher).detach()
    if goal == "teacher":
        return expected(s, D.reverse_kl(s, t).sum(-1), PROMPTS)
    if goal == "text":  # the teacher's text's negative log-likelihood, above its own entropy
        return expected(t, D.forward_kl(s, t).sum(-1), PROMPTS)
    return 1 - expected(s, s[:, GOOD].exp(), PROMPTS) / LENGTH


@every_method
def test_learns(name):
    """On the exact table model its goal comes nearer by 30 %, every number by dynamic programming."""
    method = build(name)
    teacher = knowing(2) if method.goal == "reward" else random_table(2, 1.5)
    model = random_table(1, 0.3)
    first = model.frozen_copy("reference")
    learner, g = Student(model, Optim(clip=0.0)), torch.Generator().manual_seed(0)
    worth = lambda said: sum(t == GOOD for t in said) / LENGTH
    voices = {"student": model, "reference": first}  # everybody else speaks as the teacher
    blend = None if method.speaks.blend is None else (teacher, method.speaks.blend[1])
    before = gap(method.goal, model, teacher)
    for step in range(STEPS):
        numbers = range(PROMPTS)
        said: list[Rollout] = []
        for number in numbers:
            names = method.speaks.of(step * PROMPTS + number, step)
            samples = ROWS // PROMPTS // len(names)
            for who in names:
                said += speak(voices.get(who, teacher), [number], who, g, samples, reward=worth, blend=blend)
        batch = packed(said)
        s, t = Student(model, Optim()).logp(batch), Student(teacher, Optim()).logp(batch)
        ranks = torch.zeros(len(said), dtype=F64).index_add(0, batch.row_N, t - s)  # what the best critic would say
        known = dict(zip(map(id, said), ranks.tolist(), strict=True))
        judges = {"*": teacher, "reference": first}
        batch = hear(batch, method.needs, judges, lambda r, known=known: known[id(r)])
        learner.update(batch, method.loss, step, lr=0.1)
    after = gap(method.goal, model, teacher)
    assert after < 0.7 * before, f"{before:.3f} -> {after:.3f}"


@every_method
def test_raises_the_token_it_should(name):
    """By hand: the student knows nothing, said every token once, and whoever judges or speaks holds to token GOOD."""
    method = build(name)
    model, sure = random_table(None), random_table(None)
    with torch.no_grad():
        sure.module.model.logits_SV[:, GOOD] += 4.0
    uniform = -torch.log(torch.tensor(float(V), dtype=F64)).item()
    rows = []
    for who in method.speaks.names:
        if who in ("student", "reference"):  # the reference is the student that knows nothing
            logp, worth = (uniform, lambda v: float(v == GOOD)) if who == "student" else (float("nan"), lambda v: None)
            rows += [rollout(0, who, prefix(0), [(v, logp)], sample=v, reward=worth(v)) for v in range(V)]
        else:
            rows.append(rollout(0, who, prefix(0), [(GOOD, float("nan"))]))
    judges = {"*": sure, "reference": random_table(None)}
    batch = hear(packed(rows), method.needs, judges, lambda r: float(r.tokens[-1] == GOOD))
    state = (len(prefix(0)) - 1) * V + prefix(0)[-1]
    Student(model, Optim()).update(batch, method.loss, 0, lr=0.01)
    after = table(model).detach()[state]
    assert after[GOOD] > uniform + 1e-3 and after.argmax() == GOOD


# --- one loss for every layout ----------------------------------------------------------------------------------------

LAYOUTS = [
    {"layout": "left"},
    {"layout": "packed"},
    {"tile": 1},
    {"tile": 3, "micro": 9},
    {"micro": 1},
    {"layout": "packed", "tile": 2, "micro": 7},
    {"layout": "left", "tile": 5, "micro": 17},
]


@every_method
def test_every_layout_gives_the_same_gradient(name):
    """Padding side, packing, tiles, micro-batches (so accumulation, and cuts inside a group): float64, 1e-10."""
    loss = build(name).loss
    model, batch = awkward(name)
    want, stats = gradient(model, batch, loss)
    assert want.isfinite().all() and want.norm() > 1e-3
    for layout in LAYOUTS:
        got, same = gradient(model, batch, loss, **layout)
        assert relative(got, want) < 1e-10, layout
        assert same == pytest.approx(stats, rel=1e-10, abs=1e-10), layout


@every_method
def test_the_order_of_rows_does_not_matter(name):
    loss = build(name).loss
    model, batch = awkward(name)
    want, stats = gradient(model, batch, loss)
    order = torch.randperm(len(batch.rollouts), generator=torch.Generator().manual_seed(1)).tolist()
    got, same = gradient(model, batch.rows(order), loss, micro=20)
    assert relative(got, want) < 1e-10 and same == pytest.approx(stats, rel=1e-10, abs=1e-10)


@every_method
def test_float32_is_close(name):
    """A smoke test: the same batch in float32, in two layouts."""
    loss = build(name).loss
    want, _ = gradient(*awkward(name), loss)
    for layout in ({}, {"layout": "packed", "tile": 3, "micro": 9}):
        got, _ = gradient(*awkward(name, torch.float32), loss, **layout)
        assert got.dtype == torch.float32 and relative(got.double(), want) < 1e-5


@every_method
def test_no_gradient_where_there_should_be_none(name):
    """States that predict no loss token (prompts, given turns, padding) get exactly nothing, and what judges would say
    there changes no bit; neither judges nor signals hold a gradient."""
    method = build(name)
    model, batch = awkward(name)
    want, _ = gradient(model, batch, method.loss, layout="left")
    places = zip(batch.row_N.tolist(), batch.position_N.tolist(), strict=True)
    predicting = torch.zeros(len(want), dtype=torch.bool)
    predicting[[(p - 1) * V + batch.rollouts[r].tokens[p - 1] for r, p in places]] = True
    assert want[~predicting].abs().max() == 0 and (want.abs().sum(-1) > 0).sum() > 5
    judges = {"*": random_table(2), "reference": random_table(3)}
    for judge in judges.values():
        with torch.no_grad():
            judge.module.model.logits_SV[~predicting] += 10 * torch.randn(int((~predicting).sum()), V, dtype=F64)
    perturbed = hear(batch, method.needs, judges, score)
    assert torch.equal(gradient(model, perturbed, method.loss, layout="left")[0], want)
    assert all(j.module.model.logits_SV.grad is None for j in judges.values())
    assert not any(
        x.requires_grad for signal in batch.signals.values() for x in vars(signal).values() if torch.is_tensor(x)
    )


# --- several updates on one batch -------------------------------------------------------------------------------------


@every_method
def test_old_is_the_student_before_the_first_update(name, monkeypatch):
    """With several updates and passes the ratio is taken to one frozen `old`, whole groups at a time."""
    method = build(name)
    model, batch = awkward(name)
    batch = replace(batch, old_N=None)
    learner = Student(model, Optim(updates=2, passes=2))
    before, seen = learner.logp(batch), []
    plain = Student.gradient

    def watched(self, part, *args):
        seen.append((part, self.logp(part)))
        return plain(self, part, *args)

    monkeypatch.setattr(Student, "gradient", watched)
    learner.update(batch, method.loss, 0, lr=0.05)
    assert len(seen) == 4 and learner.version == 1
    prompts = [{r.prompt.id for r in part.rollouts} for part, _ in seen]
    assert not prompts[0] & prompts[1] and prompts[0] == prompts[2] and len(prompts[0] | prompts[1]) == 4
    where = {id(r): i for i, r in enumerate(batch.rollouts)}
    for part, _ in seen:
        rows = [where[id(r)] for r in part.rollouts]
        if "old" in method.loss.reads:
            assert torch.equal(part.old_N, replace(batch, old_N=before).rows(rows).old_N)
        else:
            assert part.old_N is None
    assert (seen[2][1] - seen[0][1]).abs().max() > 1e-3  # the student itself moved


CLIPPED = [n for n in METHODS if any(isinstance(t.head, Push) and t.head.clip for t in build(n).loss.terms)]


@pytest.mark.parametrize("name", CLIPPED)
def test_the_clip_stops_what_has_moved_far_enough(name):
    """A token's gradient is exactly zero where its ratio left the clip on the side that its credit pushes to."""
    method = build(name)
    (term,) = [t for t in method.loss.terms if isinstance(t.head, Push) and t.head.clip]
    term = replace(term, gates=())  # a closed gate stops a token as well
    model, batch = awkward(name)
    batch = replace(batch, old_N=batch.old_N + torch.cos(torch.arange(len(batch.row_N), dtype=F64)))
    learner = Student(model, Optim())
    prepared = prepare(Loss((term,)), batch, 0, learner.logp(batch))
    logits_NV = model.head.logits(model.all_hidden(batch)).requires_grad_()
    tile = TileScope(logits_NV, batch, prepared, torch.arange(len(batch.row_N)))
    (grad_NV,) = torch.autograd.grad(term.at(tile).sum(), logits_NV)  # a token's value is of its own row alone
    ratio_N = (tile.live - term.head.anchor.value(tile)).exp().detach()
    credit_N, (low, high) = term.head.credit.value(tile), term.head.clip
    stopped = ((credit_N > 0) & (ratio_N > 1 + high)) | ((credit_N < 0) & (ratio_N < 1 - low))
    outside = (ratio_N > 1 + high) | (ratio_N < 1 - low)
    assert stopped.any() and (outside & ~stopped).any() and (~outside).any()
    assert torch.equal((grad_NV == 0).all(-1), stopped | (credit_N == 0))


# --- several ranks ----------------------------------------------------------------------------------------------------


def rank(number: int, folder: str) -> None:
    """One of two gloo processes: its prompts' share of every method's gradient and updates."""
    torch.set_num_threads(1)
    meet, patience = f"file://{folder}/meet", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meet, rank=number, world_size=2, timeout=patience)
    found: dict[str, dict[str, object]] = {}
    for name in METHODS:
        loss, total = build(name).loss, Total()
        own = found[name] = {}
        for kind, prompts in (("uneven", ({0, 1, 2}, {3})), ("idle", ({0, 1, 2, 3}, set()))):
            model, batch = awkward(name)
            part = batch.rows(share(batch, prompts[number]))
            local, stats = gradient(model, part, loss, micro=9, total=total)
            own[kind] = (total(local), stats)
            model, batch = awkward(name)
            Student(model, Optim(passes=2)).update(batch.rows(share(batch, prompts[number])), loss, 0, 1e-3, total)
            own[f"{kind} weights"] = model.module.model.logits_SV.detach()
        model, batch = awkward(name)  # as many steps on every rank, though one has fewer groups than updates
        learner = Student(model, Optim(updates=2))
        learner.update(batch.rows(share(batch, ({0, 1, 2}, {3})[number])), loss, 0, 1e-3, total)
        own["cut weights"] = model.module.model.logits_SV.detach()
    torch.save(found, f"{folder}/rank{number}.pt")
    dist.destroy_process_group()


def share(batch: Batch, prompts: set[int]) -> list[int]:
    ids = {prompt(n).id for n in prompts}
    return [i for i, r in enumerate(batch.rollouts) if r.prompt.id in ids]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{n}.pt") for n in range(2)]


@every_method
def test_two_ranks_are_one(name, ranks):
    """Prompts split by whole groups, one rank with a quarter of them or with none: gradient, numbers and weights."""
    loss = build(name).loss
    model, batch = awkward(name)
    want, stats = gradient(model, batch, loss)
    Student(model, Optim(passes=2)).update(batch, loss, 0, 1e-3)
    weights = model.module.model.logits_SV.detach()
    start = random_table(1).module.model.logits_SV.detach()
    for found in (r[name] for r in ranks):
        for kind in ("uneven", "idle"):
            grad, same = found[kind]
            assert relative(grad, want) < 1e-10
            assert same == pytest.approx(stats, rel=1e-10, abs=1e-10)
            assert relative(found[f"{kind} weights"] - start, weights - start) < 1e-8  # Adam divides small by small
    assert torch.equal(ranks[0][name]["cut weights"], ranks[1][name]["cut weights"])
    assert not torch.equal(ranks[0][name]["cut weights"], start)
