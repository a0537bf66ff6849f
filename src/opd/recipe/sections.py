"""The sections of a recipe: every key, its type, its default and one line that says what it is.

The lines are the only documentation of a key: the editor schema, the error messages and the docs all read them here.
These are the canonical shapes; the shorthands that a recipe may use (`method:` without `stages:`, one path for a list
of data sources) are settled in `opd.recipe.settle` before anything is validated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer

from opd.recipe.arguments import as_plain

T = TypeVar("T")

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Above0 = Annotated[float, Field(gt=0)]
From0 = Annotated[float, Field(ge=0)]
Dtype = Literal["float32", "bfloat16"]


class Table(Mapping[str, T]):
    """A mapping that cannot change, and that pickles (a `MappingProxyType` does not)."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[str, T]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> T:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(self._items)


def _rising(band: tuple[float, float]) -> tuple[float, float]:
    if band[0] >= band[1]:
        raise ValueError("two rising numbers, [low, high]")
    return band


Band = Annotated[tuple[float, float], AfterValidator(_rising)]


def _nothing() -> Table[Any]:
    return Table({})


def says(description: str, default: Any = ...) -> Any:
    """A field with its one line."""
    return Field(default, description=description)


class Section(BaseModel):
    """No key that is not listed, no change after reading, no infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Student(Section):
    """The model that learns. Master weights are always float32."""

    model: str = says("the model that learns: a Hugging Face id, a folder, or world:NAME")
    lora: Count | None = says("rank of the LoRA adapter; null trains every weight", None)
    lora_alpha: Above0 | None = says("LoRA scale times rank; null is twice the rank", None)
    lora_targets: tuple[str, ...] | None = says("modules that get an adapter; null is every linear layer", None)
    dtype: Dtype = says("what forward and backward compute in; master weights stay float32", "float32")
    gradient_checkpointing: bool = says("recompute activations in the backward pass: less memory, more time", False)
    template: str = says("chat template: auto (the tokenizer's own), plain (none), or a Jinja file", "auto")
    trust_remote_code: bool = says("run Python code that comes with the model", False)
    drop_layers: Natural = says("remove this many last decoder layers at load, to start from a pruned self", 0)


class Teacher(Section):
    """Where one role lives: exactly one of model, stage, answers, url, cache."""

    model: str | None = says("a model that answers and scores: a Hugging Face id, a folder, or world:NAME", None)
    stage: str | None = says("the student as it was at the end of this earlier stage, or `initial`", None)
    answers: str | None = says("a JSONL or parquet file of recorded answers: text only", None)
    url: str | None = says("an OpenAI-compatible endpoint", None)
    cache: str | None = says(
        "a folder of what this teacher said of texts that do not change: `opd signals` makes it", None
    )
    samples: Count = says("answers that a model gives to each prompt, where its text is read", 1)
    beams: Count = says("above 1: its text is the likeliest that so many beams find, instead of sampled", 1)
    resident: bool = says("stays in memory; false: loaded when asked, and one such teacher at a time", True)
    licence: str | None = says("licence of what this teacher says, for the model card", None)
    dtype: Dtype = says("what the teacher computes in", "float32")
    trust_remote_code: bool = says("run Python code that comes with the model", False)


class Critic(Section):
    """The model that learns to tell the teacher's answers from the student's."""

    init: str = says("what it starts from: student (a copy), or a model", "student")
    lr: Above0 = says("its learning rate", 1e-6)
    steps: Count = says("critic updates a student step", 1)
    replay: Natural = says("also learn from pairs of this many last steps, as many as there are fresh ones; 0: off", 0)
    weight_decay: From0 = says("weight decay of its optimizer", 0.0)
    clip: Above0 | None = says("largest norm of its gradient; null does not clip", 1.0)
    score_l2: From0 = says("penalty on squared scores, against drift and saturation", 0.0)
    accuracy_band: Band | None = says(
        "accuracy [low, high]: below, the student waits for the critic; above, the critic rests", None
    )


class Views(Section):
    """What a judge reads in place of the student's last message. Fields in braces are that message (`{prompt}`), the
    reference `{answer}`, the recorded `{response}`, the `{hint}`, or a column of the data; or ./file.py:function."""

    answer: str = says(
        "where a method's judge sees the answer",
        "{prompt}\n\nA reference solution, for your eyes only:\n{answer}\n\n"
        "Now answer the question above in your own words, step by step.",
    )
    demonstration: str = says(
        "where it sees a recorded response",
        "{prompt}\n\nAn example of a good response:\n{response}\n\nNow write your own response.",
    )
    context: str = says("where it sees a context that the student does without", "{context}\n\n{prompt}")
    hint: str = says("where it sees a hint from the next turn", "{prompt}\n\n[user's hint / instruction]\n{hint}")


class Hint(Section):
    """What followed an answer, and the hint that is drawn from it."""

    use: str = says("world: the rule of the built-in world; or ./file.py:name, from (prompt, answer) to text or None")
    judge: str | None = says("a teacher that turns that text into a hint; null takes the text as the hint", None)
    votes: Count = says("times the judge is asked; the longest hint counts", 1)


class Source(Section):
    """One file or data set of prompts."""

    path: str = says("JSONL or parquet file, folder, Hugging Face data set, or world:NAME")
    domain: str = says("what these prompts are about: evaluations are split by it", "")
    weight: Above0 = says("how often it is drawn, relative to the other sources", 1.0)
    split: str | None = says("split of a Hugging Face data set", None)
    prompt_key: str | None = says("column of the prompt; null finds messages or prompt", None)
    response_key: str | None = says("column of the recorded answer; null finds response or answer", None)
    wrap: str | None = says("the last message rewritten, such as '{prompt} /no_think'; fields as in views", None)


class Data(Section):
    """What is asked."""

    train: Annotated[tuple[Source, ...], Field(min_length=1)] = says("prompts to train on")
    dev: tuple[Source, ...] = says("prompts to evaluate on", ())
    think: Literal["keep", "strip"] = says("what to do with <think> spans of recorded answers", "keep")
    on_bad_row: Literal["stop", "skip"] = says("what to do with a row that cannot be read", "stop")
    max_prompt_tokens: Count | None = says("longest prompt in tokens; null is what the model can hold", None)
    overlong: Literal["skip", "stop"] = says("what to do with a longer prompt", "skip")


class Use(Section):
    """A function chosen by name, with its keyword arguments (plain values: what YAML can hold)."""

    args: Annotated[Mapping[str, Any], AfterValidator(Table), PlainSerializer(as_plain)] = Field(
        default_factory=_nothing, description="its arguments"
    )


class Reward(Use):
    """A verifier, reward model or function, and how much it counts."""

    use: str = says("name of the reward, or ./file.py:name")
    weight: float = says("its factor in the sum of rewards", 1.0)


class Method(Use):
    """An objective and its arguments."""

    name: str = says("name of the method (`opd methods` lists them), or ./file.py:name")


class Update(Section):
    """How a batch becomes an update."""

    lr: Above0 = says("learning rate of the student", 1e-6)
    prompts: Count = says("prompts a step", 256)
    updates: Count = says("minibatches that one batch of rollouts is cut into, one optimizer step each", 1)
    passes: Count = says("times that one batch of rollouts is gone through", 1)
    tokens_per_micro: Count = says("tokens of a forward and backward pass: memory, never the result", 8192)
    tile: Count | None = says(
        "tokens whose vocabulary logits exist at once: memory, never the result; null fits it", None
    )
    optimizer: Literal["adamw"] = says("the optimizer", "adamw")
    betas: tuple[Share, Share] = says("decay of its first and second moment", (0.9, 0.999))
    eps: Above0 = says("its epsilon", 1e-8)
    weight_decay: From0 = says("its weight decay", 0.0)
    clip: Above0 | None = says("largest norm of the gradient; null does not clip", 1.0)
    schedule: Literal["constant", "linear", "cosine"] = says("learning rate after the warm-up", "constant")
    warmup_steps: Natural = says("steps over which the learning rate rises from 0", 0)
    final_lr_share: Share = says("where the schedule ends, as a share of lr", 0.0)
    max_empty_steps: Count = says("steps without one token to learn from, in a row, that stop the run", 5)


class Train(Update):
    """How a batch becomes an update, and for how long."""

    steps: Count | None = says("length of each stage in steps", None)
    epochs: Above0 | None = says("length of each stage in passes over data.train", None)


class Speak(Section):
    """How the student samples."""

    engine: Literal["local", "vllm"] = says("what decodes", "local")
    temperature: Above0 = says("sampling temperature", 1.0)
    max_tokens: Count = says("longest answer in tokens", 512)
    top_p: Annotated[float, Field(gt=0, le=1)] = says("nucleus: keep the likeliest tokens of this mass; 1 is all", 1.0)
    top_k: Natural = says("keep this many likeliest tokens; 0 is all", 0)
    min_p: Share = says("keep tokens at least this likely relative to the likeliest; 0 is all", 0.0)
    batch_rows: Count = says("rows that decode together: memory, never the result", 64)


class StageCritic(Section):
    """What the critic does in this stage."""

    learn: bool | None = says("true teaches it beside a method that does not, false leaves it as it is", None)
    alone_steps: Natural = says("first steps of the stage in which only the critic learns", 0)
    group: Count = says("student samples a prompt for it, in a stage whose method asks for one", 8)


class Stage(Section):
    """One method for some time. Weights and critic carry over; the reference is the student at its start."""

    name: str = says("what the stage is called in metrics and reports; the method's name unless given", "")
    start: str = says("the student it begins with: previous, initial, or the name of an earlier stage", "previous")
    method: Method = says("the objective and its arguments")
    critic: StageCritic = says("what the critic does in this stage", StageCritic())
    domains: Annotated[tuple[str, ...], Field(min_length=1)] | None = says(
        "domains of data.train that it draws prompts from; null is all", None
    )
    steps: Count | None = says("length in steps; train.steps unless given", None)
    epochs: Above0 | None = says("length in passes over its prompts; train.epochs unless given", None)
    train: Update = says("what differs from the recipe's train", Update())
    speak: Speak = says("what differs from the recipe's speak", Speak())


class Eval(Section):
    """When and how the student is measured on data.dev."""

    every: Natural = says("steps between evaluations; 0 is only at the start and the end", 0)
    prompts: Count | None = says("how many prompts of data.dev; null is all", None)
    metric: str = says("what the best checkpoint is best at", "dev_score")
    length_band: Band | None = says("student length over teacher length [low, high] that the best may have", None)
    greedy: bool = says("measure the likeliest answer", True)
    sampled: bool = says("measure sampled answers", True)
    samples: Count = says("sampled answers a prompt", 1)
    at_start: bool = says("measure before the first step", True)
    keep: Literal["best", "last"] = says("which checkpoint the run ends with", "best")
    collapse: Share | None = says(
        "stop when dev accuracy falls below this share of its best, or steps show a collapse; null: go on", 0.5
    )


class Run(Section):
    """The run folder, the seed and the machine."""

    seed: Natural = says("seed of data order, sampling and initial weights", 17)
    save_every: Natural = says("steps between checkpoints; 0 is only at the end", 50)
    keep: Count = says("checkpoints kept, besides the best", 3)
    dir: str = says("folder of runs, from where the command runs", "runs")
    name: str | None = says("name of the run's folder; null makes one", None)
    threads: Count | None = says("CPU threads; null lets torch choose", None)
    carry: Literal["memory", "disk"] = says("where hidden states of teachers that come in turn lie", "memory")
    sample_rows: Natural = says("rollouts written to samples.jsonl a step", 8)
    device: Literal["auto", "cpu", "cuda"] = says("where to compute", "auto")


class Recipe(Section):
    """A whole run."""

    student: Student = says("the model that learns")
    teachers: Annotated[Mapping[str, Teacher], AfterValidator(Table), PlainSerializer(dict)] = Field(
        default_factory=_nothing, description="who judges: a role and where it lives"
    )
    critic: Critic = says("the critic, for methods that learn one", Critic())
    data: Data = says("what is asked")
    reward: tuple[Reward, ...] = says("what an answer is worth, for methods that read it", ())
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)] = says(
        "one method after another; a recipe of one has `method: NAME` instead"
    )
    views: Views = says("what judges read that the student does not", Views())
    hint: Hint | None = says("where hints come from, for judges that look back", None)
    speak: Speak = says("how the student samples", Speak())
    train: Train = says("how a batch becomes an update, and for how long", Train())
    eval: Eval = says("when and how the student is measured", Eval())
    run: Run = says("the run folder, the seed and the machine", Run())
