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
from opd.views import View, refuse_missing, wrapped

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

    wants: dict[str, Says] = {}
    for judge, says in ((j, s) for leg in found for j, s in leg.method.needs.items()):
        shares = Says.TEXT if judge.view == RETOKENIZED else says  # by text alone, in tokens of its own
        wants[judge.role] = max(shares, wants.get(judge.role, Says.TEXT))
    tokenizer = load_tokenizer(recipe.student.model, recipe.student.trust_remote_code)
    student = _student(recipe.student, len(tokenizer), device)
    stop_ids = student.stop_ids or ((tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ())
    template = recipe.student.template
    if template not in ("auto", "plain"):
        template = (folder / template).read_text()
    voice = renderer(tokenizer, stop_ids=stop_ids, template=template, think=recipe.data.think)

    if recipe.critic.init != "student" and any(leg.learns for leg in found):
        _critic_fits(recipe, tokenizer)
    if recipe.hint is not None and recipe.hint.judge:
        wants.setdefault(recipe.hint.judge, Says.TEXT)
    if EXPERT in wants:
        wants = {role: max(wants.get(role, Says.TEXT), wants[EXPERT]) for role in (*wants, *recipe.teachers)}
    models: dict[str, Load] = {}
    voices: dict[str, Renderer] = {}
    answers: dict[str, dict[str, tuple[str, ...]]] = {}
    caches: dict[str, Cache] = {}
    notes: list[str] = []
    for role, teacher in recipe.teachers.items():
        if role not in wants:
            notes.append(f"teacher `{role}` is not asked by any stage, and was not loaded")
        elif teacher.model:
            voices[role], models[role] = _teacher(role, teacher, tokenizer, student, device, wants[role])
        elif teacher.stage:
            assert run is not None, "a teacher that is a stage of the run, without a run"
            models[role] = partial(snapshot.frozen, student, snapshot.place(run, teacher.stage), role)
        elif teacher.answers:
            answers[role] = data.answers(local(teacher.answers, folder))
        elif teacher.cache:
            caches[role] = _cache(recipe, role, Path(local(teacher.cache, folder)), student, voice)
    for role in sorted({j.role for leg in found for j in leg.method.needs if j.view == RETOKENIZED} & voices.keys()):
        notes.append(crossing(voice, voices[role]).note(role))
    mixture, dev, read = _data(recipe, folder, voice, found, student)
    views = {name: View(name, text, folder) for name, text in recipe.views.model_dump().items()}
    _judges_see(views, mixture, found, models)
    notes += read
    for role, recorded in answers.items():
        if any(role in leg.method.speaks.names or leg.method.loss.learned for leg in found):
            data.join(mixture_prompts(mixture), recorded, recipe.teachers[role].answers or role)
    teachers = Teachers(
        renderer=voice,
        student=student,
        models=Cast(models, frozenset(r for r, t in recipe.teachers.items() if t.resident)),
        views=views,
        came_next=None if recipe.hint is None else hints.rule(recipe.hint.use, folder),
        hint_judge=(recipe.hint.judge, recipe.hint.votes) if recipe.hint and recipe.hint.judge else None,
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


def _critic_fits(recipe: Recipe, tokenizer: Any) -> None:
    own = load_tokenizer(recipe.critic.init, recipe.student.trust_remote_code)
    if difference := same_tokenizer(tokenizer, own):
        raise UsageError(
            f"critic.init `{recipe.critic.init}` does not share the tokenizer of student `{recipe.student.model}`: "
            f"{difference}. A critic reads the student's token ids: choose a model of the student's family"
        )


def _teacher(
    role: str, teacher: Any, tokenizer: Any, student: CausalModel, device: str, says: Says
) -> tuple[Renderer, Load]:
    """How a teacher's texts are rendered, and how its model is loaded: at once if it stays, else when it is asked."""
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
    return renderer(own, stop_ids=stops), (lambda: first) if teacher.resident else fetch


def _data(
    recipe: Recipe, folder: Path, voice: Renderer, found: Sequence[Leg], student: CausalModel
) -> tuple[Mixture, tuple[Prompt, ...], list[str]]:
    notes: list[str] = []
    room = getattr(getattr(student.module, "config", None), "max_position_embeddings", None)
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
        prompts = reading.prompts if source.wrap is None else wrapped(View("wrap", source.wrap), reading.prompts)
        kept = [p for p in prompts if limit is None or len(voice.prompt_ids(p)) <= limit]
        if dropped := len(reading.prompts) - len(kept):
            said = f"{dropped} of {len(reading.prompts)} prompts of {source.path} are longer than {limit} tokens"
            if recipe.data.overlong == "stop" or not kept:
                raise UsageError(
                    f"{said}: shorten speak.max_tokens, raise data.max_prompt_tokens, or data.overlong=skip"
                )
            notes.append(f"{said} and were left out")
        bare = [p for p in kept if not p.responses]
        if bare and split == "train" and any("data" in leg.method.speaks.names for leg in found):
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


def _judges_see(views: Mapping[str, View], mixture: Mixture, found: Sequence[Leg], models: Mapping[str, Load]) -> None:
    """Refuse prompts that a judge has no view of, or whose domain no teacher is named after."""
    prompts = mixture_prompts(mixture)
    asked = {judge for leg in found for judge, says in leg.method.needs.items() if says is not Says.TEXT}
    for name in sorted({judge.view for judge in asked} & views.keys()):
        refuse_missing(views[name], prompts, "data.train")
    lacking = sorted({p.domain for p in prompts} - models.keys())
    if lacking and any(judge.role == EXPERT for judge in asked):
        raise UsageError(
            f"each prompt is judged by the teacher that is named after its domain, and there is none for the domains "
            f"{', '.join(repr(d) for d in lacking)} (teachers: {', '.join(models)}): name a teacher after each domain, "
            "and give each source of data.train its `domain`"
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
