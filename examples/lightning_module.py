"""A LightningModule adapted in place: its checkpoints hold the adapter, not the base, and a run continues from one.

An LSTM learns to read a Python module byte by byte; the run that was continued ends in the same bits.
"""

import argparse
import tempfile
import textwrap
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lorakit as lk

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", help="a directory for the checkpoints")
out = Path(parser.parse_args().out or tempfile.mkdtemp())
text = torch.tensor(list(Path(textwrap.__file__).read_bytes()))
rows = text[: len(text) // 65 * 65].view(-1, 65)  # 64 bytes to read, 64 to foretell


class Reader(lightning.LightningModule):
    strict_loading = False  # checkpoints lack the base

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.lstm, self.head = nn.Embedding(256, 64), nn.LSTM(64, 256), nn.Linear(256, 256)
        self.base = set(self.state_dict())
        lk.attach(self, lk.LoRA(rank=8), ["lstm", "head"])

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in self.base}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(lk.adapter_parameters(self), lr=5e-3)

    def training_step(self, batch: Tensor) -> Tensor:
        logits = self.head(self.lstm(self.embed(batch.t()[:-1]))[0])  # (64, rows, 256)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.t()[1:].flatten())
        self.log("loss", loss)
        return loss


def fit(epochs: int, start: Path | None = None) -> list[nn.Parameter]:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", **quiet)
    trainer.fit(model := Reader(), DataLoader(rows, batch_size=16), ckpt_path=start)
    trainer.save_checkpoint(file := out / f"{epochs}-epochs.ckpt")
    loss, size = trainer.callback_metrics["loss"], file.stat().st_size
    print(f"{epochs} epochs: loss {loss:.4f}; the checkpoint, with Adam's state: {size:,} bytes")
    return lk.adapter_parameters(model)


half, whole, continued = fit(2), fit(4), fit(4, start=out / "2-epochs.ckpt")
assert all(torch.equal(a, b) for a, b in zip(whole, continued, strict=True))
