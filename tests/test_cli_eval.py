"""`lorakit eval`: the numbers of the library for the base and each adapter, as a table and as JSON."""

import json

import pytest
from language_runs import Files, as_other_run, command, made, ran, refused, reopened
from small_lms import STORIES, needs_stories

from lorakit.cli.eval import evaluate
from lorakit.finetune.data import encode, read_rows
from lorakit.finetune.generation.generate import Request, generate
from lorakit.finetune.generation.scoring import score
from lorakit.finetune.generation.steps import Sampling

app = command(evaluate, "eval")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return made(tmp_path_factory.mktemp("files"))


def found(*arguments: object) -> dict:
    return json.loads(ran(app, "eval", *arguments, "--json", "--device", "cpu").stdout)


def test_the_base_and_each_adapter_have_their_perplexity(files):
    got = found(files.base, files.data, "--adapter", files.sql, "--adapter", f"x={files.js}")
    assert [each["adapter"] for each in got["results"]] == ["base", "sql", "x"] and got["rows"] == got["examples"] == 2
    base = reopened(files)
    examples = encode(read_rows(str(files.data)), base.tokenizer, max_length=128).examples
    for each, chosen in zip(got["results"], (None, "sql", "js"), strict=True):
        wanted = score(base, examples, chosen)
        assert (each["loss"], each["perplexity"]) == pytest.approx((wanted.loss, wanted.perplexity), rel=1e-5)
        assert each["tokens"] == wanted.tokens == len(" three") + len(" the king") + 2, "completions, and their ends"
        assert each["asked"] == 2 and each["matched"] == 0 and each["exact_match"] == 0.0
    alone = found(files.run, files.data, "--no-base", "--no-generate")
    assert [each["adapter"] for each in alone["results"]] == ["sql"] and "asked" not in alone["results"][0]
    assert alone["results"][0]["loss"] == pytest.approx(got["results"][1]["loss"], rel=1e-6)


def test_answers_that_match_are_counted_and_others_shown(files, tmp_path):
    base = reopened(files)
    tokens = tuple(base.tokenizer("How many?")["input_ids"])
    # What the adapter answers, up to where it ends: then it is right.
    answer = generate(base, [Request(tokens, "sql")], Sampling(5))[0].text
    path = tmp_path / "d.jsonl"
    rows = [{"prompt": "How many?", "completion": answer}, {"prompt": "Who?", "completion": " nobody"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    got = found(files.run, path, "--max-new-tokens", 5, "--show", 5)
    base_line, sql = got["results"]
    assert base_line["matched"] == 0 and sql["matched"] == 1 and sql["exact_match"] == 0.5
    assert [each["expected"] for each in sql["mismatches"]] == [" nobody"] and ":2" in sql["mismatches"][0]["where"]
    text = ran(app, "eval", files.run, path, "--max-new-tokens", 5, "--show", 1).stdout
    assert "exact match" in text and "1 of 2 (50.0%)" in text and "0 of 2 (0.0%)" in text
    assert "sql, d.jsonl:2\n  expected: nobody\n  got:" in text and "(cut off: it did not end)" in text
    assert "  expected:" not in ran(app, "eval", files.run, path, "--max-new-tokens", 5).stdout
    assert len(found(files.run, path, "--limit", 1, "--max-new-tokens", 5)["results"]) == 2
    assert found(files.run, path, "--limit", 1, "--max-new-tokens", 5)["results"][1]["exact_match"] == 1.0


def test_columns_and_masks_are_those_of_the_run_unless_others_are_given(files, tmp_path):
    path = tmp_path / "named.csv"
    path.write_text("ask,say\nWho?, the king\n")
    named = ("--columns", "prompt=ask", "--columns", "completion=say", "--no-generate")
    got = found(files.base, path, *named)
    assert got["results"][0]["tokens"] == len(" the king") + 1
    everything = found(files.base, path, *named, "--train-on", "all")["results"][0]["tokens"]
    assert everything == len("Who? the king")  # with the end, without the first
    config = files.run / "config.yaml"
    before = config.read_text()
    config.write_text(before + "columns: {prompt: ask, completion: say}\ntrain_on: all\nmax_length: 6\n")
    try:
        assert found(files.run, path, "--no-generate")["results"][0]["tokens"] <= 5
        assert found(files.run, path, "--no-generate", "--max-length", 64)["results"][0]["tokens"] == everything
    finally:
        config.write_text(before)


def test_each_adapter_is_asked_in_the_template_of_its_run(files, tmp_path):
    template = "Q: {prompt} A:"
    other = as_other_run(files, tmp_path / "js", "prompt", template)
    base = reopened(files)
    rows = read_rows(str(files.data))
    plain, filled = (encode(rows, base.tokenizer, max_length=128, template=each).examples for each in (None, template))

    def losses(*arguments: object) -> list[float]:
        return [each["loss"] for each in found(*arguments)["results"]]

    with_plain, with_template = [score(base, plain, c).loss for c in (None, "sql")], score(base, filled, "js").loss
    assert losses(files.run, files.data, "--adapter", f"x={other}") == pytest.approx([*with_plain, with_template])
    alone = [score(base, filled, None).loss, with_template]
    assert losses(files.base, files.data, "--adapter", f"x={other}") == pytest.approx(alone) != with_plain
    given = losses(files.run, files.data, "--adapter", f"x={other}", "--template", template)
    assert given == pytest.approx([score(base, filled, chosen).loss for chosen in (None, "sql", "js")])
    text = ran(app, "eval", files.run, files.data, "--adapter", f"x={other}").stdout
    assert "\nbase, sql: " in text and "\nx: " in text
    path = tmp_path / "d.jsonl"
    question = tuple(base.tokenizer("Q: Who? A:")["input_ids"])
    answer = generate(base, [Request(question, "js")], Sampling(5))[0].text
    path.write_text(json.dumps({"prompt": "Who?", "completion": answer}) + "\n")
    asked = found(files.run, path, "--adapter", f"x={other}", "--max-new-tokens", 5)["results"]
    assert [each["matched"] for each in asked] == [0, 0, 1]
    (tmp_path / "t.jsonl").write_text('{"text": "abc"}\n')
    assert found(other, tmp_path / "t.jsonl")["results"][0]["tokens"] == 3, "text has no template"


def test_what_is_not_given_is_as_in_the_run_of_the_first_adapter(files, tmp_path):
    other = as_other_run(files, tmp_path / "js")
    path = tmp_path / "named.csv"
    path.write_text("ask,say\nWho?, the king\n")
    with (other / "config.yaml").open("a") as config:
        config.write("columns: {prompt: ask, completion: say}\ntrain_on: all\n")
    got = found(files.base, path, "--adapter", other, "--no-generate")
    assert got["results"][0]["tokens"] == len("Who? the king")


def test_text_has_a_perplexity_and_no_answers(files, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "abc"}\n')
    got = found(files.base, path)["results"][0]
    assert got["tokens"] == 3 and "asked" not in got
    text = ran(app, "eval", files.base, path).stdout
    assert "perplexity" in text and "exact match" not in text


def test_a_prompt_without_room_is_said_and_not_asked(files, tmp_path):
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": "a" * 300, "completion": "b"}, {"prompt": "a", "completion": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = ran(app, "eval", files.base, path)
    assert "1 prompt left no room" in result.stderr and "0 of 1" in result.stdout


def test_a_loss_that_is_no_number_is_null_in_json_and_shown(tmp_path):
    files = made(tmp_path)
    from safetensors.torch import load_file, save_file

    path = files.base / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, path, {"format": "pt"})
    assert found(files.base, files.data, "--no-generate")["results"][0]["perplexity"] is None
    assert "nan" in ran(app, "eval", files.base, files.data, "--no-generate").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--limit", 0), "--limit 0 must be 1 or more"),
        (("--show", -1), "--show"),
        (("--batch-size", 0), "--batch-size"),
        (("--columns", "prompt"), "prompt=question"),
        (("--columns", "prompt=nope", "--columns", "completion=nope2"), "nope"),
        (("--max-length", 1000), "more than the model's context of 128"),
        (("--max-length", 0), "--max-length 0 must be 1 or more"),
        (("--max-length", -3), "--max-length"),
        (("--max-new-tokens", 0), "--max-new-tokens 0 must be 1 or more"),
        (("--max-new-tokens", -3), "--max-new-tokens"),
        (("--train-on", "prompts"), "train_on"),
        (("--template", "nothing"), "template"),
        (("--adapter", "nowhere"), "nowhere"),
    ],
)
def test_each_wrong_input_is_one_message(files, arguments, message):
    refused(message, app, "eval", files.base, files.data, *arguments)


@pytest.mark.parametrize("content", ["", "\n\n", "{bad", '{"prompt": 1}\n'])
def test_data_that_is_none_is_one_message(files, tmp_path, content):
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    refused(r"d\.jsonl", app, "eval", files.base, path)


@needs_stories
def test_the_real_model_finds_stories_likelier_than_noise(tmp_path):
    for name, text in (
        ("story", "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."),
        ("noise", "Outside little there. She loved named upon play the girl was in Once to a park time a Lily."),
    ):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    story, noise = (found(STORIES, tmp_path / f"{name}.jsonl")["results"][0] for name in ("story", "noise"))
    assert 5 * story["perplexity"] < noise["perplexity"] and story["perplexity"] < 5
