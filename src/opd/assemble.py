"""A recipe turned into what runs: methods bound to roles, then models, tokenizers, data and rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd import data, method
from opd.chat import Renderer, renderer, same_tokenizer
from opd.engines.base import Sampling
from opd.errors import UsageError
from opd.loss import Objective
from opd.method import Method, Setting, bind
from opd.mixture import Mixture
from opd.recipe import Recipe, Stage
from opd.types import Prompt, Says

if TYPE_CHECKING:
    from opd.model import CausalModel
    from opd.rewards import Reward
    from opd.student import Optim
    from opd.teachers import Teachers


@dataclass(frozen=True)
class Leg:
    """A stage that is ready to run: its method is bound."""

    stage: Stage
    method: Method
    sampling: Sampling

    @property
    def name(self) -> str:
        return self.stage.name or self.method.name

    @property
    def learns(self) -> bool:
        """Whether the critic learns in this stage."""
        return any(not learned.fixed for learned in self.method.loss.learned)

    def steps(self, prompts: int) -> int:
        """Length in steps, for a training set of this many prompts."""
        if self.stage.steps is not None:
            return self.stage.steps
        return max(1, ceil((self.stage.epochs or 1.0) * prompts / self.stage.train.prompts - 1e-9))


# --- what can be said without loading anything -----------------------------------------------------------------------


def legs(recipe: Recipe, folder: Path | None = None) -> tuple[Leg, ...]:
    """Every stage with its method built and bound to what the recipe offers. Loads no model; all problems at once."""
    roles = {role: Says.DENSE if t.model else Says.TEXT for role, t in recipe.teachers.items()}
    found: list[Leg] = []
    problems: list[str] = []
    for stage in recipe.stages:
        try:
            built = method.build(stage.method.name, stage.method.args, folder)
        except UsageError as error:
            problems += error.problems
            continue
        if stage.critic.learn:
            group = built.group if built.group > 1 else stage.critic.group
            objective = Objective(recipe.critic.loss, good="teacher", bad="student")
            built = built.with_critic(objective, group)
        elif stage.critic.learn is False:
            built = built.with_fixed_critic()
            if built.loss.learned and not any(leg.learns for leg in found):
                problems.append(
                    f"stage `{stage.name}` leaves the critic as it is (critic.learn: false), and no stage before it "
                    "teaches one: its scores would be those of a random head. Teach it in an earlier stage"
                )
        speak = stage.speak
        sampling = Sampling(speak.max_tokens, speak.temperature, speak.top_p, speak.top_k, speak.min_p)
        whole = Sampling(max_tokens=1)
        kept = ("top_p", "top_k", "min_p")
        cut = [f"{k} = {getattr(sampling, k)}" for k in kept if getattr(sampling, k) != getattr(whole, k)]
        setting = Setting(roles, bool(recipe.reward), responses=True, truncated_sampling=", ".join(cut))
        try:
            bind(built, setting)
        except UsageError as error:
            problems += [f"stage `{stage.name or built.name}`: {p}" for p in error.problems]
        found.append(Leg(stage, built, sampling))
    if problems:
        raise UsageError(*problems)
    return tuple(found)


def plan(recipe: Recipe, found: Sequence[Leg]) -> dict[str, Any]:
    """plan.json: what will be optimised, in words and as the equation, per stage."""
    needs = {str(j): s.name for leg in found for j, s in leg.method.needs.items()}
    return {
        "method": found[-1].method.name,
        "objective_words": words(found[-1].method),
        "equation": str(found[-1].method.loss),
        "speaks": str(found[-1].method.speaks),
        "student": recipe.student.model,
        "teachers": {role: (t.model or t.answers or t.url or t.cache) for role, t in recipe.teachers.items()},
        "needs": needs,
        "stages": [
            {
                "name": leg.name,
                "method": leg.method.name,
                "equation": str(leg.method.loss),
                "words": words(leg.method),
                "speaks": str(leg.method.speaks),
                "group": leg.method.group,
            }
            for leg in found
        ],
        "reads": [],
    }


def words(built: Method) -> str:
    """One sentence that says who speaks, who judges and what is learned."""
    hears = {
        Says.TEXT: "its text",
        Says.TOKEN: "its log-probability of each token",
        Says.DENSE: "its whole distribution at each token",
        Says.SCORE: "its score of each answer",
    }
    judges = ", ".join(f"{judge} gives {hears[says]}" for judge, says in built.needs.items()) or "nobody judges"
    reward = "; the task's reward is read" if "reward" in built.loss.reads else ""
    return f"{built.speaks} speaks ({built.group} a prompt); {judges}{reward}."


# --- models, data, rewards -------------------------------------------------------------------------------------------


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


def assemble(recipe: Recipe, found: Sequence[Leg], folder: Path, device: str) -> Parts:
    """Load everything a recipe names. Raises `UsageError` for models that do not fit together and data that lacks."""
    from opd import rewards as rewards_module
    from opd.model import load
    from opd.teachers import Teachers

    wants: dict[str, Says] = {}
    for judge, says in ((j, s) for leg in found for j, s in leg.method.needs.items()):
        wants[judge.role] = max(says, wants.get(judge.role, Says.TEXT))
    tokenizer = load_tokenizer(recipe.student.model, recipe.student.trust_remote_code)
    source = model_path(recipe.student.model)
    student = load(
        source,
        dtype=recipe.student.dtype,
        device=device,
        trust_remote_code=recipe.student.trust_remote_code,
        drop_layers=recipe.student.drop_layers,
        gradient_checkpointing=recipe.student.gradient_checkpointing,
        lora=recipe.student.lora,
        lora_alpha=recipe.student.lora_alpha,
        lora_targets=recipe.student.lora_targets,
    )
    student = with_vocab(student, len(tokenizer))
    student.name = recipe.student.model
    stop_ids = student.stop_ids or ((tokenizer.eos_token_id,) if tokenizer.eos_token_id is not None else ())
    template = recipe.student.template
    if template not in ("auto", "plain"):
        template = (folder / template).read_text()
    voice = renderer(tokenizer, stop_ids=stop_ids, template=template, think=recipe.data.think)

    if recipe.critic.init != "student" and any(leg.learns for leg in found):
        _critic_fits(recipe, tokenizer)
    models: dict[str, CausalModel] = {}
    voices: dict[str, Renderer] = {}
    answers: dict[str, dict[str, tuple[str, ...]]] = {}
    notes: list[str] = []
    for role, teacher in recipe.teachers.items():
        if role not in wants:
            notes.append(f"teacher `{role}` is not asked by any stage, and was not loaded")
        elif teacher.model:
            models[role], voices[role] = _teacher(role, teacher, tokenizer, student, device, wants[role])
        elif teacher.answers:
            answers[role] = data.answers(local(teacher.answers, folder))
    mixture, dev, read = _data(recipe, folder, voice, found, student)
    notes += read
    for role, recorded in answers.items():
        if any(role in leg.method.speaks.names or leg.method.loss.learned for leg in found):
            data.join(mixture_prompts(mixture), recorded, recipe.teachers[role].answers or role)
    teachers = Teachers(
        renderer=voice,
        student=student,
        models=models,
        answers=answers,
        voices=voices,
        sampling=replace(found[0].sampling, temperature=1.0),
        seed=recipe.run.seed,
        rows=recipe.speak.batch_rows,
        answers_each={role: teacher.samples for role, teacher in recipe.teachers.items()},
    )
    specs = [{"use": r.use, "weight": r.weight, "args": dict(r.args)} for r in recipe.reward]
    scorers = rewards_module.load_all(specs, folder)
    hashes = {"template": voice.fingerprint, "data.train": data.content(mixture_prompts(mixture))}
    hashes |= {"data.dev": data.content(dev)} if dev else {}
    return Parts(student, teachers, mixture, dev, scorers, tuple(notes), hashes)


def device_of(recipe: Recipe) -> str:
    """Where to compute: as the recipe says, or on a GPU if there is one."""
    import torch

    return recipe.run.device if recipe.run.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")


def mixture_prompts(mixture: Mixture) -> list[Prompt]:
    """Every prompt of a mixture once."""
    return [p for source in mixture.sources for p in source]


def local(path: str, folder: Path) -> str:
    """A path relative to the recipe's folder, if it is there; else as it is (a hub id, or relative to here)."""
    beside = folder / path
    return str(beside) if beside.exists() else path


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
) -> tuple[CausalModel, Renderer]:
    from opd.model import load

    own = load_tokenizer(teacher.model, teacher.trust_remote_code)
    if says in (Says.TOKEN, Says.DENSE) and (difference := same_tokenizer(tokenizer, own)):
        raise UsageError(
            f"student `{student.name}` and {role} `{teacher.model}` do not share a tokenizer: {difference}. This "
            "method compares their probabilities token by token. Use a teacher of the student's family, or a method "
            "that reads text alone: gad, seqkd"
        )
    source = model_path(teacher.model)
    loaded = load(source, dtype=teacher.dtype, device=device, trust_remote_code=teacher.trust_remote_code, frozen=True)
    stops = loaded.stop_ids or ((own.eos_token_id,) if own.eos_token_id is not None else ())
    loaded = with_vocab(loaded, student.head.vocab if says in (Says.TOKEN, Says.DENSE) else len(own))
    loaded.name = role
    return loaded, renderer(own, stop_ids=stops)


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
        kept = [p for p in reading.prompts if limit is None or len(voice.prompt_ids(p)) <= limit]
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
