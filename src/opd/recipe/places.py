"""Where keys live: the schema as a map from places to names, and what other tools call the same things."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, get_args

from opd.recipe.sections import Recipe, Section

Place = tuple[str, ...]  # a dotted key; "*" stands for any list item or role


@dataclass(frozen=True)
class Key:
    """One key of the schema: the place it is in, its name, and its line of documentation."""

    within: Place
    name: str
    about: str

    @property
    def dotted(self) -> str:
        return spell((*self.within, self.name))


def spell(place: Place) -> str:
    """`data.train.*.path` for people: `data.train.N.path`."""
    parts = ["ROLE" if p == "*" and place[i - 1] == "teachers" else "N" if p == "*" else p for i, p in enumerate(place)]
    return ".".join(parts)


def _sections(annotation: Any, place: Place) -> Iterator[tuple[type[Section], Place]]:
    """The sections that a field's type holds, and where they are under it."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, place
    origin = getattr(annotation, "__origin__", None)
    for inner in get_args(annotation):
        many = isinstance(origin, type) and not isinstance(origin, type(None)) and origin in _CONTAINERS
        yield from _sections(inner, (*place, "*") if many else place)


_CONTAINERS: Final = (tuple, Mapping)


def _walk(section: type[Section], within: Place) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        if name == "args":  # written out between the other keys of a method or reward
            continue
        yield Key(within, name, field.description or "")
        for inner, place in _sections(field.annotation, (*within, name)):
            yield from _walk(inner, place)


@cache
def every() -> tuple[Key, ...]:
    """Every key of a recipe except the arguments of methods and rewards, in the order of the schema."""
    return (*_walk(Recipe, ()), Key((), "method", "the one objective of a recipe without stages"))


def at(place: Place) -> tuple[Key, ...]:
    """The keys of one mapping."""
    return tuple(key for key in every() if key.within == place)


def documented(place: Place) -> str:
    """The line of documentation of a key."""
    return next((key.about for key in every() if (*key.within, key.name) == place), "")


def homes(name: str) -> list[str]:
    """Everywhere that a key of this name lives; a stage's own copies of `train` and `speak` do not count."""
    return [k.dotted for k in every() if k.name == name and k.within[2:] not in (("train",), ("speak",))]


def close(word: str, names: list[str], cutoff: float = 0.6) -> str | None:
    """The name that was probably meant."""
    plain = {name.lower().replace("-", "_"): name for name in names}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), list(plain), 1, cutoff)
    return plain[found[0]] if found else None


_OURS: Final[dict[str, str]] = {
    "student.model": "model_name_or_path base_model model_name pretrain student_model actor_model policy_model",
    "student.lora": "lora_r lora_rank peft use_peft adapter",
    "student.lora_targets": "lora_target_modules target_modules lora_target",
    "student.dtype": "torch_dtype bf16 fp16 precision mixed_precision",
    "student.gradient_checkpointing": "enable_gradient_checkpointing activation_checkpointing",
    "student.template": "chat_template",
    "teachers.ROLE.model": "teacher_model teacher_model_name_or_path teacher_name_or_path",
    "teachers.ROLE.url": "base_url api_base teacher_model_server_url teacher_url",
    "teachers": "teacher",
    "student": "model actor policy",
    "critic": "discriminator",
    "speak": "rollout generation sampling sampler",
    "train": "optim optimization trainer training",
    "eval": "evaluation validation",
    "reward": "rewards reward_funcs reward_fn reward_model reward_function",
    "method": "algorithm algo trainer_type loss_type rl",
    "data.train": "dataset datasets dataset_name train_file train_files train_dataset prompts_file",
    "data.dev": "eval_file eval_dataset val_file val_files validation_file test_file val_set",
    "data.max_prompt_tokens": "max_prompt_length prompt_max_len max_prompt_len max_prompt",
    "data.overlong": "filter_overlong_prompts truncation",
    "speak.engine": "use_vllm rollout_engine backend",
    "speak.max_tokens": "max_completion_length max_new_tokens response_length max_response_length generate_max_len",
    "speak.temperature": "sampling_temperature rollout_temperature",
    "speak.batch_rows": "generation_batch_size rollout_batch",
    "train.lr": "learning_rate actor_learning_rate optim_lr",
    "train.prompts": "per_device_train_batch_size train_batch_size batch_size global_batch_size rollout_batch_size"
    " prompts_per_step groups_per_batch",
    "train.updates": "ppo_mini_batch_size mini_batch_size num_minibatches num_substeps",
    "train.passes": "ppo_epochs num_iterations num_ppo_epochs",
    "train.tokens_per_micro": "gradient_accumulation_steps micro_batch_size ppo_micro_batch_size"
    " ppo_max_token_len_per_gpu max_tokens_per_gpu",
    "train.steps": "max_steps total_training_steps num_steps total_steps num_training_steps",
    "train.epochs": "num_train_epochs num_epochs total_epochs max_epochs",
    "train.warmup_steps": "warmup_ratio num_warmup_steps lr_warmup_steps warmup",
    "train.schedule": "lr_scheduler_type lr_scheduler lr_decay_style",
    "train.final_lr_share": "min_lr_ratio min_lr",
    "train.clip": "max_grad_norm grad_clip clip_grad gradient_clipping max_norm",
    "train.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "train.eps": "adam_epsilon adam_eps",
    "eval.every": "eval_steps eval_interval test_freq eval_every eval_freq",
    "eval.metric": "metric_for_best_model",
    "eval.at_start": "val_before_train eval_on_start",
    "run.save_every": "save_steps save_freq save_interval checkpointing_steps",
    "run.keep": "save_total_limit max_ckpt_to_keep max_ckpt_num",
    "run.dir": "output_dir save_path default_local_dir log_path ckpt_path",
    "run.name": "run_name experiment_name exp_name",
    "run.seed": "random_seed data_seed",
    "run.device": "use_cpu no_cuda",
    "stages.N.critic.alone_steps": "critic_warmup d_only_steps",
    "method.group": "num_generations rollout_n n_samples_per_prompt group_size num_samples num_return_sequences",
    "method.on_policy": "lmbda lambda student_data_fraction on_policy_fraction",
    "method.kl": "kl_coef init_kl_coef kl_loss_coef kl_penalty_coef kl_weight",
    "method.divergence": "kl_type divergence_type",
    "method.clip": "cliprange clip_ratio clip_eps epsilon epsilon_high ppo_clip",
}
OTHERS: Final = {other: ours for ours, theirs in _OURS.items() for other in theirs.split()}
