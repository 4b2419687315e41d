"""Rows read while training goes on: each once in a pass, in an order that a seed gives, again from any position."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from halfbyte import finetune
from halfbyte.data import pack, streaming
from halfbyte.data.reading import files, records
from halfbyte.data.reading.files import find as files_of
from halfbyte.data.reading.read import look
from halfbyte.data.streaming import Flow
from halfbyte.errors import DataError, RecipeError, RunError
from halfbyte.recipe.data import Data
from halfbyte.recipe.file import load_recipe
from halfbyte.runs.folder import RunFolder, read_json
from halfbyte.system import device
from halfbyte.training import fit
from halfbyte.training.schedule import StreamedRows
from tests import tiny_run
from tests.hub_server import HubServer


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 400)
    monkeypatch.setattr(streaming, "WINDOW_BLOCKS", 3)


def write(path: Path, count: int, first: int = 0) -> Path:
    lines = (
        json.dumps({"prompt": f"row {n}", "completion": "red " * (n % 7 + 1)}) for n in range(first, first + count)
    )
    path.write_text("\n".join(lines) + "\n")
    return path


def flow_of(*names: Path | str, seed: int = 1, **more: Any) -> Flow:
    data = Data(train=tuple(map(str, names)), streaming=True, overlong="skip", **more)
    return Flow(data.train, tiny_run.tokenizer(), data, seed)


def asked(flow: Flow, first: int, stop: int) -> list[str]:
    return [tiny_run.tokenizer().decode(e.prompt_ids).split("user\n")[1].split("<")[0] for e in flow.rows(first, stop)]


@pytest.mark.parametrize("size", [1, 7, 50, 400, 5000])
@pytest.mark.parametrize("ends", ["\n", ""])
def test_blocks_of_lines_have_each_line_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, ends: str
) -> None:
    monkeypatch.setattr(streaming, "BLOCK_BYTES", size)
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 0}\n\n{"n": "é"}\n  {"n": 2}\r\n{"n": 3}' + ends)
    (source,) = files.find(str(path))
    blocks = streaming.cut(source)
    found = [(number, json.loads(raw)["n"]) for block in blocks for number, raw in records.records(block)]  # type: ignore[arg-type]
    assert [n for _, n in found] == [0, "é", 2, 3]
    raw = path.read_bytes()
    assert all(json.loads(raw[at:].split(b"\n")[0])["n"] == n for at, n in found), "the number is the first byte"


def test_blocks_of_parquet_are_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"prompt": [f"row {n}" for n in range(100)], "completion": ["red"] * 100})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 200)
    (source,) = files.find(str(tmp_path / "a.parquet"))
    blocks = streaming.cut(source)
    assert len(blocks) > 3 and blocks[0].part is not None and blocks[-1].part is not None
    found = [(number, record["prompt"]) for block in blocks for number, record in records.records(block)]  # type: ignore[index, call-overload]
    assert found == [(n + 1, f"row {n}") for n in range(100)]


def test_each_pass_has_every_row_once_in_another_order(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 120), write(tmp_path / "b.jsonl", 40, first=120)
    flow = flow_of(tmp_path / "*.jsonl")
    first, second = asked(flow, 0, 160), asked(flow, 160, 320)
    assert sorted(first) == sorted(second) == sorted(f"row {n}" for n in range(160))
    assert first != second and first != [f"row {n}" for n in range(160)]
    assert asked(flow_of(tmp_path / "*.jsonl", seed=2), 0, 160) != first
    assert flow.passes(0) == 0 and flow.passes(160) == 1 and flow.passes(320) == 2
    assert [flow.passes(n) for n in range(0, 320, 8)] == pytest.approx([n / 160 for n in range(0, 320, 8)], abs=0.03)
    ends = [0, *(w[3] for w in flow.index)]
    assert len(flow._windows) <= 2 and max(b - a for a, b in itertools.pairwise(ends)) < 60


def test_texts_in_blocks_have_each_token_once_in_a_pass(tmp_path: Path) -> None:
    texts = [f"row {n} red blue" for n in range(80)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flow = flow_of(tmp_path / "a.jsonl", packing="stream", max_length=16)
    while not flow.index or flow.index[-1][0] == 0:
        flow.rows(end := flow.index[-1][3] if flow.index else 0, end + 1)
    blocks = flow.rows(0, max(window[3] for window in flow.index if window[0] == 0))
    assert max(len(block.input_ids) for block in blocks) == 16
    ids = sorted(token for block in blocks for token in block.input_ids)
    tokenizer = tiny_run.tokenizer()
    assert ids == sorted(t for text in texts for t in (*tokenizer(text).input_ids, tokenizer.eos_token_id))


def test_from_any_position_with_or_without_what_was_kept(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", 200)
    whole = flow_of(tmp_path / "a.jsonl")
    whole.keep(tmp_path / "stream.json", {})
    rows = asked(whole, 0, 300)
    again = flow_of(tmp_path / "a.jsonl")
    assert asked(again, 250, 300) == rows[250:]
    later = flow_of(tmp_path / "a.jsonl")
    later.keep(None, read_json(tmp_path / "stream.json"))
    read: list[int] = []
    encode = later._encode
    later._encode = lambda *place: read.append(1) or encode(*place)  # type: ignore[method-assign, func-returns-value]
    assert asked(later, 250, 300) == rows[250:] and len(read) <= 3
    write(tmp_path / "a.jsonl", 201)
    other = flow_of(tmp_path / "a.jsonl")
    other.keep(None, read_json(tmp_path / "stream.json"))
    assert not other.index, "what was kept is of other rows"


def test_rows_that_cannot_be_used_are_named_at_first_and_counted_later(tmp_path: Path) -> None:
    good = write(tmp_path / "a.jsonl", 200).read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join([*good[:150], "{oops", '{"prompt": "x"}', *good[150:]]) + "\n")
    flow = flow_of(tmp_path / "a.jsonl")
    assert len(asked(flow, 0, 200)) == 200 and flow.left_out.count == 2
    assert "a.jsonl at byte" in flow.left_out.first() and "not JSON" in flow.left_out.listing("")
    (tmp_path / "b.jsonl").write_text(good[0] + '\n{"prompt": "x"}\n')
    flow.keep(tmp_path / "stream.json", {})
    later = flow_of(tmp_path / "a.jsonl")
    later.keep(None, read_json(tmp_path / "stream.json"))
    assert asked(later, 0, 200) and later.left_out == flow.left_out, "also in a process that goes on"
    with pytest.raises(DataError, match=r"rows cannot be used\n  - .*b.jsonl at byte [0-9]+: completion: missing"):
        flow_of(tmp_path / "b.jsonl").first()


def test_the_first_rows_of_a_later_file_are_left_out_and_refuse_no_run(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{n}.jsonl", 4, 4 * n) for n in range(5)]  # a block each, three of them in a window
    later = flow_of(*paths)._blocks(0, 0, 1)[0].path
    later.write_text("{\n" + later.read_text())
    data = Data(train=tuple(map(str, paths)), streaming=True)
    look(data.train, data)
    flow = flow_of(*paths)
    flow.first()
    assert len(asked(flow, 0, 20)) == 20 and flow.left_out.count == 1
    with pytest.raises(DataError, match=f"{later.name}:1: not JSON"):
        look(data.train, data.model_copy(update={"streaming": False}))


def test_a_window_that_has_another_number_of_rows_than_before_is_refused(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{n}.jsonl", 4, 4 * n) for n in range(5)]
    before = flow_of(*paths)
    before.keep(tmp_path / "stream.json", {})
    asked(before, 0, 20)
    later = before._blocks(0, 0, 1)[0].path
    later.write_text(later.read_text().replace("}\n{", "} {", 1))  # of the same size
    flow = flow_of(*paths)
    flow.keep(None, read_json(tmp_path / "stream.json"))
    with pytest.raises(DataError, match=rf"has changed since .* of .*{later.name}.* 8 could be used, now 6\."):
        asked(flow, 12, 20)


def test_a_file_that_is_only_read_from_its_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\n" + "".join(f"row {n},red\n" for n in range(30)))
    assert sorted(asked(flow_of(tmp_path / "a.csv"), 0, 30)) == sorted(f"row {n}" for n in range(30))
    monkeypatch.setattr(streaming, "WHOLE_BYTES", 100)
    with pytest.raises(DataError, match=r"csv of 0.0 GB only from its beginning"):
        flow_of(tmp_path / "a.csv").rows(0, 1)


REFUSED: list[Any] = [
    ({"train__max_steps": -1}, "needs train.max_steps"),
    ({"data__overlong": "error"}, "data.overlong is error"),
    ({"data__eval": "5%"}, "knows no number of rows to hold 5% out of"),
    ({"data__train": [{"path": "a", "weight": 1}, "b"]}, "cannot mix named sources"),
    ({"train__method": "dpo"}, "is for task causal_lm and train.method sft"),
    ({"train__save_strategy": "epoch"}, "knows no epoch ahead"),
    ({"data__eval": "a.jsonl"}, "train.eval_steps: 100"),
    ({"train__within": "1h"}, "does not go with train.within"),
]


@pytest.mark.parametrize(("values", "what"), REFUSED)
def test_what_does_not_go_together_is_said_in_a_line(tmp_path: Path, values: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        tiny_run.recipe(tmp_path, **{"data__streaming": True, "data__overlong": "skip", **values})


def recipe_of(folder: Path, name: str, **more: Any) -> Any:
    values = {
        "data__streaming": True,
        "data__overlong": "skip",
        "train__save_strategy": "steps",
        "train__save_steps": 2,
    }
    values["train__lr_scheduler_type"] = "constant"
    return tiny_run.recipe(folder, **values, **more, output=folder / name)


def weights(folder: Path) -> bytes:
    return (RunFolder(folder).adapter / "adapter_model.safetensors").read_bytes()


def test_a_run_that_goes_on_is_the_run_in_one_go(tmp_path: Path) -> None:
    tiny_run.rows(tmp_path / "train.jsonl", 60)
    finetune.train(recipe_of(tmp_path, "whole", train__max_steps=24))
    finetune.train(recipe_of(tmp_path, "part", train__max_steps=8))
    rows = RunFolder(tmp_path / "whole").read_metrics()
    assert rows[-1]["epoch"] > 1 and len(read_json(tmp_path / "whole" / "stream.json")["windows"]) > 4
    part = RunFolder(tmp_path / "part")
    assert finetune.train(load_recipe(part.recipe, ["train.max_steps=24"]), resume=True).step == 24
    assert weights(tmp_path / "part") == weights(tmp_path / "whole")
    tiny_run.rows(tmp_path / "train.jsonl", 61)
    with pytest.raises(RunError, match=r"data.train .* has changed"):
        finetune.train(load_recipe(part.recipe, ["train.max_steps=30"]), resume=True)


def test_an_evaluation_is_as_far_as_its_step(tmp_path: Path) -> None:
    tiny_run.rows(tmp_path / "train.jsonl", 60), tiny_run.rows(tmp_path / "held.jsonl", 4)
    held_out = {"data__eval": str(tmp_path / "held.jsonl"), "train__eval_steps": 8}
    finetune.train(recipe_of(tmp_path, "run", train__max_steps=24, **held_out))
    rows = RunFolder(tmp_path / "run").read_metrics()
    steps = {row["step"]: row["epoch"] for row in rows if "loss" in row}
    assert {row["step"]: row["epoch"] for row in rows if "eval_loss" in row} == {n: steps[n] for n in (8, 16, 24)}
    assert 0 < steps[8] < steps[16] < steps[24]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", server.url, raising=False)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
                            server.url + "/{repo_id}/resolve/{revision}/{filename}")  # fmt: skip
        yield server


def parquet(prompts: Sequence[str], asks: str = "prompt", answers: str = "completion") -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({asks: list(prompts), answers: ["red"] * len(prompts)}), sink, row_group_size=5)
    return sink.getvalue()


def numbered(first: int, count: int = 20) -> list[str]:
    return [f"row {n}" for n in range(first, first + count)]


def test_shards_of_a_hub_come_one_at_a_time(hub: HubServer) -> None:
    names = [f"data/train-0000{n}-of-00003.parquet" for n in range(3)]
    shards = {name: parquet(numbered(20 * n)) for n, name in enumerate(names)}
    hub.add("org/rows", {**shards, "data/test-00000-of-00001.parquet": b"no"})
    flow = flow_of("hub:org/rows?split=train")
    most = 0
    rows = []
    for position in range(60):
        rows += asked(flow, position, position + 1)
        most = max(most, len(list(Path(flow._folder.name).rglob("*.parquet"))))
    assert sorted(rows) == sorted(f"row {n}" for n in range(60)) and most == 1
    assert len({r.split("/")[-1] for r in (s.path for s in hub.seen) if r.endswith(".parquet")}) == 3
    with pytest.raises(DataError, match="no Parquet or JSON lines of the split dev"):
        flow_of("hub:org/rows?split=dev")


def test_two_data_sets_may_call_their_shards_alike(hub: HubServer) -> None:
    """And have other columns: the second one's are told from its own rows."""
    hub.add("org/a", {"data/train.parquet": parquet(numbered(0))})
    hub.add("org/b", {"data/train.parquet": parquet(numbered(20), "instruction", "output")})
    rows = asked(flow_of("hub:org/a?split=train", "hub:org/b?split=train"), 0, 40)
    assert sorted(rows) == sorted(numbered(0, 40))


def shards_of(
    hub: HubServer, *files: str, name: str = "", split: str = "train", revision: str = "", **more: Any
) -> Any:
    """The files that are taken of a data set with these."""
    hub.add("org/rows", dict.fromkeys(files, b"x"), **more)
    query = "&".join(f"{k}={v}" for k, v in {"name": name, "split": split, "revision": revision}.items() if v)
    (source,) = files_of(f"hub:org/rows?{query}")
    return [str(shard.path) for shard in streaming._shards(source)]


def test_of_several_configs_one_has_to_be_named(hub: HubServer) -> None:
    files = "main/train-0.parquet", "socratic/train-0.parquet", "main/test-0.parquet"
    paths = {"main": "main/train-*", "socratic": ["socratic/t*"]}
    every = ({"config_name": n, "data_files": [{"split": "train", "path": path}]} for n, path in paths.items())
    card: dict[str, Any] = {"configs": [*every]}
    several = r"data set org/rows has several configs: main, socratic\.\n  fix: hub:org/rows\?name=main&split=train"
    with pytest.raises(DataError, match=several):
        shards_of(hub, *files, card=card)
    assert shards_of(hub, *files, card=card, name="socratic") == ["socratic/train-0.parquet"]
    with pytest.raises(DataError, match="has no config other, but main, socratic"):
        shards_of(hub, *files, card=card, name="other")
    converted = {"revisions": {streaming.CONVERTED.replace("/", "%2F"): "c" * 40, streaming.CONVERTED: "c" * 40}}
    with pytest.raises(DataError, match="has several configs: main, socratic"):
        shards_of(hub, *files, revision=streaming.CONVERTED, **converted)
    assert shards_of(hub, *files, revision=streaming.CONVERTED, name="main", **converted) == ["main/train-0.parquet"]
    default = {"configs": [*card["configs"], {"config_name": "default", "data_files": "**/*"}]}
    assert shards_of(hub, *files, card=default) == ["main/train-0.parquet", "socratic/train-0.parquet"]


# Files of a data set without a card, the split, and which of them it has: as `datasets` tells it.
SPLITS: list[Any] = [
    (("train.jsonl", "test.jsonl", "constrain.jsonl", "training.jsonl"), "train", (0, 3)),
    (("train0.jsonl", "train1.jsonl", "trainer.jsonl"), "train", (0, 1)),
    (("train/0.parquet", "test/0.parquet", "test/train_like.jsonl"), "train", (0,)),
    (("my_train_file.jsonl", "a-b.test.jsonl"), "train", (0,)),
    (("data/train-00000-of-00001.parquet", "extra/train.jsonl"), "train", (0,)),
    (("dev.jsonl", "valid.jsonl", "evaluation.jsonl"), "validation", (0, 1)),
    (("eval.jsonl", "contest.jsonl"), "test", (0,)),
    (("en[small].jsonl", "ens.jsonl"), "en[small]", (0,)),
    (("part.x.jsonl", "partyx.jsonl"), "part.x", (0,)),
]


@pytest.mark.parametrize(("files", "split", "wanted"), SPLITS)
def test_which_files_a_split_has(hub: HubServer, files: tuple[str, ...], split: str, wanted: tuple[int, ...]) -> None:
    assert shards_of(hub, *files, split=split.replace("[", "%5B")) == sorted(files[n] for n in wanted)


def test_a_run_goes_on_at_its_commit_and_not_with_other_rows(hub: HubServer, tmp_path: Path) -> None:
    repo = hub.add("org/rows", {"data/train-0.parquet": parquet(numbered(0, 40))})
    values = {"data__train": "hub:org/rows?split=train", "train__max_steps": 2}
    finetune.train(recipe_of(tmp_path, "run", **values))
    run, first = RunFolder(tmp_path / "run"), repo.revisions["main"]
    assert f"hub:org/rows?split=train&revision={first}" in run.recipe.read_text()
    repo.revisions["main"] = "b" * 40  # a commit to its README
    repo.revisions["old"] = first
    same = recipe_of(tmp_path, "run", **{**values, "train__max_steps": 3})
    assert finetune.train(same, resume=True).step == 3
    repo.files["data/train-0.parquet"] = parquet(numbered(1, 40))
    with pytest.raises(RunError, match=r"data.train .* has changed"):
        finetune.train(recipe_of(tmp_path, "run", **{**values, "train__max_steps": 4}), resume=True)


def test_a_file_that_cannot_be_read_ends_a_run_with_a_checkpoint(hub: HubServer, tmp_path: Path) -> None:
    """The second shard has columns of no format. What was learned from the first one is kept."""
    for seed in (3, 4):  # in one of these orders the good shard comes first
        good, bad = parquet(numbered(0)), parquet(numbered(0), "one", "other")
        hub.add("org/rows", {"data/train-0.parquet": good, "data/train-1.parquet": bad})
        if int(streaming.shuffled(2, f"{seed}/units/0")[0]) == 0:
            break
    values = {"data__train": "hub:org/rows?split=train", "train__max_steps": 20, "train__seed": seed}
    with pytest.raises(DataError, match=r"^org/rows/data/train-1.parquet row 1: cannot tell the format") as raised:
        finetune.train(recipe_of(tmp_path, "run", **values))
    assert "fix:" in str(raised.value) and "/tmp" not in str(raised.value)
    run = RunFolder(tmp_path / "run")
    assert (run.checkpoints / "step-000005").is_dir() and len(run.read_metrics()) == 5, "every whole step"


def test_rows_of_later_windows_are_planned_for(tmp_path: Path) -> None:
    """The first window has short rows alone; one of a later one may be as long as `data.max_length`, or the model is
    refused that reads less."""
    tiny_run.rows(tmp_path / "train.jsonl", 200)
    planned = fit.plan_run(recipe_of(tmp_path, "run", train__max_steps=2).recipe, device.detect())
    assert planned.prepared.train.stats.max_length < 60 and planned.job.rows.longest == 128
    assert planned.plan.max_tokens_per_micro_batch >= 128
    with pytest.raises(DataError, match=r"rows that are read later may be over the 256 that the model reads"):
        fit.plan_run(recipe_of(tmp_path, "run", train__max_steps=2, data__max_length=300).recipe, device.detect())


def test_a_step_is_arranged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_run.rows(tmp_path / "train.jsonl", 60)
    calls, begun = [], []
    arrange, begin = pack.arrange, StreamedRows.begin
    monkeypatch.setattr(pack, "arrange", lambda rows, *a, **k: (calls.append(1), arrange(rows, *a, **k))[1])
    monkeypatch.setattr(StreamedRows, "begin", lambda self, *a: (begun.append(len(calls)), begin(self, *a))[1])
    finetune.train(recipe_of(tmp_path, "run", train__max_steps=6))
    assert [b - a for a, b in itertools.pairwise(begun)] == [1] * 5
