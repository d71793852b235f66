"""LoRA in a plain PyTorch loop: a small Llama built here, or `--model DIR`, learns the text of a Python module.

Only the adapter is trained and saved; switched off, the model is its base to the bit.
"""

import argparse
import tempfile
import textwrap
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import lorakit as lk

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a causal language model with its tokenizer, as transformers saves them")
parser.add_argument("--out", help="a directory for the adapter")
args = parser.parse_args()
file = Path(args.out or tempfile.mkdtemp()) / "python.safetensors"

torch.manual_seed(0)
text = Path(textwrap.__file__).read_text(encoding="utf-8")
if args.model:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(args.model)(text, return_tensors="pt").input_ids[0]
else:
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **size))
    tokens = torch.tensor(list(text.encode()))  # a token for each byte
rows = tokens[: len(tokens) // 128 * 128].view(-1, 128)  # (rows, 128)
held_out, rows = rows[:8], rows[8:]


@torch.no_grad()
def validate() -> float:
    """The loss on rows held out."""
    return model.eval()(input_ids=held_out, labels=held_out).loss.item()


before = validate()
lk.attach(model, lk.LoRA(rank=8), name="python")
optimizer = torch.optim.AdamW(lk.adapter_parameters(model), lr=5e-3)
model.train()
for _ in range(60):
    batch = rows[torch.randint(len(rows), (8,))]
    optimizer.zero_grad()
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
after = validate()
lk.save(model, file)

print(f"loss on text held out: {before:.3f} before, {after:.3f} after")
print(f"trained: {lk.adapters(model)['python'].parameters:,} parameters; {file}: {file.stat().st_size:,} bytes")
with lk.disabled(model):
    assert validate() == before
lk.detach(model)
lk.load(model, file)
assert validate() == after < before
