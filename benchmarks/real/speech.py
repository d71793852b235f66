"""Synthetic speech whose pauses are known: a voice made of pulses and noise, through the resonances of vowels.

The source-filter model (Fant 1960; Klatt 1980, "Software for a cascade/parallel formant synthesizer", §I), in its
simplest form: pulses at the pitch of a voice pass four resonators that glide from one vowel to another; some
syllables begin with a hiss. It is no language, but a detector of voices takes it for one.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.signal import lfilter
from torch import Tensor

from benchmarks.real.voice import WINDOW

Wave = NDArray[np.float64]

RATE = 16_000
"""Samples a second."""

_FORMANTS = (
    (730, 1090, 2440), (530, 1840, 2480), (270, 2290, 3010), (570, 840, 2410),
    (300, 870, 2240), (660, 1720, 2410), (440, 1020, 2240), (490, 1350, 1690),
)  # fmt: skip
"""Resonances in Hz of eight vowels of men (Peterson & Barney 1952, table II)."""
_BANDWIDTHS = (60, 90, 150, 250)
_HIGHEST = 3500
_PIECES = 8
"""The resonances of a syllable move in so many steps."""


@dataclass(frozen=True)
class Sounds:
    """Clips with what is said in them."""

    waves: Tensor
    """float32, (clips, samples), silence between the utterances."""
    spoken: Tensor
    """bool, (clips, windows): whether there is a voice in most of that window."""


def sounds(clips: int, seconds: float, seed: int) -> Sounds:
    """Clips, each by another voice."""
    random = np.random.default_rng(seed)
    made = [_clip(random, round(seconds * RATE)) for _ in range(clips)]
    marks = np.stack([mark[: len(mark) // WINDOW * WINDOW] for _, mark in made])
    spoken = marks.reshape(clips, -1, WINDOW).mean(2) > 0.5
    return Sounds(torch.from_numpy(np.stack([wave for wave, _ in made])).float(), torch.from_numpy(spoken))


def in_noise(waves: Tensor, generator: torch.Generator, decibels: tuple[float, float]) -> Tensor:
    """At another loudness and with noise added, which is white for one clip and low for another.

    The ratio of voice to noise is drawn for each clip between the two numbers, in dB; a voice has a power of one
    while it speaks.
    """
    n, length = waves.shape
    low, high = decibels
    ratio = low + (high - low) * torch.rand(n, 1, generator=generator)
    white = torch.randn(n, length, generator=generator)
    slope = torch.rand(n, 1, generator=generator)  # 0 is white; at 1 the power falls by 6 dB an octave
    frequency = torch.linspace(1 / 400, 1, length // 2 + 1)
    noise = torch.fft.irfft(torch.fft.rfft(white) * frequency.clamp(min=1 / 80) ** -slope, n=length)
    noise = noise / noise.square().mean(1, keepdim=True).sqrt()
    loudness = 10 ** (-1.5 + torch.rand(n, 1, generator=generator))  # 0.03 to 0.3
    return loudness * (waves + noise * 10 ** (-ratio / 20))


def _clip(random: np.random.Generator, length: int) -> tuple[Wave, NDArray[np.bool_]]:
    """Utterances of three to eight syllables with pauses between, and where the voice is."""
    wave, spoken = np.zeros(length), np.zeros(length, bool)
    voice = random.uniform(90, 240)
    at = round(random.uniform(0.1, 0.8) * RATE)
    while at < length:
        pitch = voice * random.uniform(0.9, 1.2)
        for _ in range(random.integers(3, 9)):
            size = round(random.uniform(0.12, 0.28) * RATE)
            if at + size >= length:
                return wave, spoken
            pitch *= random.uniform(0.93, 1.03)
            wave[at : at + size] = _syllable(random, size, pitch)
            spoken[at : at + size] = True
            at += size
        at += round(random.uniform(0.4, 1.5) * RATE)
    return wave, spoken


def _syllable(random: np.random.Generator, size: int, pitch: float) -> Wave:
    """A glide from one vowel to another, of power one."""
    time = np.arange(size)
    drift = 0.01 * np.cumsum(random.normal(size=size)) / 100
    phase = np.cumsum(pitch * (1 + 0.03 * np.sin(2 * np.pi * 5 * time / RATE) + drift) / RATE)
    source = lfilter([1], [1, -0.96], np.diff(np.floor(phase), prepend=0))
    source += 0.02 * random.normal(size=size) - source.mean()
    wave = _through_resonances(source, *(_FORMANTS[i] for i in random.integers(len(_FORMANTS), size=2)))
    wave *= np.minimum(1, np.minimum(time, size - 1 - time) / (0.03 * RATE))
    wave /= np.sqrt((wave**2).mean()) + 1e-9
    if random.random() < 0.6:
        hiss = round(random.uniform(0.04, 0.09) * RATE)
        noise = lfilter([1, -0.95], [1], random.normal(size=hiss))
        wave[:hiss] = 0.3 * wave[:hiss] + 0.4 * noise * np.hanning(hiss)
    return wave


def _through_resonances(source: Wave, first: tuple[int, ...], last: tuple[int, ...]) -> Wave:
    """Four two-pole filters in a row, their frequencies moving from the first vowel's to the last one's."""
    states = [np.zeros(2) for _ in _BANDWIDTHS]
    pieces = []
    for i, piece in enumerate(np.array_split(source, _PIECES)):
        share = i / (_PIECES - 1)
        for j, width in enumerate(_BANDWIDTHS):
            frequency = _HIGHEST if j == 3 else (1 - share) * first[j] + share * last[j]
            radius = math.exp(-math.pi * width / RATE)
            turn = 2 * radius * math.cos(2 * math.pi * frequency / RATE)
            piece, states[j] = lfilter([1 - turn + radius**2], [1, -turn, radius**2], piece, zi=states[j])
        pieces.append(piece)
    return np.concatenate(pieces)
