"""The story of SQL and JavaScript on one base: what it runs is safe, its data honest, and its laws hold."""

import hashlib
import json
import math
import os
import random
import sqlite3
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("yaml")
pytest.importorskip("transformers")

from examples.sql_and_javascript import (
    database,
    dialect,
    javascript,
    node,
    pretrain,
    questions,
    run,
    settings,
    training,
)
from examples.sql_and_javascript.pairs import Pair, apart
from lorakit.errors import LorakitError

SHARED = Path(os.environ.get("LORAKIT_SHARED", Path(__file__).parents[2] / "shared"))
REAL = SHARED / "data" / "text2sql"
COUNTS = (300, 60, 60)


@pytest.fixture
def company(tmp_path) -> Path:
    """A database on disk."""
    path = tmp_path / "company.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE staff (name TEXT, city TEXT, age INTEGER)")
        rows = [(f"worker {i}", ("oslo", "lima")[i % 2], 20 + i % 30) for i in range(3000)]
        connection.executemany("INSERT INTO staff VALUES (?, ?, ?)", rows)
    connection.close()
    return path


@pytest.fixture
def real() -> Path:
    if not (REAL / questions.DATABASE).exists():
        pytest.skip(f"no {REAL}")
    return REAL


HOSTILE = [
    "",
    ";",
    "\0",
    "select",
    "delete from staff",
    "drop table staff",
    "insert into staff values (1, 2, 3)",
    "update staff set age = 0",
    "pragma writable_schema = 1",
    "attach database '/tmp/never-there.sqlite' as other",
    "vacuum into '/tmp/never-there.sqlite'",
    "select load_extension('x')",
    "select readfile('/etc/passwd')",
    "select 1; select 2",
    "begin",
    "create temp table t (x)",
    "select name from nowhere",
    "select length(zeroblob(1000000000))",
    "select replace(hex(zeroblob(10000)), '0', 'xxxxxxxxxx')",
    "select " + "(" * 5000,
    "select '" + "x" * 200_000 + "'",
    "select * from staff as a, staff as b",
    "with recursive n(i) as (select 1 union all select i + 1 from n) select i from n",
    "with recursive n(i) as (select 1 union all select i + 1 from n) select count(i) from n",
    "select count(*) from staff as a, staff as b, staff as c, staff as d where a.age + b.age = c.age + d.age",
    'select "; drop table staff; --" from staff where',
    "\udcff",
]


@pytest.mark.parametrize("query", HOSTILE, ids=range(len(HOSTILE)))
def test_a_query_that_is_none_is_an_error_and_changes_nothing(company, query):
    before = company.read_bytes()
    connection = database.open_database(company)
    start = time.monotonic()
    answer = database.run(connection, query, seconds=0.3)
    assert answer.error and answer.rows == ()
    assert time.monotonic() - start < 5
    # And the next one runs.
    assert database.run(connection, "select count(*) from staff").rows == ((3000,),)
    assert not database.same(answer, answer)
    connection.close()
    assert company.read_bytes() == before and sorted(company.parent.iterdir()) == [company]


def test_answers_are_compared_as_multisets_and_in_order_where_an_order_is_asked(company):
    connection = database.open_database(company)
    asked = "select name from staff where age < 22"
    up, down = f"{asked} order by age, name", f"{asked} order by age desc, name"
    answers = {query: database.run(connection, f"{query} ;") for query in (asked, up, down)}
    assert database.same(answers[asked], answers[up]) and database.same(answers[asked], answers[down])
    assert not database.same(answers[up], answers[down])
    assert answers[up].ordered and not answers[asked].ordered
    inner = f"select count(name) from ( {up} )"
    assert not database.run(connection, inner).ordered
    twice = database.run(connection, "select city from staff where age = 20")
    once = database.run(connection, "select distinct city from staff where age = 20")
    assert set(twice.rows) == set(once.rows) and not database.same(twice, once)
    # A double-quoted word is a string, also where there is such a column; an apostrophe in one ends nothing.
    for value, count in (("city", 0), ("oslo", 1500), ("o'slo", 0)):
        assert database.run(connection, f'select count(name) from staff where city = "{value}"').rows == ((count,),)
    connection.close()


def test_no_database_is_one_message(tmp_path):
    (tmp_path / "text.sqlite").write_text("no database at all" * 100)
    for name in ("text.sqlite", "nothing.sqlite"):
        with pytest.raises(LorakitError, match="no SQLite database"):
            database.open_database(tmp_path / name)
    assert not (tmp_path / "nothing.sqlite").exists()


def test_the_real_questions_are_as_published(real):
    task = questions.published(real, lambda pair: True)
    by_origin = {
        (part, name): sum(pair.origin == name for pair in pairs)
        for part, pairs in task.parts().items()
        for name in questions.SETS
    }
    wanted = {"train": (549, 4347), "validation": (49, 486), "test": (279, 447)}
    assert by_origin == {(part, name): n[i] for part, n in wanted.items() for i, name in enumerate(questions.SETS)}
    everything = [pair for pairs in task.parts().values() for pair in pairs]
    for pair in everything:
        assert "alias" not in pair.completion and pair.completion.count('"') % 2 == 0
        assert not any(f"{kind}0" in pair.prompt for kind in ("state_name", "city_name", "airport_code", "river_name"))
        assert f'"{"state_name0"}"' not in pair.completion and '"city_name0"' not in pair.completion
    shown = next(pair for pair in everything if pair.prompt == "-- what is the biggest city in kansas\n")
    assert shown.completion.endswith('where city1.state_name = "kansas" ) and city0.state_name = "kansas" ;')


def test_plain_queries_differ_where_the_published_do(real):
    for name in questions.SETS:
        published = {entry["sql"][0] for entry in json.loads((real / f"{name}.json").read_text(encoding="utf-8"))}
        assert len({questions.plain(query) for query in published}) == len(published)


def test_gold_queries_are_right_and_others_are_not(real):
    task = questions.published(real, lambda pair: True)
    mine = [pair.completion for pair in task.test if pair.origin == "geography"]
    right = sum(task.run(query, query) for query in mine)
    assert right >= len(mine) - 2  # the two that SQLite refuses
    assert task.run('select state0.area from state as state0 where state0.state_name = "texas" ;',
                    'select area from state where "texas" = state_name')  # fmt: skip
    assert not task.run('select state0.area from state as state0 where state0.state_name = "texas" ;',
                        'select state0.area from state as state0 where state0.state_name = "iowa" ;')  # fmt: skip


@pytest.mark.parametrize("make", [dialect.staff, javascript.generated])
def test_generated_pairs_are_apart_and_their_code_runs(make):
    task = make(COUNTS, 0, lambda pair: True)
    again = make(COUNTS, 0, lambda pair: True)
    assert task.parts() == again.parts()
    assert make(COUNTS, 1, lambda pair: True).train != task.train
    assert tuple(len(pairs) for pairs in task.parts().values()) == COUNTS
    prompts = [pair.prompt for pairs in task.parts().values() for pair in pairs]
    assert len(set(prompts)) == len(prompts)
    if task.run is None:
        pytest.skip("no node here")
    if task.learn is not None:
        task.learn([pair.completion for pair in task.test])
    assert all(task.run(pair.completion, pair.completion) for pair in task.test)
    others = [task.test[i - 1].completion for i in range(len(task.test))]
    if task.learn is not None:
        task.learn(others)
    wrong = sum(task.run(pair.completion, other) for pair, other in zip(task.test, others, strict=True))
    assert wrong < len(others) / 5


def test_no_combination_is_in_two_parts():
    seen = []

    def one(draw: random.Random) -> tuple[tuple[str, ...], Pair]:
        combination, pair = javascript._one(draw)
        seen.append((combination, pair))
        return combination, pair

    parts = apart(one, COUNTS, 0, lambda pair: True)
    combination_of = {pair: combination for combination, pair in seen}
    kinds = [{combination_of[pair] for pair in part} for part in parts]
    assert not kinds[0] & kinds[1] and not kinds[0] & kinds[2] and not kinds[1] & kinds[2]


def test_too_few_short_pairs_are_one_message():
    with pytest.raises(LorakitError, match="--length"):
        apart(javascript._one, COUNTS, 0, lambda pair: len(pair.completion) < 10)


def test_javascript_that_misbehaves_gives_nothing_and_takes_nothing_with_it(tmp_path):
    if node.node() is None:
        pytest.skip("no node here")
    hostile = [
        "while (true) {}",
        "(() => { while (true) {} })()",
        "Promise.resolve().then(() => { while (true) {} })",
        "process.exit()",
        "require('fs')",
        "1); process.exit((1",
        "this.constructor.constructor('return process')().exit()",
        "(() => { const a = []; while (true) a.push(new Array(1e6).fill(1.5)) })()",
        "'x'.repeat(1e9)",
        "({ toJSON() { while (true); } })",
        "prices.map(",
        "",
        "\n",
        "x" * 10_000,
    ]
    world = json.dumps({"prices": [3, 1, 2]})
    found = node.results([*hostile, "prices.sort();", "prices.at(0)"], [world])
    assert found == [[None]] * len(hostile) + [["[[1,2,3]]"], ["[3]"]]
    check = node.Check(javascript.world, 0)
    assert check("prices.slice(1);", "prices.filter((x, i) => i > 0)") and not check("prices.slice(1);", "prices")
    assert not check("prices.map(;", "prices.map(;")


def test_a_network_that_starts_with_copying_heads_copies():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from examples.sql_and_javascript.start import start_copying

    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=500,
                hidden_size=160,
                intermediate_size=320,
                num_hidden_layers=2,
                num_attention_heads=5,
                tie_word_embeddings=True,
                rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            )
        ).eval()
    order = torch.stack([torch.randperm(500, generator=draw)[:60] for _ in range(8)])
    rows = torch.cat([order, order], 1)

    @torch.no_grad()
    def losses():
        found = -model(rows, use_cache=False).logits[:, :-1].log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0]
        return found[:, :58].mean().item(), found[:, 61:].mean().item()

    first, second = losses()
    assert abs(first - second) < 0.1  # as it came, it knows nothing of what it has seen
    start_copying(model, draw)
    first, second = losses()
    assert second < first - 1.5


TINY = replace(settings.QUICK.base, steps=6, characters=60_000)


def test_a_base_is_made_once_and_again_the_same(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    found = []
    for folder in ("a", "b"):
        monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / folder))
        made = pretrain.pretrained(TINY, lambda line: None)
        assert not made.reused and math.isfinite(made.loss) and made.path.is_relative_to(tmp_path / folder)
        found.append(load_file(made.path / "model.safetensors"))
    assert all(bool((found[0][name] == found[1][name]).all()) for name in found[0])
    again = pretrain.pretrained(TINY, lambda line: pytest.fail("made anew"))
    assert again == replace(made, reused=True)
    other = pretrain.pretrained(replace(TINY, steps=7), lambda line: None)
    assert other.path != made.path and made.path.exists()
    assert {path.name for path in made.path.parent.iterdir()} == {made.path.name, other.path.name}  # nothing half-made
    (made.path / pretrain.RECORD).unlink()  # as if it had been cut off
    assert not pretrain.pretrained(TINY, lambda line: None).reused


def test_the_rate_is_that_of_lorakit_train():
    import torch
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.03 * 90), 90)
    for step in range(90):
        assert training._share(step, 90) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The quick story, without the real sets."""
    out = tmp_path_factory.mktemp("story")
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAKIT_CACHE", str(out / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(run, "SHARED", out / "nothing")
        results = run.tell(settings.QUICK, out / "run", say=said.append)
    return out / "run", results, "\n".join(said)


def test_what_must_hold_does(story):
    _, results, said = story
    assert results["holds"] is True
    laws = results["laws"]
    for name in ("base_untouched", "disabled_is_base", "switched_is_alone", "mixed_is_alone"):
        assert laws[name] is True
    assert laws["texts_equal"] == laws["texts"] >= 6 and laws["switch_seconds"] < 1e-3
    assert "FAILS" not in said


def test_each_adapter_is_better_on_its_own_task_and_far_smaller(story):
    out, results, _ = story
    arms = {arm["name"]: arm for arm in results["arms"]}
    assert list(arms) == ["base", "sql adapter", "js adapter", "full on sql", "full on js"]
    for task, own in (("sql", "staff"), ("js", "javascript")):
        base, adapter = arms["base"]["scores"][own], arms[f"{task} adapter"]["scores"][own]
        full = arms[f"full on {task}"]["scores"][own]
        assert adapter["perplexity"] < base["perplexity"] / 2 and full["perplexity"] < base["perplexity"] / 2
        assert arms[f"{task} adapter"]["bytes"] < arms["base"]["bytes"] / 4
        assert arms[f"{task} adapter"]["trained"] < results["parameters"] / 4
        assert arms[f"full on {task}"]["trained"] == results["parameters"]
        files = out / {"sql": "sql", "js": "javascript"}[task] / "adapter"
        assert sum(path.stat().st_size for path in files.iterdir()) == arms[f"{task} adapter"]["bytes"]
    assert {score["pairs"] for arm in arms.values() for score in arm["scores"].values()} == {settings.QUICK.test}


def test_a_reader_can_run_the_same_configurations(story):
    from lorakit.finetune.config import load

    out, results, said = story
    for name, task in (("sql", "sql"), ("javascript", "js")):
        assert f"$ lorakit train {out / f'{name}.yaml'}" in said
        asked = load(out / f"{name}.yaml", [])
        assert asked.steps == settings.QUICK.steps and asked.name == task
        rows = (out / "data" / name / "train.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(rows) == 400 and set(json.loads(rows[0])) == {"prompt", "completion"}
    assert results["settings"]["steps"] == settings.QUICK.steps


def test_the_report_is_readable(story):
    out, results, said = story
    text = (out / "report.md").read_text(encoding="utf-8")
    assert text in said
    blocks = text.split("```")[1::2]
    assert len(blocks) == 3 and all(len(line) <= 100 for block in blocks for line in block.splitlines())
    for word in ("sql adapter", "js adapter", "full on sql", "full on js", "exact", "ppl"):
        assert word in blocks[0] or word in blocks[1]
    assert hashlib.sha256((out / "results.json").read_bytes()).digest() and results["seconds"]


def test_a_model_that_is_none_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stopped:
        run.main(["--model", str(tmp_path / "empty"), "--out", str(tmp_path / "out"), "--quick"])
    assert "config.json" in str(stopped.value) and "\n" not in str(stopped.value)
