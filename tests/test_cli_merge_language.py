"""`lorakit merge` of a run into a language model: found where it lies, checked; the result ends where it was taught."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from command_files import done, fails
from helpers import randomize
from small_lms import STORIES, needs_stories, small_lm
from transformers import AutoModelForCausalLM

import lorakit as lk
from lorakit.errors import LorakitError
from lorakit.finetune.base import open_base
from lorakit.finetune.generation.adapters import load_adapter

WIDE = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.05}


def run_on(folder: Path, base: Path, *, kind: str = "text", quantize: str | None = None, also=(), **settings) -> Path:
    """A run directory as training leaves it, with an adapter that nobody trained."""
    settings |= {"model": str(base), "data": "x.jsonl", "quantize": quantize, "device": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = open_base(base, device="cpu", quantize=quantize).model
        special = {"gpt_neox": ["query_key_value"], "gpt2": ["c_attn"]}
        targets = special.get(model.config.model_type, ["q_proj", "up_proj"])
        lk.attach(model, lk.LoRA(rank=2), targets=targets, train_also=list(also) or None)
        randomize(model, "default", seed=1)
        (folder / "checkpoints").mkdir(parents=True)
        lk.save(model, folder / "adapter")
    (folder / "config.yaml").write_text(json.dumps(settings))
    (folder / "run.json").write_text(json.dumps({"kind": kind}))
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(5, 45).view(1, -1)).logits


def adapted(base: Path, run: Path, verify: str = "sample") -> torch.Tensor:
    """What the base gives with the adapter beside it."""
    model = open_base(base, device="cpu").model
    load_adapter(model, run, verify=verify)
    return logits(model)


def merged(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder))


def test_the_base_may_be_a_run_or_a_hub_id_in_the_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    repository, sha = tmp_path / "hub" / "models--me--tiny", "0123456789abcdef0123456789abcdef01234567"
    base = small_lm(repository / "snapshots" / sha)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(sha)
    run = run_on(tmp_path / "run", base)
    done("merge", run, run, tmp_path / "of_run")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("lorakit.finetune.hub.hub_is_near", lambda: False)
    done("merge", "me/tiny", run, tmp_path / "of_hub")
    wanted = adapted(base, run)
    for out in ("of_run", "of_hub"):
        torch.testing.assert_close(merged(tmp_path / out), wanted, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "of_hub" / "tokenizer.json").is_file()
    fails("no directory me/none.*the hub cannot be reached", "merge", "me/none", run, tmp_path / "out")
    fails("no hub id", "merge", tmp_path / "nowhere", run, tmp_path / "out")


def ends_in(folder: Path) -> object:
    return AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id


@needs_stories
def test_the_merged_model_ends_where_the_run_taught_it_to(tmp_path):
    run = run_on(tmp_path / "run", STORIES)
    said = done("merge", STORIES, run, tmp_path / "out")
    assert "texts end with '<s>' too" in said
    assert ends_in(tmp_path / "out") == [2, 1] and (tmp_path / "out" / "config.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids, found = torch.tensor([[1, 403, 407]]), []
    for factor in (1e3, -1):  # now it is far the likeliest, or the least likely
        with torch.no_grad():
            model.lm_head.weight[1] *= factor
        found.append(model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)[0].tolist())
    assert any(tokens[-1] == 1 and len(tokens) < 12 for tokens in found)


@pytest.mark.parametrize("has", [True, False])
def test_a_chat_template_s_end_is_an_end_of_the_merged_model(tmp_path, has):
    base = small_lm(tmp_path / "base", chat=True)
    config = base / "generation_config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps(told | {"temperature": 0.7, "do_sample": True}))
    if not has:
        config.unlink()
    run = run_on(tmp_path / "run", base, kind="messages")
    assert "'<|im_end|>'" in done("merge", base, run / "adapter", tmp_path / "out")
    assert ends_in(tmp_path / "out") == [1, 4]
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written.get("temperature") == (0.7 if has else None) and written["pad_token_id"] == 2
    text = run_on(tmp_path / "text", base)
    assert "im_end" not in done("merge", base, text, tmp_path / "of_text") and ends_in(tmp_path / "of_text") == 1
    lone = tmp_path / "lone"
    (run / "adapter").rename(lone)
    assert "im_end" not in done("merge", base, lone, tmp_path / "of_lone") and ends_in(tmp_path / "of_lone") == 1


def test_a_run_over_a_quantized_base_goes_into_the_plain_one_with_one_line(tmp_path):
    pytest.importorskip("bitsandbytes")
    base = small_lm(tmp_path / "base", **WIDE)
    run = run_on(tmp_path / "run", base, quantize="4bit", also=["model.norm"])
    said = done("merge", base, run, tmp_path / "out")
    assert said.count("rounding differs") == 1 and "nf4" in said and "cannot be checked" in said
    torch.testing.assert_close(merged(tmp_path / "out"), adapted(base, run), rtol=1e-4, atol=1e-4)
    model = open_base(base, device="cpu").model
    assert "rounding differs" in (load_adapter(model, run).note or "")
    other = small_lm(tmp_path / "other", seed=1, **WIDE)
    changed = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        changed.model.norm.weight += 1
    changed.save_pretrained(other)
    fails("norm.*other values(.|\n)*--no-verify", "merge", other, run, tmp_path / "of_other")
    done("merge", other, run, tmp_path / "of_other", "--no-verify")


def test_a_run_over_a_plain_base_is_loaded_onto_the_quantized_one_with_one_line(tmp_path):
    pytest.importorskip("bitsandbytes")
    base = small_lm(tmp_path / "base", **WIDE)
    run = run_on(tmp_path / "run", base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = open_base(base, device="cpu", quantize="4bit").model
        note = load_adapter(model, run).note or ""
        found = logits(model)
    assert "not quantized in training" in note and "nf4" in note and "\n" not in note
    wanted = adapted(base, run)
    assert (found - wanted).norm() < 0.3 * wanted.norm()


def test_an_adapter_of_another_base_is_a_few_lines(tmp_path):
    base, other = (
        small_lm(tmp_path / "base", num_hidden_layers=5),
        small_lm(tmp_path / "other", num_hidden_layers=5, seed=1),
    )
    run = run_on(tmp_path / "run", base)
    with pytest.raises(LorakitError) as caught:
        done("merge", other, run, tmp_path / "out")
    said = str(caught.value)
    assert said.count("\n  - ") == 6 and "and 5 more" in said and "--no-verify" in said and "verify=" not in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(LorakitError) as caught:
        load_adapter(open_base(other, device="cpu").model, run)
    said = str(caught.value)
    assert said.count("\n  - ") == 6 and "and 5 more" in said and "--verify off" in said and "verify=" not in said
    wide = small_lm(tmp_path / "wide", dtype="bfloat16")
    fails(
        "--no-verify",
        "merge",
        wide,
        run_on(tmp_path / "second", small_lm(tmp_path / "third", seed=2)),
        tmp_path / "out",
    )


def test_the_table_is_of_the_worst_and_of_all_together(tmp_path):
    base = small_lm(tmp_path / "base", num_hidden_layers=5)
    said = done("merge", base, run_on(tmp_path / "run", base), tmp_path / "out")
    assert "10 weights merged: change" in said and "lost in rounding" in said
    assert len(re.findall(r"^model\.layers\S+ ", said, re.MULTILINE)) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gemma", "gpt2"])
def test_a_head_that_was_trained_whole_is_merged_though_its_file_calls_it_otherwise_or_ties_it(
    tmp_path, architecture, tied, dtype
):
    base = small_lm(tmp_path / "base", architecture, tie_word_embeddings=tied)
    run = run_on(tmp_path / "run", base, also=[lk_head(base)])
    if dtype != torch.float32:
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        plain.save_pretrained(base)
    said = done("merge", base, run, tmp_path / "out", *(() if dtype == torch.float32 else ("--no-verify",)))
    live = tied or architecture == "gpt_neox"
    assert ("the whole model was loaded" in said) == live
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert {path.name for path in base.iterdir()} <= {path.name for path in (tmp_path / "out").iterdir()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == dtype
    bounds = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.1, "atol": 1.5}
    torch.testing.assert_close(logits(model.float()), adapted(base, run, "off"), **bounds)
    assert torch.equal(
        model.get_input_embeddings().weight, AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    )


def test_an_embedding_that_was_trained_whole_is_merged_and_the_head_stays_that_of_the_base(tmp_path):
    base = small_lm(tmp_path / "base", tie_word_embeddings=True)
    run = run_on(tmp_path / "run", base, also=["model.embed_tokens"])
    done("merge", base, run, tmp_path / "out", "--strength", "0.5")
    model = open_base(base, device="cpu").model
    name = load_adapter(model, run).name
    lk.activate(model, {name: 0.5})
    torch.testing.assert_close(merged(tmp_path / "out"), logits(model), rtol=1e-4, atol=1e-4)


def test_a_merge_by_way_of_the_live_model_may_be_refused_and_then_leaves_nothing(tmp_path):
    base = small_lm(tmp_path / "base", tie_word_embeddings=True)
    run = run_on(tmp_path / "run", base, also=["lm_head"])
    other = small_lm(tmp_path / "other", tie_word_embeddings=True, seed=1)
    fails("other values(.|\n)*--no-verify", "merge", other, run, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    plain.save_pretrained(base)
    fails("--least-survival", "merge", base, run, tmp_path / "out", "--no-verify", "--strength", "1e-4")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "run", "other"}


def lk_head(base: Path) -> str:
    """The live model's name of its head."""
    model = AutoModelForCausalLM.from_pretrained(base)
    return next(name for name, module in model.named_modules() if module is model.get_output_embeddings())


def test_an_adapter_of_another_architecture_is_refused_without_loading_the_model(tmp_path, monkeypatch):
    run = run_on(tmp_path / "run", small_lm(tmp_path / "base"))
    other = small_lm(tmp_path / "other", "gpt2")
    monkeypatch.setattr("lorakit.finetune.merging.open_base", None)
    fails("lacks 4 of its 4 weights", "merge", other, run, tmp_path / "out")
