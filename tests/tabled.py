"""A world of tables: speakers that sample from exact models, judges that say exactly as much as they are asked, and
expectations by dynamic programming instead of by sampling.

A state is (position, token before). The last token of the vocabulary ends an answer; GOOD is what rewards count.
Shapes: S states, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from opd.aligned import Alignment, Shared, SpanDense, SpanToken
from opd.batch import Batch, pack
from opd.engines.table import table_model
from opd.head import token_logp
from opd.method import EXPERT
from opd.model import CausalModel
from opd.signals import Dense, Experts, Layered, Score, Shelf, Token, TopK
from opd.student import Optim, Student
from opd.types import RETOKENIZED, Judge, Message, Prompt, Rollout, Says, Turn

V, POSITIONS, LENGTH, GOOD = 6, 12, 3, 2
F64 = torch.float64


def prompt(number: int, **fields) -> Prompt:
    return Prompt((Message("user", f"question {number}"),), **fields)


def prefix(number: int) -> tuple[int, ...]:
    """The prompt's tokens: lengths differ, so that padding has something to do."""
    return tuple((number + k) % (V - 1) for k in range(1 + number % 3))


def rollout(number, speaker, *parts, sample=0, reward=None, finish="stop") -> Rollout:
    """A row from parts: a tuple of ids is given, a list of (id, logp) is spoken."""
    tokens, mask, behaviour, turns = [], [], [], []
    for part in parts:
        start, spoken = len(tokens), isinstance(part, list)
        tokens += [x[0] for x in part] if spoken else list(part)
        behaviour += [x[1] for x in part] if spoken else [float("nan")] * len(part)
        mask += [spoken] * len(part)
        if spoken:
            turns.append(Turn(start, len(tokens), finish))
    return Rollout(
        prompt(number),
        speaker,
        tuple(tokens),
        tuple(mask),
        tuple(behaviour),
        tuple(0 if m else -1 for m in mask),
        tuple(turns),
        "",
        sample=sample,
        reward=reward,
    )


def random_rollouts(speakers: Sequence[str], prompts: int = 4, group: int = 3, seed: int = 0) -> list[Rollout]:
    """Rows of unequal lengths, one in three with a second turn after something given; no model spoke them."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: int(torch.randint(n, (), generator=g))
    spoken = lambda given: [
        (draw(V), float("nan") if given else -0.3 - float(torch.rand((), generator=g)) * 2) for _ in range(1 + draw(3))
    ]
    rows = []
    for number in range(prompts):
        for speaker in speakers:
            for sample in range(group if speaker == "student" else 1):
                parts = [prefix(number), spoken(speaker != "student")]
                if (number + sample) % 3 == 2:
                    parts += [(draw(V), draw(V)), spoken(speaker != "student")]
                reward = float(torch.randn((), generator=g)) if speaker == "student" else None
                rows.append(rollout(number, speaker, *parts, sample=sample, reward=reward))
    return rows


# --- models and what is known of them exactly -------------------------------------------------------------------------


def random_table(seed: int | None, scale: float = 1.0, dtype: torch.dtype = F64) -> CausalModel:
    model = table_model(POSITIONS, V, None, dtype)
    if seed is not None:
        with torch.no_grad():  # drawn in float64, so that a float32 table is the same one
            logits_SV = table_model(POSITIONS, V, seed).module.model.logits_SV
            model.module.model.logits_SV.copy_(scale * logits_SV)
    return model


def knowing(seed: int) -> CausalModel:
    """A teacher that likes GOOD."""
    model = random_table(seed)
    with torch.no_grad():
        model.module.model.logits_SV[:, GOOD] += 3.0
    return model


def table(model: CausalModel, temperature: float = 1.0) -> torch.Tensor:
    """[S, V] its log-probabilities."""
    return (model.module.model.logits_SV / temperature).log_softmax(-1)


def sampled_logp(model: CausalModel, batch: Batch) -> torch.Tensor:
    """[N] its log-probability of every loss token, at temperature 1, read off the table."""
    places = zip(batch.row_N.tolist(), batch.position_N.tolist(), strict=True)
    states = [(p - 1) * V + batch.rollouts[r].tokens[p - 1] for r, p in places]
    return table(model).detach()[states, batch.token_N]


def expected(walker_SV: torch.Tensor, per_state_S: torch.Tensor, prompts: int, length: int = LENGTH) -> float:
    """E of the sum of a number per state, along answers that the walker speaks, averaged over prompts: exact."""
    total, probability_SV = 0.0, walker_SV.exp().detach()
    for number in range(prompts):
        given = prefix(number)
        reached = {(len(given) - 1) * V + given[-1]: 1.0}
        for t in range(length):
            after: dict[int, float] = {}
            for state, share in reached.items():
                total += share * float(per_state_S[state])
                for v in range(V - 1):
                    to = (len(given) + t) * V + v
                    after[to] = after.get(to, 0.0) + share * float(probability_SV[state, v])
            reached = after
    return total / prompts


def speak(
    model: CausalModel,
    numbers: Sequence[int],
    speaker: str,
    g: torch.Generator,
    samples: int = 1,
    temperature: float = 1.0,
    reward: Callable[[Sequence[int]], float] | None = None,
    blend: tuple[CausalModel, float] | None = None,
) -> list[Rollout]:
    """Answers sampled from a table, all rows at once; only the student's carry the probability they were drawn with.

    With `blend` the student's tokens are drawn from a mixture with another table, of which that has this share.
    """
    logp_SV = table(model, temperature).detach()
    if blend is not None and speaker == "student":
        other, share = blend
        logp_SV = (share * table(other, temperature).detach().exp() + (1 - share) * logp_SV.exp()).log()
    asked = [(n, s) for n in numbers for s in range(samples)]
    last = torch.tensor([prefix(n)[-1] for n, _ in asked])
    place = torch.tensor([len(prefix(n)) - 1 for n, _ in asked])
    said: list[list[tuple[int, float]]] = [[] for _ in asked]
    live = [True] * len(asked)
    for _ in range(LENGTH):
        logp_RV = logp_SV[place * V + last]
        last = torch.multinomial(logp_RV.exp(), 1, generator=g)[:, 0]
        chosen = logp_RV.gather(-1, last[:, None])[:, 0].tolist()
        place = place + 1
        for r, token in enumerate(last.tolist()):
            if live[r]:
                said[r].append((token, chosen[r] if speaker == "student" else float("nan")))
                live[r] = token != V - 1
    return [
        rollout(
            n,
            speaker,
            prefix(n),
            said[r],
            sample=s,
            reward=None if reward is None or speaker != "student" else reward([t for t, _ in said[r]]),
            finish="length" if live[r] else "stop",
        )
        for r, (n, s) in enumerate(asked)
    ]


# --- judges -----------------------------------------------------------------------------------------------------------


def hear(
    batch: Batch,
    needs: Mapping[Judge, Says],
    judges: Mapping[str, CausalModel],
    score: Callable[[Rollout], float] | None = None,
) -> Batch:
    """A signal of every judge, of exactly the strength that is asked: reading more fails.

    A role falls back on `*`; a judge that sees more than the student is `*` too, whoever it is. A hint exists for two
    rows in three. Experts share the rows, though here all of them are the same.
    """
    signals = {}
    for judge, says in needs.items():
        model = judges["*"] if judge.view != "same" else judges.get(judge.role, judges.get("*"))
        row = torch.arange(len(batch.rollouts))
        heard_N = (row % 3 != 1)[batch.row_N] if judge.view == "hint" else None
        if says is Says.SCORE:
            values = [score(r) if r.speaker == "student" else float("nan") for r in batch.rollouts]
            signals[judge] = Score(torch.tensor(values, dtype=batch.behaviour_N.dtype))
        elif says in (Says.TOKEN, Says.DENSE) and judge.view == RETOKENIZED:
            signals[judge] = retokenized(batch, model, says)
        elif says is Says.DENSE:
            hidden = model.all_hidden(batch)
            signals[judge] = Dense(hidden, model.head, heard_N)
            if judge.role == EXPERT:
                signals[judge] = experts(hidden, (row % 2)[batch.row_N], model)
        elif says is Says.LAYERS:  # both of a table's, by either of their numbers
            hidden, inner = model.all_states(batch, (0, 1, -1, -2))
            signals[judge] = Layered(hidden, model.head, heard_N, inner)
        elif says.by_token:
            hidden = model.all_hidden(batch)
            logp_N = token_logp(model.head, hidden, batch.token_N, batch.temperature)
            silent_N = torch.zeros_like(batch.row_N, dtype=torch.bool) if heard_N is None else ~heard_N
            logp_N = logp_N.masked_fill(silent_N, float("nan"))
            signals[judge] = Token(logp_N, heard_N)
            if says is Says.TOP:  # at temperature 1, and as many as there are
                top = Dense(hidden, model.head).top(V, 1.0)
                signals[judge] = TopK(logp_N, *top, heard_N=heard_N)
    return replace(batch, signals=signals)


def experts(hidden_NH: torch.Tensor, judge_N: torch.Tensor, model: CausalModel) -> Experts:
    """A judge's hidden states as if two had shared the rows."""
    parts = [(judge_N == number).nonzero()[:, 0] for number in range(2)]
    place_N = torch.zeros_like(judge_N)
    for part in parts:
        place_N[part] = torch.arange(len(part))
    return Experts(judge_N, place_N, tuple(hidden_NH[p] for p in parts), Shelf([model.head] * 2, hidden_NH.device))


UNSHARED, FARTHER = 4, 3  # tokens that the other vocabulary lacks: everywhere, or at the end of a longer span
UNKNOWN = 1  # a token that has no place in the text


def retokenized(batch: Batch, model: CausalModel, says: Says) -> SpanToken | SpanDense:
    """A table as if it had another tokenizer: its ids are the student's backwards, one is not shared, some tokens are
    in no span, and each token at position 2, 5, 8, .. is in one span with the spoken token before it."""
    span, first, count, spans = [], [], [], 0
    spoken = list(zip(batch.row_N.tolist(), batch.position_N.tolist(), batch.token_N.tolist(), strict=True))
    for n, (r, p, token) in enumerate(spoken):
        joins = p % 3 == 2 and n > 0 and spoken[n - 1][:2] == (r, p - 1) and span[-1] >= 0
        if token == UNKNOWN:
            span.append(-1)
        elif joins:
            span.append(span[-1])
            count[-1] += 1
        else:
            span.append(spans)
            first.append(n)
            count.append(1)
            spans += 1
    every = torch.arange(len(spoken))
    alignment = Alignment(
        *map(torch.tensor, (span, first, count)), every, torch.tensor([t == V - 1 for _, _, t in spoken])
    )
    backwards = torch.arange(V).flip(0)
    head = replace(model.head, weight=model.head.weight[backwards])
    hidden, token = model.all_hidden(batch), V - 1 - batch.token_N
    if says is Says.TOKEN:
        return SpanToken(alignment.spoken(token_logp(head, hidden, token, batch.temperature)), alignment)
    mine = [v for v in range(V) if v != UNSHARED]
    fewer = [v for v in mine if v != FARTHER]  # of spans of two tokens, as if one side's last began later
    ids = torch.tensor([*mine, *fewer])
    entries = torch.tensor([0, len(mine)]), torch.tensor([len(mine), len(fewer)])
    return SpanDense(hidden, head, token, alignment, Shared(ids, V - 1 - ids, *entries, alignment.count_G - 1))


def packed(rollouts: Sequence[Rollout], temperature: float = 1.0, dtype: torch.dtype = F64) -> Batch:
    return pack(rollouts, temperature=temperature, dtype=dtype)


def gradient(model: CausalModel, batch: Batch, loss, *, layout="right", tile=1000, micro=10**6, step=0, total=None):
    """([S, V] gradient, stats) of one optimizer batch, under a layout and cuts."""
    model.layout = layout
    student = Student(model, Optim(tile=tile, tokens_per_micro=micro))
    student.optimizer.zero_grad()
    stats = student.gradient(batch, loss, step, total)
    parameter = model.module.model.logits_SV
    grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    parameter.grad = None
    return grad, stats


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|, in norms."""
    return float((a - b).norm() / b.norm().clamp_min(1e-300))
