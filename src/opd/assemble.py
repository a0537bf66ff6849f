"""A recipe turned into what runs: models, tokenizers, data and rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd import data, hints
from opd.cache import Cache
from opd.chat import Renderer, renderer, same_tokenizer
from opd.errors import UsageError
from opd.legs import Leg, local
from opd.lock import hash_model
from opd.log import said_before
from opd.method import EXPERT
from opd.mixture import Mixture
from opd.recipe import Recipe
from opd.types import RETOKENIZED, Prompt, Says
from opd.views import View, shown, wrapped

if TYPE_CHECKING:
    from opd.cast import Load
    from opd.model import CausalModel
    from opd.rewards import Reward
    from opd.student import Optim
    from opd.teachers import Teachers


@dataclass
class Parts:
    """All that a run holds in memory."""

    student: CausalModel
    teachers: Teachers
    mixture: Mixture
    dev: tuple[Prompt, ...]
    rewards: tuple[Reward, ...]
    notes: tuple[str, ...]  # sentences about what was read, for the record
    hashes: Mapping[str, str]


def assemble(recipe: Recipe, found: Sequence[Leg], folder: Path, device: str, run: Path | None = None) -> Parts:
    """Load everything a recipe names, but what can wait until it is asked. `run` is the run's folder, if there is one.

    Raises `UsageError` for models that do not fit together and data that lacks.
    """
    from opd import rewards as rewards_module
    from opd import snapshot
    from opd.cast import Cast
    from opd.retokenize import crossing
    from opd.teachers import Teachers

    tokenizer = load_tokenizer(recipe.student.model, recipe.student.trust_remote_code)
    student = _student(recipe.student, len(tokenizer), device)
    stop_ids = student.stop_ids or ((tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ())
    template = recipe.student.template
    if template not in ("auto", "plain"):
        template = (folder / template).read_text()
    voice = renderer(tokenizer, stop_ids=stop_ids, template=template, think=recipe.data.think)

    if recipe.critic.init != "student" and any(leg.learns for leg in found):
        _critic_fits(recipe, tokenizer)
    mixture, dev, notes = _data(recipe, folder, voice, found, student)
    wants = _wants(recipe, found, mixture)
    models: dict[str, Load] = {}
    voices: dict[str, Renderer] = {}
    answers: dict[str, dict[str, tuple[str, ...]]] = {}
    caches: dict[str, Cache] = {}
    rooms: dict[str, int | None] = dict.fromkeys(("student", "reference", "ema"), _room(student))
    for role, teacher in recipe.teachers.items():
        if role not in wants:
            notes.append(f"teacher `{role}` is not asked by any stage, and was not loaded")
        elif teacher.model:
            voices[role], models[role], rooms[role] = _teacher(role, teacher, tokenizer, student, device, wants[role])
        elif teacher.stage:
            rooms[role] = _room(student)
            if run is not None:  # where the student is only measured, nobody asks what it was
                models[role] = partial(snapshot.frozen, student, snapshot.place(run, teacher.stage), role)
        elif teacher.answers:
            answers[role] = data.answers(local(teacher.answers, folder))
        elif teacher.cache:
            caches[role] = _cache(recipe, role, Path(local(teacher.cache, folder)), student, voice)
    for role in sorted({j.role for leg in found for j in leg.method.needs if j.view == RETOKENIZED} & voices.keys()):
        notes.append(crossing(voice, voices[role]).note(role))
    views = {name: View(name, text, folder) for name, text in recipe.views.model_dump().items()}
    held = {role: room for role, room in rooms.items() if room is not None}
    for leg in found:
        prompts = mixture_prompts(mixture.of(leg.stage.domains))
        _judges_see(leg, prompts, views, held, voice)
        for role, recorded in answers.items():
            if role in leg.method.speaks.names or leg.method.loss.learned:
                data.join(prompts, recorded, recipe.teachers[role].answers or role)
    teachers = Teachers(
        renderer=voice,
        student=student,
        models=Cast(models, frozenset(r for r, t in recipe.teachers.items() if t.resident)),
        views=views,
        came_next=None if recipe.hint is None else hints.rule(recipe.hint.use, folder),
        hint_judge=(recipe.hint.judge, recipe.hint.votes) if recipe.hint and recipe.hint.judge else None,
        rooms=held,
        disk=run / "carried" if run is not None and recipe.run.carry == "disk" else None,
        caches=caches,
        answers=answers,
        voices=voices,
        sampling=replace(found[0].sampling, temperature=1.0),
        seed=recipe.run.seed,
        rows=recipe.speak.batch_rows,
        answers_each={role: teacher.samples for role, teacher in recipe.teachers.items()},
        beams={role: teacher.beams for role, teacher in recipe.teachers.items()},
    )
    for cache in caches.values():
        teachers.heard.update(said_before(cache.folder))
    specs = [{"use": r.use, "weight": r.weight, "args": dict(r.args)} for r in recipe.reward]
    scorers = rewards_module.load_all(specs, folder)
    hashes = {"template": voice.fingerprint, "data.train": data.content(mixture_prompts(mixture))}
    hashes |= {"data.dev": data.content(dev)} if dev else {}
    hashes |= {f"teachers.{role}.cache": cache.index.fingerprint for role, cache in caches.items()}
    return Parts(student, teachers, mixture, dev, scorers, tuple(notes), hashes)


def _student(own: Any, vocab: int, device: str) -> CausalModel:
    from opd.model import load

    model = load(
        model_path(own.model),
        dtype=own.dtype,
        device=device,
        trust_remote_code=own.trust_remote_code,
        drop_layers=own.drop_layers,
        gradient_checkpointing=own.gradient_checkpointing,
        lora=own.lora,
        lora_alpha=own.lora_alpha,
        lora_targets=own.lora_targets,
    )
    return replace(with_vocab(model, vocab), name=own.model)


def _cache(recipe: Recipe, role: str, folder: Path, student: CausalModel, voice: Renderer) -> Cache:
    """A folder of recorded signals, if it was made with the student's tokens and, where it spoke, with this student."""
    cache = Cache(folder, student.device)
    made = cache.index
    if made.tokenizer != voice.fingerprint:
        raise UsageError(
            f"teachers.{role}.cache: {folder} was recorded with another tokenizer, chat template, stop token or "
            f"data.think than `{student.name}` has here, and no row of it would be found: record it anew"
        )
    if made.student not in ("", model_fingerprint(recipe.student, student)):
        raise UsageError(
            f"teachers.{role}.cache: {folder} holds what was said of another student's samples than "
            f"`{student.name}`'s: the reference that speaks is the student as it begins. Record it anew"
        )
    return cache


def model_fingerprint(chosen: Any, model: CausalModel) -> str:
    """What decides the numbers of a model as it is loaded: its weights (or hub id and revision), type and layers."""
    place = Path(model_path(chosen.model))
    revision = getattr(getattr(model.module, "config", None), "_commit_hash", None)
    content = hash_model(place) if place.is_dir() else f"{chosen.model}@{revision}"
    return f"{content}:{chosen.dtype}:{getattr(chosen, 'drop_layers', 0)}"


def device_of(recipe: Recipe) -> str:
    """Where to compute: as the recipe says, or on a GPU if there is one."""
    import torch

    return recipe.run.device if recipe.run.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def mixture_prompts(mixture: Mixture) -> list[Prompt]:
    """Every prompt of a mixture once."""
    return [p for source in mixture.sources for p in source]


def model_path(model: str) -> str:
    """Where a model lives: a folder of the built-in world, a local folder, or a hub id."""
    from opd import world

    return str(world.path(model)) if model.startswith(world.PREFIX) else model


def load_tokenizer(model: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a model; `UsageError` where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_path(model), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UsageError(f"the tokenizer of `{model}` could not be loaded: {str(error).splitlines()[0]}") from error


def with_vocab(model: CausalModel, vocab: int) -> CausalModel:
    """Only ids that the tokenizer has are real; rows of the head above them are padding, in speaking too."""
    return replace(model, head=replace(model.head, vocab=min(vocab, model.head.weight.shape[0])))


def _room(model: CausalModel) -> int | None:
    """Tokens that a model holds, prompt and answer together, where its config says so."""
    return getattr(getattr(model.module, "config", None), "max_position_embeddings", None)


def _critic_fits(recipe: Recipe, tokenizer: Any) -> None:
    own = load_tokenizer(recipe.critic.init, recipe.student.trust_remote_code)
    if difference := same_tokenizer(tokenizer, own):
        raise UsageError(
            f"critic.init `{recipe.critic.init}` does not share the tokenizer of student `{recipe.student.model}`: "
            f"{difference}. A critic reads the student's token ids: choose a model of the student's family"
        )


def _teacher(
    role: str, teacher: Any, tokenizer: Any, student: CausalModel, device: str, says: Says
) -> tuple[Renderer, Load, int | None]:
    """How a teacher's texts are rendered, how its model is loaded (at once if it stays, else when it is asked), and how
    many tokens it holds."""
    from opd.model import load

    own = load_tokenizer(teacher.model, teacher.trust_remote_code)
    if says.by_token and (difference := same_tokenizer(tokenizer, own)):
        raise UsageError(
            f"student `{student.name}` and {role} `{teacher.model}` do not share a tokenizer: {difference}. This "
            "method compares their probabilities token by token. Use a teacher of the student's family, or a method "
            "that reads text alone: gad, seqkd; or one that aligns the two: gold, uld"
        )
    vocab = student.head.vocab if says.by_token else len(own)

    def fetch() -> CausalModel:
        source, trust = model_path(teacher.model), teacher.trust_remote_code
        model = load(source, dtype=teacher.dtype, device=device, trust_remote_code=trust, frozen=True)
        return replace(with_vocab(model, vocab), name=role)

    first = fetch()
    stops = first.stop_ids or ((own.eos_token_id,) if own.eos_token_id is not None else ())
    return renderer(own, stop_ids=stops), (lambda: first) if teacher.resident else fetch, _room(first)


def _data(
    recipe: Recipe, folder: Path, voice: Renderer, found: Sequence[Leg], student: CausalModel
) -> tuple[Mixture, tuple[Prompt, ...], list[str]]:
    notes: list[str] = []
    room = _room(student)
    longest = max(leg.sampling.max_tokens for leg in found)
    if room is not None and room <= longest:
        raise UsageError(
            f"speak.max_tokens is {longest}, and `{student.name}` holds {room} tokens, prompt and answer together: "
            "lower speak.max_tokens, so that a prompt has room"
        )
    limits = [recipe.data.max_prompt_tokens, None if room is None else room - longest]
    limit = min((x for x in limits if x is not None), default=None)

    def fetch(source: Any, split: str) -> list[Prompt]:
        reading = data.reading(
            local(source.path, folder),
            split=source.split or split,
            domain=source.domain,
            prompt_key=source.prompt_key,
            response_key=source.response_key,
            on_bad_row=recipe.data.on_bad_row,
        )
        notes.append(str(reading.report))
        prompts = reading.prompts if source.wrap is None else wrapped(source.wrap, reading.prompts, source.path, folder)
        kept = [p for p in prompts if limit is None or len(voice.prompt_ids(p)) <= limit]
        if dropped := len(reading.prompts) - len(kept):
            said = f"{dropped} of {len(reading.prompts)} prompts of {source.path} are longer than {limit} tokens"
            if recipe.data.overlong == "stop" or not kept:
                raise UsageError(
                    f"{said}: shorten speak.max_tokens, raise data.max_prompt_tokens, or data.overlong=skip"
                )
            notes.append(f"{said} and were left out")
        said_by_data = [leg for leg in found if "data" in leg.method.speaks.names and split == "train"]
        learned = [p for p in kept if any(leg.domains is None or p.domain in leg.domains for leg in said_by_data)]
        bare = [p for p in learned if not p.responses]
        if bare:
            raise UsageError(
                f"{len(bare)} of {len(kept)} prompts of {source.path} have no recorded answer (the first: "
                f"{bare[0].where or bare[0].id}), and a stage learns from them: give each row a `response`"
            )
        return kept

    train = [fetch(source, "train") for source in recipe.data.train]
    mixture = Mixture(train, [s.weight for s in recipe.data.train], recipe.run.seed)
    dev = [p for source in recipe.data.dev for p in fetch(source, "dev")]
    shared = {p.id for p in mixture_prompts(mixture)} & {p.id for p in dev}
    if shared:
        notes.append(f"{len(shared)} prompts stand in data.train and in data.dev: they measure memory, not learning")
    return mixture, tuple(dev[: recipe.eval.prompts]), notes


def _wants(recipe: Recipe, found: Sequence[Leg], mixture: Mixture) -> dict[str, Says]:
    """The most that each role is asked for. Refuses prompts whose domain has no teacher with probabilities."""
    wants: dict[str, Says] = {}
    for leg in found:
        domains = sorted({p.domain for p in mixture_prompts(mixture.of(leg.stage.domains))})
        for judge, says in leg.method.needs.items():
            if judge.role == EXPERT:
                _refuse_lacking(recipe, leg, domains)
            shares = Says.TEXT if judge.view == RETOKENIZED else says  # by text alone, in tokens of its own
            for role in domains if judge.role == EXPERT else [judge.role]:
                wants[role] = max(shares, wants.get(role, Says.TEXT))
        if recipe.hint is not None and recipe.hint.judge and leg.looks_back:
            wants.setdefault(recipe.hint.judge, Says.TEXT)
    return wants


def _refuse_lacking(recipe: Recipe, leg: Leg, domains: Sequence[str]) -> None:
    able = [role for role, t in recipe.teachers.items() if t.model or t.stage]
    lacking = [d for d in domains if d not in able]
    if not lacking:
        return
    text = [d for d in lacking if d in recipe.teachers]
    raise UsageError(
        f"stage `{leg.name}`: each prompt is judged by the teacher that is named after its domain, and there is none "
        f"for {', '.join(repr(d) for d in lacking)} (with probabilities: {', '.join(able)}"
        + (f"; {', '.join(text)} gives text only" if text else "")
        + "): give each domain a teacher with a `model` or a `stage`, and each source of data.train its `domain`"
    )


def _judges_see(
    leg: Leg, prompts: Sequence[Prompt], views: Mapping[str, View], rooms: Mapping[str, int], voice: Renderer
) -> None:
    """Refuse prompts that a judge has no view of, or that are too long for it with the view and an answer."""
    for judge, says in leg.method.needs.items():
        if not says.by_token or judge.view == RETOKENIZED:
            continue
        if judge.view in views and views[judge.view].looks_back:
            continue  # a hint is only known after the student spoke: then such a row is not heard
        seen = shown(views[judge.view], prompts, "data.train") if judge.view in views else prompts
        room = [rooms.get(p.domain if judge.role == EXPERT else judge.role) for p in prompts]
        size = [len(voice.prompt_ids(p)) + leg.sampling.max_tokens for p in seen]
        long = [i for i, limit in enumerate(room) if limit is not None and size[i] > limit]
        if long:
            first = prompts[long[0]]
            raise UsageError(
                f"stage `{leg.name}`: {len(long)} of {len(prompts)} prompts are too long for `{judge}` (the first: "
                f"{first.where or first.id}, {size[long[0]]} tokens as it reads them, speak.max_tokens among them, and "
                f"it holds {room[long[0]]}): lower speak.max_tokens or data.max_prompt_tokens"
                + (f", or shorten views.{judge.view}" if judge.view in views else "")
            )


def optim(update: Any) -> Optim:
    """The optimizer's settings out of a recipe's `train`."""
    from opd.student import Optim

    return Optim(
        lr=update.lr,
        betas=update.betas,
        eps=update.eps,
        weight_decay=update.weight_decay,
        clip=update.clip or 0.0,
        updates=update.updates,
        passes=update.passes,
        tokens_per_micro=update.tokens_per_micro,
        tile=update.tile,
    )
