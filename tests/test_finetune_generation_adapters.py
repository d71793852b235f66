"""What a path means, and adapters onto a base that is, or is not, that of their training."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from language_runs import Files, as_run, made, ran, reopened
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorakit as lk
from lorakit.cli import app
from lorakit.errors import LorakitError
from lorakit.finetune.base import open_base
from lorakit.finetune.generation.adapters import load_adapter, load_adapters, named_path
from lorakit.finetune.generation.prompts import prompter_of
from lorakit.finetune.resolve import adapter_at, kind_of, near, resolve


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return made(tmp_path_factory.mktemp("files"))


def test_a_path_is_a_base_a_run_a_checkpoint_or_an_adapter(files, tmp_path):
    assert resolve(files.base) == (str(files.base), {}, {})
    assert resolve("some/hub-id") == ("some/hub-id", {}, {})
    model, adapters, settings = resolve(files.run)
    assert (model, adapters) == (str(files.base), {"sql": files.run / "adapter"})
    assert settings["dtype"] == "auto" and kind_of(resolve(files.run)) == "prompt"
    assert resolve(files.run / "adapter") == (model, adapters, settings)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000010"
    shutil.copytree(files.run, tmp_path / "run")
    shutil.copytree(files.run / "adapter", checkpoint / "adapter")
    assert resolve(checkpoint) == (model, {"sql": checkpoint / "adapter"}, settings)
    assert resolve(files.sql).model == str(files.base) and list(resolve(files.sql).adapters) == ["sql"]
    assert adapter_at(files.run) == files.run / "adapter" and adapter_at(files.sql) == files.sql
    assert adapter_at(checkpoint) == checkpoint / "adapter" and adapter_at("nowhere") == Path("nowhere")


def test_a_run_that_has_not_ended_says_what_there_is(files, tmp_path):
    as_run(tmp_path, files.base, files.data, "prompt")
    with pytest.raises(LorakitError, match="has no adapter yet: go on with resume=auto"):
        resolve(tmp_path)
    shutil.copytree(files.sql, tmp_path / "checkpoints" / "step-00000010" / "adapter")
    with pytest.raises(LorakitError, match=r"last checkpoint: .*step-00000010"):
        resolve(tmp_path)


def test_a_run_is_used_from_another_directory(tmp_path, monkeypatch):
    files = made(tmp_path / "project")
    as_run(files.run, "base", Path("d.jsonl"), None)
    monkeypatch.chdir(tmp_path / "project")
    assert resolve("run").model == "base" and kind_of(resolve("run")) == "prompt"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = resolve("../project/run")
    assert Path(found.model).resolve() == files.base and kind_of(found) == "prompt"
    assert near("no/such", files.run) == "no/such" and near(str(files.base), files.run) == str(files.base)


@pytest.mark.parametrize(
    ("config", "message"), [("[1]", "settings"), ("a: [", "YAML"), ("model:\n", "names no model"), ("\xff\x00", "YAML")]
)
def test_a_damaged_run_is_one_message(files, tmp_path, config, message):
    shutil.copytree(files.run, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_bytes(config.encode("latin-1"))
    with pytest.raises(LorakitError, match=message):
        resolve(tmp_path / "run")


def test_an_adapter_without_its_base_says_how_to_give_it(files, tmp_path):
    shutil.copytree(files.sql, tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    with pytest.raises(LorakitError, match="give the base, and this as --adapter"):
        resolve(tmp_path / "a")


def test_names_are_given_or_those_of_the_files(files, tmp_path):
    base = open_base(files.base, device="cpu")
    given = [named_path(f"mine={files.sql}"), named_path(str(files.js)), named_path(f"run={files.run}")]
    assert [loaded.name for loaded in load_adapters(base.model, given, "sample")] == ["mine", "js", "run"]
    with pytest.raises(LorakitError, match="loaded already"):
        load_adapter(base.model, files.sql, "mine")
    with pytest.raises(LorakitError, match="already") as found:
        load_adapter(base.model, files.js)
    assert "--verify" not in str(found.value), "which would not help"
    assert list(lk.adapters(base.model)) == ["mine", "js", "run"]
    odd = tmp_path / "a=b"
    shutil.copytree(files.sql, odd)
    assert named_path(str(odd)) == (None, str(odd)) and named_path("x=y=z") == ("x", "y=z")
    for wrong in ("=x", "x=", " = "):
        with pytest.raises(LorakitError, match="NAME=PATH"):
            named_path(wrong)


def changed(files: Files, folder: Path) -> Path:
    """Another base: a step of training further."""
    shutil.copytree(files.base, folder)
    path = folder / "model.safetensors"
    save_file({name: value + 1e-3 for name, value in load_file(path).items()}, path, {"format": "pt"})
    return folder


def test_a_base_that_has_changed_is_one_message_with_what_to_do(files, tmp_path):
    base = open_base(changed(files, tmp_path / "b"), device="cpu")
    with pytest.raises(LorakitError) as found:
        load_adapter(base.model, files.sql)
    said = str(found.value)
    assert "other values than the base" in said and "--verify off" in said and len(said.splitlines()) < 20
    assert not lk.adapters(base.model)
    assert load_adapter(base.model, files.sql, verify="off") == ("sql", None)
    torch.manual_seed(0)
    wide = open_base(files.base, device="cpu").model
    lk.attach(wide, lk.LoRA(rank=2), targets="q_proj", name="wide")
    other = made(tmp_path / "other", hidden_size=64)
    with pytest.raises(LorakitError) as found:
        load_adapter(open_base(other.base, device="cpu").model, files.sql)
    assert "--verify off" not in str(found.value), "which would not help"


def in_16_bits(files: Files, folder: Path) -> Path:
    """The base as most are stored: values that 16 bits hold."""
    model = AutoModelForCausalLM.from_pretrained(files.base, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(files.base).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("trained", "used"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_base_of_16_bits_is_recognised_in_32_and_the_other_way_round(files, tmp_path, trained, used):
    where = in_16_bits(files, tmp_path / "half")
    base = open_base(where, device="cpu", dtype=trained)
    lk.attach(base.model, lk.LoRA(rank=2), targets="q_proj", name="x")
    lk.save(base.model, tmp_path / "x", "x")
    found = load_adapter(open_base(where, device="cpu", dtype=used).model, tmp_path / "x")
    assert found.name == "x" and f"another dtype than in training ({trained}), and else the same" in found.note
    with pytest.raises(LorakitError, match="--verify off"):
        load_adapter(open_base(changed(files, tmp_path / "c"), device="cpu", dtype="float32").model, tmp_path / "x")


def test_a_base_that_was_rounded_is_not_checked_and_that_is_said(files):
    found = load_adapter(open_base(files.base, device="cpu", dtype="bfloat16").model, files.sql)
    assert "rounded, so it was not checked" in found.note


def test_a_prompt_is_encoded_as_the_rows_of_training_were(tmp_path):
    base = open_base(made(tmp_path, chat=True).base, device="cpu")
    tokenizer = base.tokenizer
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert list(prompter_of(base).tokens("hi")) == list(chat)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in prompter_of(base).ends()
    for kind in ("prompt", "text"):
        assert tokenizer.decode(prompter_of(base, kind=kind).tokens("hi")) == "hi"
    assert tokenizer.decode(prompter_of(base, raw=True).tokens("hi")) == "hi"
    assert tokenizer.decode(prompter_of(base, template="Q: {prompt}\nA: ").tokens("hi")) == "Q: hi\nA: "
    assert prompter_of(base, raw=True).tokens("") == (tokenizer.bos_token_id,)
    with pytest.raises(LorakitError, match="no kind of rows"):
        prompter_of(base, kind="pairs")


@pytest.mark.parametrize(
    ("architecture", "shard"),
    [("llama", "5GB"), ("llama", "30KB"), ("gpt2", "5GB"), ("qwen2", "30KB"), ("gemma", "5GB")],
)
def test_merge_writes_a_plain_transformers_directory(tmp_path, architecture, shard):
    files = made(tmp_path, architecture=architecture, shard=shard, chat=True)
    said = ran(app, "merge", files.base, files.run, tmp_path / "merged").output
    assert "written" in said
    assert sorted(os.listdir(tmp_path / "merged")) == sorted(os.listdir(files.base))
    assert (len(list(files.base.glob("*.safetensors"))) > 1) == (shard == "30KB")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    base = reopened(files)
    assert tokenizer.get_vocab() == base.tokenizer.get_vocab()
    assert tokenizer.chat_template == base.tokenizer.chat_template
    ids = torch.tensor([[5, 80, 7, 200, 9]])
    with lk.active(base.model, "sql"), torch.no_grad():
        assert torch.allclose(merged(ids).logits, base.model(ids).logits, atol=2e-5, rtol=1e-4)
    assert load_adapter(open_base(files.base, device="cpu").model, files.run).name == "sql"
    with pytest.raises(LorakitError, match="--verify off"):
        load_adapter(open_base(tmp_path / "merged", device="cpu").model, files.run)


def test_merge_into_16_bits_of_an_adapter_that_was_trained_over_32(files, tmp_path):
    where = in_16_bits(files, tmp_path / "half")
    base = open_base(where, device="cpu", dtype="float32")
    lk.attach(base.model, lk.LoRA(rank=2), targets="q_proj", name="x")
    for parameter in lk.adapter_parameters(base.model, "x"):
        torch.nn.init.normal_(parameter, std=0.3)
    lk.save(base.model, tmp_path / "x", "x")
    said = ran(app, "merge", where, tmp_path / "x", tmp_path / "merged").output
    assert "another dtype than in training, and else the same" in said
    merged = open_base(tmp_path / "merged", device="cpu", dtype="float32").model
    with lk.merged(base.model, "x"):
        for name, value in merged.state_dict().items():
            assert torch.equal(value, base.model.state_dict()[name].bfloat16().float()), name
    with pytest.raises(LorakitError, match="other values"):
        ran(app, "merge", changed(files, tmp_path / "c"), tmp_path / "x", tmp_path / "again")
