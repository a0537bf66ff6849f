"""Signals that were written down: what is read back teaches as the judge itself, and what is not there is an error."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from driven import answers, metrics, resume, run, short, small
from tabled import F64, V, gradient, packed, random_rollouts, random_table, relative
from test_layers import command, loaded

from opd import offline
from opd.anchors import live
from opd.batch import Batch
from opd.cache import Cache, Index, read_index
from opd.cli import app
from opd.credits import log_ratio
from opd.divergences import Divergence, Support, eopd, lsm, nemo, openclaw, sdft, verl
from opd.errors import OpdError, UsageError
from opd.gates import heard
from opd.legs import legs
from opd.loss import Loss, k3, match, push
from opd.method import TEACHER
from opd.recipe import dump
from opd.signals import Dense, Token, TopK
from opd.types import Says

K = 3
INDEX = Index("teacher", "table", "t0", "ids", "", "token", "float64", 1.3, K, 1.0, V, V, 1.0, None)
SPOKEN = packed(random_rollouts(("data", "student")), 1.3)
EVERYWHERE = torch.ones(len(SPOKEN.rollouts), dtype=torch.bool)


def kept(folder: Path, keep: str, batch: Batch = SPOKEN, shards: int = 3, view: str = "same", **changes: Any) -> Cache:
    """What a table says of these rows, written in some shards."""
    teacher = random_table(2)
    index = replace(INDEX, keep=keep, temperature=None if keep == "hidden" else batch.temperature, **changes)
    folder.mkdir(exist_ok=True)
    cache = Cache.begin(folder, index, teacher.head)
    wish = offline.Wish("teacher", index.keep, index.k, index.top_temperature, index.temperature, ())
    for start in range(shards):
        part = batch.rows(range(start, len(batch.rollouts), shards))
        dense = Dense(teacher.all_hidden(part), teacher.head)
        said = Token(dense.logp(part.token_N, part.temperature)) if keep == "token" else dense
        cache.add(part, view, offline.extract(said, part, wish))
    return Cache(folder)


def hearing(batch: Batch, cache: Cache, says: Says) -> Batch:
    shown = torch.ones(len(batch.rollouts), dtype=torch.bool)
    return replace(batch, signals={TEACHER: cache.hear(batch, shown, "same", says)})


LOSSES: dict[str, tuple[str, Loss]] = {
    "token": ("token", push(log_ratio(TEACHER), anchor=live()) + 0.1 * k3(TEACHER)),
    "verl": ("top_k", match(TEACHER, verl(K)) + 0.1 * k3(TEACHER)),
    "eopd": ("top_k", match(TEACHER, eopd(K))),
    "nemo, fewer": ("top_k", match(TEACHER, nemo(K - 1))),
    "lsm": ("top_k", match(TEACHER, lsm(K))),
    "openclaw": ("top_k", match(TEACHER, openclaw(K)) + push(log_ratio(TEACHER), anchor=live())),
    "all of a small vocabulary": ("top_k", match(TEACHER, openclaw(V))),
    "hidden": ("hidden", match(TEACHER, Divergence("jsd", (("beta", 0.3),), 1.7)) + 0.1 * k3(TEACHER)),
    "the student's top": ("hidden", match(TEACHER, sdft(k=K))),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_read_back_teaches_as_the_judge_itself(name: str, tmp_path: Path) -> None:
    """Float64, 1e-10, with rows in another order than they were written in and in several tiles."""
    keep, loss = LOSSES[name]
    cache = kept(tmp_path, keep, k=V if "all" in name else K)
    assert loss.needs[TEACHER] <= cache.index.says
    model, teacher = random_table(1), random_table(2)
    order = torch.randperm(len(SPOKEN.rollouts), generator=torch.Generator().manual_seed(3)).tolist()
    batch = SPOKEN.rows(order)
    dense = Dense(teacher.all_hidden(batch), teacher.head)
    want, stats = gradient(model, replace(batch, signals={TEACHER: dense}), loss)
    got, same = gradient(model, hearing(batch, cache, loss.needs[TEACHER]), loss, tile=4, micro=20)
    assert want.norm() > 1e-3 and relative(got, want) < 1e-10
    assert same["loss/total"] == pytest.approx(stats["loss/total"], abs=1e-12)


def test_each_kind_is_heard_as_what_it_is(tmp_path: Path) -> None:
    for keep, kind in (("token", Token), ("top_k", TopK), ("hidden", Dense)):
        cache = kept(tmp_path / keep, keep)
        assert type(cache.hear(SPOKEN, EVERYWHERE, "same", cache.index.says)) is kind
        assert type(cache.hear(SPOKEN, EVERYWHERE, "same", Says.TOKEN)) is Token


def test_rows_are_found_by_what_they_are_and_a_missing_one_is_named(tmp_path: Path) -> None:
    cache = kept(tmp_path, "token")
    said = SPOKEN.rollouts[0]
    other = (*said.tokens[:-1], (said.tokens[-1] + 1) % V)
    strangers = {
        "another answer": replace(said, tokens=other),
        "another mask": replace(said, mask=(*said.mask[:-1], not said.mask[-1])),
        "another prompt": replace(said, prompt=replace(said.prompt, messages=said.prompt.messages * 2)),
    }
    for rollout in strangers.values():
        with pytest.raises(OpdError, match=f"prompt {rollout.prompt.id} .* does not hold what `teacher` says"):
            hearing(packed([rollout], 1.3), cache, Says.TOKEN)
    with pytest.raises(OpdError, match="does not hold"):
        cache.hear(SPOKEN, EVERYWHERE, "answer", Says.TOKEN)
    again = replace(said, sample=7, text="", behaviour=(0.0,) * len(said.tokens))  # who, when and how likely: no matter
    hearing(packed([again], 1.3), cache, Says.TOKEN)
    for changed in ({"teacher": "t1"}, {"tokenizer": "others"}, {"temperature": 1.0}):
        index = replace(cache.index, **changed)
        assert index.fingerprint != cache.index.fingerprint
        with pytest.raises(UsageError, match=f"holds other signals: {next(iter(changed))} is"):
            Cache.begin(tmp_path, index, None)


@pytest.mark.parametrize("keep", ["token", "top_k", "hidden"])
def test_rows_without_a_view_are_not_looked_for(keep: str, tmp_path: Path) -> None:
    """What the judge's view has nothing of is silent: a gate may shut it out, and else it is an error."""
    batch = packed(random_rollouts(("data",)), 1.3)
    shown = torch.tensor([True, False, True, True])
    cache = kept(tmp_path, keep, batch.rows([0, 2, 3]), shards=1)
    loss = {"token": k3(TEACHER), "top_k": match(TEACHER, openclaw(K))}.get(keep, match(TEACHER, Divergence("tvd")))
    partly = replace(batch, signals={TEACHER: cache.hear(batch, shown, "same", cache.index.says)})
    got, _ = gradient(random_table(1), partly, loss.where(heard(TEACHER)), tile=2)
    dense = Dense(random_table(2).all_hidden(batch), random_table(2).head, shown[batch.row_N])
    want, _ = gradient(random_table(1), replace(batch, signals={TEACHER: dense}), loss.where(heard(TEACHER)))
    assert got.isfinite().all() and relative(got, want) < 1e-10
    with pytest.raises(OpdError, match="no finite value"):
        gradient(random_table(1), partly, loss)


def test_hidden_states_may_be_stored_in_half(tmp_path: Path) -> None:
    """Half the bytes, and a distribution that is off by the rounding of its hidden states."""
    whole, half = kept(tmp_path / "whole", "hidden"), kept(tmp_path / "half", "hidden", dtype="float16")
    shards = lambda cache: sum(p.stat().st_size for p in cache.folder.glob("[0-9]*.safetensors"))
    tokens = len(SPOKEN.row_N)
    assert (whole.index.bytes_per_token, half.index.bytes_per_token) == (8 * V, 2 * V)
    assert shards(whole) - shards(half) == tokens * 6 * V
    a, b = (c.hear(SPOKEN, EVERYWHERE, "same", Says.DENSE).logits(slice(None)) for c in (whole, half))
    assert b.dtype == F64 and 0 < (a - b).abs().max() < 2e-3


# --- what a loss asks, and what a record gives ------------------------------------------------------------------------


def test_what_is_compared_decides_what_is_asked() -> None:
    """The judge's own likeliest tokens: TOP. The student's, those of either, all of them: DENSE."""
    for rest in ("dropped", "renormalised", "teacher_renormalised", "tail"):
        asked = {
            w: match(TEACHER, Divergence("tvd", support=Support(w, 4, rest))) for w in ("teacher", "student", "union")
        }
        assert {w: loss.needs[TEACHER] for w, loss in asked.items()} == {
            "teacher": Says.TOP,
            "student": Says.DENSE,
            "union": Says.DENSE,
        }
        assert asked["teacher"].tops(TEACHER) == {(4, 1.0)} and not asked["union"].tops(TEACHER)
    assert match(TEACHER, Divergence("tvd")).needs[TEACHER] is Says.DENSE


def refused(tmp_path: Path, method: Any, keep: str, **changes: Any) -> str:
    folder = tmp_path / "signals"
    folder.mkdir(exist_ok=True)
    temperature = changes.pop("temperature", None if keep == "hidden" else 1.0)
    index = replace(INDEX, keep=keep, temperature=temperature, dtype="float32", vocab=1000, k=8, **changes)
    (folder / "index.json").write_text(json.dumps(vars(index)))
    with pytest.raises(UsageError) as caught:
        legs(short(tmp_path, method, teachers={"teacher": {"cache": str(folder)}}), tmp_path)
    return str(caught.value)


def test_what_a_record_cannot_give_is_refused_in_a_sentence(tmp_path: Path) -> None:
    top = {"name": "gkd", "on_policy": 0.0, "top_k": 8}
    said = refused(tmp_path, {"name": "token_kd"}, "top_k")
    assert (
        "needs the whole next-token distribution of `teacher`, which gives log-probabilities of its likeliest" in said
    )
    assert "or a divergence on the judge's own likeliest tokens" in said
    assert "needs the whole next-token" in refused(tmp_path, {**top, "whose": "student"}, "top_k")
    assert "needs the whole next-token" in refused(tmp_path, {**top, "whose": "union"}, "top_k")
    assert "needs log-probabilities of its likeliest tokens" in refused(tmp_path, top, "token")
    assert "compares the 9 likeliest tokens of `teacher` at temperature 1, and the record holds 8" in refused(
        tmp_path, {**top, "top_k": 9}, "top_k"
    )
    assert "at temperature 2, and the record holds 8 at temperature 1" in refused(
        tmp_path, {**top, "temperature": 2.0}, "top_k"
    )
    assert "at temperature 0.7, and speak.temperature is 1" in refused(tmp_path, top, "top_k", temperature=0.7)
    for keep, method in (("hidden", "gkd"), ("token", "token_opd")):
        assert "of what the student says anew in every step" in refused(tmp_path, method, keep)


def test_a_folder_that_is_no_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no recorded signals: make them with `opd signals"):
        legs(short(tmp_path, "token_kd", teachers={"teacher": {"cache": str(tmp_path)}}), tmp_path)
    (tmp_path / "index.json").write_text('{"format": 99}')
    with pytest.raises(UsageError, match="recorded in format 99, and this version reads 1"):
        read_index(tmp_path)


# --- recording, and training from the record --------------------------------------------------------------------------

FIXED = {
    "token_kd": ({"name": "token_kd", "temperature": 2.0}, "hidden", {}),
    "gkd": ({"name": "gkd", "on_policy": 0.0, "divergence": "forward_kl", "top_k": 6}, "top_k", {"k": 6}),
    "gkd more": ({"name": "gkd", "on_policy": 0.0, "top_k": 4, "rest": "dropped"}, "top_k", {"k": 9, "keep": "top_k"}),
    "gkd hidden": ({"name": "gkd", "on_policy": 0.0, "top_k": 4}, "hidden", {"keep": "hidden"}),
    "views": ({"name": "seen"}, "token", {}),
}
SEEN = """
from opd.anchors import live
from opd.credits import log_ratio
from opd.gates import heard
from opd.loss import push
from opd.method import Method, one
from opd.types import Judge

def seen() -> Method:
    judge = Judge("teacher", "answer")
    return Method(one("data"), push(log_ratio(judge), anchor=live()).where(heard(judge)))
"""


@pytest.mark.parametrize("name", FIXED)
def test_training_from_a_record_is_training_from_the_teacher(name: str, tmp_path: Path) -> None:
    """A float32 run end to end: the same numbers in metrics.jsonl, the record's batches being laid out otherwise."""
    method, keep, how = FIXED[name]
    (tmp_path / "seen.py").write_text(SEEN)
    method = {"name": f"{tmp_path}/seen.py:seen"} if name == "views" else method
    chosen = short(tmp_path, method, 4, "live")
    report = offline.record(chosen, tmp_path, tmp_path / "signals", "teacher", **how)
    assert (report["keep"], report["rows"]) == (keep, 14)
    _, alive = run(chosen, tmp_path)
    record = {"teacher": {"cache": str(tmp_path / "signals")}}
    _, from_disk = run(short(tmp_path, method, 4, "disk", teachers=record), tmp_path)
    same_numbers(alive, from_disk, EXACT_ONLY if keep == "top_k" else frozenset())


EXACT_ONLY = frozenset({"kl", "entropy", "overlap", "position"})  # areas with numbers of whole distributions


def same_numbers(one: Path, other: Path, lacks: frozenset[str] = frozenset()) -> None:
    for alive, read in zip(metrics(one), metrics(other), strict=True):
        assert {name.split("/")[0] for name in alive.keys() - read.keys()} <= lacks
        assert {"grad/norm", "loss/total"} <= read.keys() <= alive.keys()
        for name, number in read.items():
            assert number == (alive[name] if name == "stage" else pytest.approx(alive[name], rel=2e-5, abs=1e-7)), name


def test_the_record_is_what_its_size_report_says(tmp_path: Path) -> None:
    """Hidden states take their width, whatever the vocabulary; top-k twice k numbers; a token one."""
    found = {}
    for name, how in {"hidden": {}, "half": {"dtype": "bfloat16"}}.items():
        found[name] = offline.record(short(tmp_path, "token_kd"), tmp_path, tmp_path / name, "teacher", **how)
    top = {"name": "gkd", "on_policy": 0.0, "top_k": 6}
    found["top_k"] = offline.record(short(tmp_path, top), tmp_path, tmp_path / "top_k", "teacher")
    index = read_index(tmp_path / "hidden")
    assert {k: r["bytes_per_token"] for k, r in found.items()} == {
        "hidden": 4 * index.width,
        "half": 2 * index.width,
        "top_k": 4 + 6 * (4 + 4),
    }
    assert all(r["bytes_per_token_whole"] == 4 * index.vocab for r in found.values())
    heads = {k: (tmp_path / k / "head.safetensors") for k in found}
    assert [p.exists() for p in heads.values()] == [True, True, False]
    for name, report in found.items():
        shards = sum(p.stat().st_size for p in (tmp_path / name).glob("[0-9]*.safetensors"))
        overhead = shards - report["tokens"] * report["bytes_per_token"]
        assert 0 < overhead < 200 + 60 * report["rows"]  # safetensors' header, with a key a row
    with pytest.raises(UsageError, match="--dtype is of hidden states"):
        offline.record(short(tmp_path, top), tmp_path, tmp_path / "x", "teacher", dtype="float16")


def test_killed_anywhere_it_goes_on_and_nothing_is_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, out = short(tmp_path, "token_kd"), tmp_path / "signals"
    monkeypatch.setattr(offline, "SHARD", 20)  # tokens: several shards
    offline.record(chosen, tmp_path, tmp_path / "whole", "teacher")
    child = os.fork()
    if not child:  # killed while its third shard is half written
        count, replaced = [0], Path.replace

        def replace_or_die(self: Path, target: Path) -> Path:
            count[0] += self.suffix == ".tmp" and "safetensors" in self.name
            if count[0] == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return replaced(self, target)

        Path.replace = replace_or_die  # type: ignore[method-assign, assignment]
        offline.record(chosen, tmp_path, out, "teacher")
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert len(list(out.glob("[0-9]*.safetensors"))) == 2
    report = offline.record(chosen, tmp_path, out, "teacher")
    whole, again = Cache(tmp_path / "whole"), Cache(out)
    assert again.rows == whole.rows == 14 and report["tokens"] == whole.tokens == again.tokens
    assert again._where.keys() == whole._where.keys()
    assert not list(out.glob(".*.tmp"))
    before = {p.name: p.read_bytes() for p in out.glob("*.safetensors")}
    offline.record(chosen, tmp_path, out, "teacher")  # all is there
    assert {p.name: p.read_bytes() for p in out.glob("*.safetensors")} == before


def test_more_prompts_are_added_and_a_lacking_one_is_named(tmp_path: Path) -> None:
    few, out = short(tmp_path, "token_kd", data={"train": "world:sort:6"}), tmp_path / "signals"
    offline.record(few, tmp_path, out, "teacher")
    changed = {"teachers": {"teacher": {"cache": str(out)}}}
    with pytest.raises(OpdError, match=r"step \d, stage `token_kd`: prompt [0-9a-f]{16} .*world:sort.* does not hold"):
        run(short(tmp_path, "token_kd", 4, "lacks", **changed), tmp_path)
    more = short(tmp_path, "token_kd")
    assert offline.record(more, tmp_path, out, "teacher")["rows"] == 14
    run(short(tmp_path, "token_kd", 4, "whole", **changed), tmp_path)


def test_a_teachers_own_samples_come_from_the_record(tmp_path: Path) -> None:
    """What a teacher said while it was recorded is what the run learns from, without the teacher."""
    (tmp_path / "told.py").write_text(
        SEEN.replace('one("data")', 'one("teacher")').replace('"teacher", "answer"', '"teacher"')
    )
    chosen = short(tmp_path, f"{tmp_path}/told.py:seen", 3, "live")
    offline.record(chosen, tmp_path, tmp_path / "signals", "teacher")
    _, alive = run(chosen, tmp_path)
    changed = {"teachers": {"teacher": {"cache": str(tmp_path / "signals")}}}
    _, from_disk = run(short(tmp_path, f"{tmp_path}/told.py:seen", 3, "disk", **changed), tmp_path)
    same_numbers(alive, from_disk)


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    def why(method: Any, role: str = "teacher", how: Any = None, **changes: Any) -> str:
        chosen = short(tmp_path, method, **changes)
        with pytest.raises(UsageError) as caught:
            offline.wished(chosen, legs(chosen, tmp_path), role, **(how or {}))
        return str(caught.value)

    assert "what the student says anew in every step, which cannot be recorded" in why("gkd")
    assert "no stage of this recipe asks `teacher` for probabilities" in why("seqkd")
    assert "`critic` is no teacher with a `model:`" in why("token_kd", "critic")
    assert "--keep token is less than this recipe's loss reads" in why("token_kd", how={"keep": "token"})
    top = {"name": "gkd", "on_policy": 0.0, "top_k": 6}
    assert "--k 5 is less than the 6 tokens" in why(top, how={"k": 5})
    two = [{"name": str(t), "method": {**top, "temperature": t}, "steps": 1} for t in (1.0, 2.0)]
    chosen = small(tmp_path, stages=two)
    with pytest.raises(UsageError, match="compared at several temperatures: take --keep hidden"):
        offline.wished(chosen, legs(chosen, tmp_path), "teacher")
    assert offline.wished(chosen, legs(chosen, tmp_path), "teacher", "hidden").temperature is None


def test_a_record_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    offline.record(short(tmp_path, "token_kd"), tmp_path, tmp_path / "signals", "teacher")
    changed = {"teachers": {"teacher": {"cache": str(tmp_path / "signals")}}}
    with pytest.raises(UsageError, match="recorded with another tokenizer, chat template, stop token or"):
        run(short(tmp_path, "token_kd", 1, "x", data={"train": "world:sort:14", "think": "strip"}, **changed), tmp_path)


def test_a_run_goes_on_only_with_the_record_that_it_began_with(tmp_path: Path) -> None:
    out = tmp_path / "signals"
    offline.record(short(tmp_path, "token_kd"), tmp_path, out, "teacher")
    changed = {"teachers": {"teacher": {"cache": str(out)}}}
    run(short(tmp_path, "token_kd", 2, "one", **changed), tmp_path)
    assert resume(tmp_path / "one")["status"] == "finished"
    index = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps({**index, "teacher": "another"}))
    with pytest.raises(OpdError, match=r"cannot go on: hashes.teachers.teacher.cache changed since it began"):
        resume(tmp_path / "one")


def test_what_a_record_can_give_is_known_without_torch(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(json.dumps(vars(replace(INDEX, keep="hidden", temperature=None))))
    file = tmp_path / "r.yaml"
    file.write_text(dump(short(tmp_path, "token_kd", teachers={"teacher": {"cache": "."}})))
    assert loaded(command("check", str(file))) <= {"numpy"}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its report as text and as JSON, the next command, and the exit codes of what is wrong."""
    file, out = tmp_path / "r.yaml", tmp_path / "signals"
    file.write_text(dump(short(tmp_path, "token_kd")))
    app(["signals", str(file), "--out", str(out), "--json"], standalone_mode=False)
    report = json.loads(capsys.readouterr().out)
    assert report["rows"] == 14 and report["keep"] == "hidden" and report["bytes"] > 0
    app(["signals", str(file), "--out", str(out)], standalone_mode=False)
    said = capsys.readouterr()
    assert f"next: opd train {file} teachers.teacher.model=null teachers.teacher.cache={out}" in said.out
    assert "14 of 14 prompts" in said.err
    with pytest.raises(UsageError):
        app(["signals", str(file), "--out", str(out), "--role", "nobody"], standalone_mode=False)


def test_answers_of_data_are_all_recorded(tmp_path: Path) -> None:
    """Each prompt's every answer, for a later step may come to any of them."""
    rows = answers(tmp_path / "data.jsonl", 5, each=3)
    chosen = short(tmp_path, "token_kd", data={"train": str(rows)})
    assert offline.record(chosen, tmp_path, tmp_path / "signals", "teacher")["rows"] == 15
