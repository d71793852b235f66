"""Settings as text: what is read is what was meant, and what is wrong is named with its nearest right name."""

import pytest
import yaml
from typer.testing import CliRunner

from lorakit.cli import app
from lorakit.errors import LorakitError
from lorakit.finetune import config
from lorakit.finetune.settings import METHODS, Settings

GIVEN = ["model=m", "data=d.jsonl"]


def loaded(*words):
    return config.load(None, [*GIVEN, *words])


def test_a_new_file_holds_every_setting_and_reads_as_the_defaults(tmp_path):
    path = tmp_path / "new.yaml"
    path.write_text(config.template())
    assert set(yaml.safe_load(path.read_text())) == set(Settings.model_fields)
    assert config.load(path) == Settings(model="path/to/model", data="train.jsonl")


def test_every_setting_is_explained_in_the_new_file():
    lines = config.template().splitlines()
    for i, text in enumerate(lines):
        if text and not text.startswith("#"):
            assert lines[i - 1].startswith("# "), text


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["rank=3", "alpha=7.5", "targets=[q_proj, v_proj]", "ranks={'*.q_proj': 4}", "options.factor=8"],
        ["validation=null", "samples=[one, 'two: 2']", "name=ü{}", "report_to=tensorboard"],
        ["validation=7", "steps=5", "learning_rate=1e-5", "trainer.fsdp_config={a: [1, 2]}", "template={prompt}: "],
    ],
    ids=["defaults", "adapter", "text", "nested"],
)
def test_settings_written_are_the_settings_read(words, tmp_path):
    settings = loaded(*words)
    path = tmp_path / "config.yaml"
    path.write_text(config.dumped(settings), encoding="utf-8")
    assert config.load(path) == settings


@pytest.mark.parametrize("text, value", [("1e-5", 1e-5), ("1E-5", 1e-5), ("0.001", 1e-3), ("auto", "auto"), ("2", 2.0)])
def test_a_number_is_a_number_however_it_is_written(text, value, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"model: m\ndata: d\nlearning_rate: {text}\n")
    assert config.load(path).learning_rate == loaded(f"learning_rate={text}").learning_rate == value


@pytest.mark.parametrize(
    "words",
    [
        ["rank=8", "packing=true", "learning_rate=1e-4"],
        ["--rank", "8", "--packing", "--learning-rate", "1e-4"],
        ["--rank=8", "--learning_rate=1e-4", "--packing=true"],
        ["--packing", "--rank", "8", "learning_rate=1e-4"],
    ],
)
def test_words_and_flags_say_the_same(words):
    assert loaded(*words) == loaded("rank=8", "packing=true", "learning_rate=1e-4")


def test_text_stays_text():
    settings = loaded("name=2024", "revision=1e5", "split=on")
    assert (settings.name, settings.revision, settings.split) == ("2024", "1e5", "on")


@pytest.mark.parametrize(
    "word, says",
    [
        ("rnk=8", "rnk: there is no such setting; did you mean rank?"),
        ("metod=dora", "did you mean method?"),
        ("method=dorra", "did you mean dora?"),
        ("quantize=4bits", "did you mean 4bit?"),
        ("rank=0", "rank: "),
        ("rank=yes", "rank: must be a number, not yes or no"),
        ("rank=2.5", "rank: "),
        ("epochs=nan", "epochs: "),
        ("alpha=.inf", "alpha: "),
        ("learning_rate=-1", "learning_rate: must be above 0"),
        ("learning_rate=fast", "learning_rate: "),
        ("dropout=1", "dropout: "),
        ("validation=1.5", "validation: 1.5"),
        ("validation=-2", "validation: -2"),
        ("ranks={q: x}", "ranks: "),
        ("model=", "model: "),
        ("target_rank=4", "target_rank: is of the method adalora"),
        ("rank=[", "rank: "),
    ],
)
def test_what_is_wrong_is_named(word, says):
    with pytest.raises(LorakitError) as error:
        config.load(None, [*(given for given in GIVEN if not word.startswith(given[:5])), word])
    assert says in str(error.value)


def test_everything_that_is_wrong_is_one_error():
    with pytest.raises(LorakitError) as error:
        config.load(None, ["rnk=8", "epochs=-1", "method=x"])
    assert [name in str(error.value) for name in ("rnk", "epochs", "method", "model", "data")] == [True] * 5


@pytest.mark.parametrize(
    "text",
    ["", "- a\n", "just words", "a: [", "model: m\nmodel: n\n", "? [a]\n: b\n", "\x00", "a: !!python/object:os.x {}"],
    ids=["empty", "list", "text", "broken", "twice", "odd-key", "binary", "object"],
)
def test_a_file_that_is_no_configuration_is_an_error(text, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(LorakitError, match=r"c\.yaml"):
        config.load(path)


def test_a_file_that_is_absent_is_an_error_that_says_how_to_make_one(tmp_path):
    with pytest.raises(LorakitError, match="lorakit init"):
        config.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("words", [["rank"], ["--"], ["=3"], ["rank=1", "rank=2"], ["rank=1", "--rank", "2"]])
def test_words_that_are_no_settings_are_errors(words):
    with pytest.raises(LorakitError):
        loaded(*words)


def test_init_writes_a_file_and_replaces_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    assert runner.invoke(app, ["init", "sql.yaml", "rank=4", "--model", "m"]).exit_code == 0
    settings = config.load(tmp_path / "sql.yaml")
    assert (settings.rank, settings.model) == (4, "m")
    before = (tmp_path / "sql.yaml").read_bytes()
    assert isinstance(runner.invoke(app, ["init", "sql.yaml"]).exception, LorakitError)
    assert (tmp_path / "sql.yaml").read_bytes() == before
    assert runner.invoke(app, ["init", "sql.yaml", "--force"]).exit_code == 0
    assert isinstance(runner.invoke(app, ["init", "other.yaml", "rnk=4"]).exception, LorakitError)
    assert not (tmp_path / "other.yaml").exists()


def test_the_list_of_settings_names_all():
    shown = CliRunner().invoke(app, ["train", "--settings"]).output
    assert all(f"  {name}=" in shown for name in Settings.model_fields)
    assert all(method in shown for method in METHODS)
