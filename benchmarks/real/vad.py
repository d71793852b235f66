"""A voice detector learns to hear in loud noise what it hears in silence.

    python -m benchmarks.real.vad            # the table: 25 s of CPU time for each training, three seeds
    python -m benchmarks.real.vad --tune     # the hyper-parameters' scores on the validation sounds

There is no labelled speech here, so the task is one that needs no labels: in noise, give the probabilities that the
base itself gives for the same sound without noise (distillation). The sounds are synthetic speech
(`benchmarks.real.speech`), whose pauses are known: the share of windows judged rightly is reported beside the
agreement. The network is recurrent: its convolutions are adapted beside their call, the LSTM cell, whose forward
reads its weights, in the weight.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lorakit as lk
from benchmarks.real import models, speech
from benchmarks.real.compare import Arm, Experiment, command_line, everything, judged_by, low_rank
from benchmarks.real.training import Batch, Recipe
from benchmarks.real.voice import State, windows

BUDGET = 25.0
BATCH = 8
SECONDS = 4.0
NOISE = (-10.0, 0.0)
"""Voice to noise in dB: the noise has as much power as the voice, to ten times as much."""
TARGETS = ["conv1", "conv2", "conv3", "conv4", "lstm_cell.weight_ih", "lstm_cell.weight_hh"]
"""All but the first convolution, which is a Fourier transform, and the last one, a single row."""


def judged(model: nn.Module, waves: Tensor) -> Tensor:
    """The probabilities of a voice (clips, windows) in sounds (clips, samples)."""
    state, out = None, []
    for window in windows(waves).unbind(1):
        probability, state = model(window, state)
        out.append(probability)
    return torch.cat(out, 1)


def distil(model: nn.Module, batch: Batch) -> Tensor:
    """Binary cross-entropy with the probabilities to be given."""
    waves, wanted = batch
    return F.binary_cross_entropy(judged(model, waves).clamp(1e-6, 1 - 1e-6), wanted)


@torch.no_grad()
def by_base(waves: Tensor) -> Tensor:
    """What the base says of sounds without noise, at a middle loudness."""
    return judged(models.voice_activity(), 0.1 * waves)


@cache
def training_sounds(clips: int) -> tuple[Tensor, Tensor]:
    """Clips without noise, and the base's word on them."""
    waves = speech.sounds(clips, SECONDS, seed=1).waves
    return waves, by_base(waves)


def stream(seed: int, clips: int = 256) -> Iterator[Batch]:
    """Batches of clips in noise that is drawn anew each time."""
    waves, wanted = training_sounds(clips)
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(waves), generator=generator).split(BATCH):
            yield speech.in_noise(waves[index], generator, NOISE), wanted[index]


def share(waves: Tensor, wanted: Tensor) -> Callable[[nn.Module], float]:
    """The percentage of windows that are judged as wanted."""

    @torch.no_grad()
    def measure(model: nn.Module) -> float:
        return 100 * ((judged(model, waves) > 0.5) == wanted).float().mean().item()

    return measure


def experiment() -> Experiment:
    """Other voices and other noise for validation and for the test."""
    validation, test = (speech.sounds(96, SECONDS, seed) for seed in (2, 3))
    noisy = [
        speech.in_noise(part.waves, torch.Generator().manual_seed(seed), NOISE)
        for seed, part in ((2, validation), (3, test))
    ]
    agreed = [by_base(part.waves) > 0.5 for part in (validation, test)]
    marks = {
        "validation": share(noisy[0], agreed[0]),
        "agreed, noise": share(noisy[1], agreed[1]),
        "true, noise": share(noisy[1], test.spoken),
        "agreed, silence": share(0.1 * test.waves, agreed[1]),
        "true, silence": share(0.1 * test.waves, test.spoken),
    }
    return Experiment(models.voice_activity, stream, marks["validation"], judged_by(marks), loss=distil)


def lora(rank: int, lr: float) -> Arm:
    """Convolutions beside their call, the LSTM cell in the weight: chosen by `attach` itself."""
    return Arm(f"LoRA r={rank} lr={lr:g}", low_rank(lk.LoRA(rank), TARGETS), Recipe(lr, seconds=BUDGET))


def full(lr: float) -> Arm:
    """Full fine-tuning."""
    return Arm(f"full lr={lr:g}", everything, Recipe(lr, seconds=BUDGET))


CANDIDATES = [
    *(full(lr) for lr in (3e-4, 1e-3, 3e-3, 1e-2)),
    *(lora(8, lr) for lr in (1e-3, 3e-3, 1e-2)),
    lora(16, 3e-3),
    lora(16, 1e-2),
    lora(16, 3e-2),
]
ARMS = [full(3e-3), lora(16, 1e-2)]


def moment() -> tuple[Tensor, State]:
    """One window of noisy speech, and the state that the window before it left.

    At the silent start of a clip, or with a state of zeros, some updates can have no effect.
    """
    waves = speech.in_noise(speech.sounds(2, 2.0, seed=4).waves, torch.Generator().manual_seed(0), NOISE)
    with torch.no_grad():
        _, state = models.voice_activity()(windows(waves)[:, 30])
    return windows(waves)[:, 31], state


def main() -> None:
    """The command line; and the proof that each update reaches the output."""
    model = models.voice_activity()
    lk.attach(model, lk.LoRA(rank=16), TARGETS, name="probe")
    print(lk.probe(model, *moment()))
    command_line(__doc__ or "", {"voice detector in noise": experiment}, ARMS, CANDIDATES)


if __name__ == "__main__":
    main()
