"""The network of Silero VAD for 16 kHz: is somebody speaking in these 32 milliseconds?"""

from torch import Tensor, nn
from torch.nn import functional as F

WINDOW = 512
"""Samples judged at a time."""
CONTEXT = 64
"""Samples before them that are seen too."""

State = tuple[Tensor, Tensor]


class VoiceActivity(nn.Module):
    """A spectrogram as a convolution, four convolutions, an LSTM cell and a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, samples: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The probability of speech (n, 1) in samples (n, 64 + 512), and the state for the next ones."""
        waves = self.stft_conv(F.pad(samples.unsqueeze(1), (0, 64), mode="reflect"))
        real, imaginary = waves.chunk(2, dim=1)
        x = (real.square() + imaginary.square()).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.relu(conv(x))
        state = self.lstm_cell(x.squeeze(-1), state)
        return self.final_conv(F.relu(state[0]).unsqueeze(-1)).sigmoid().squeeze(-1), state


def windows(waves: Tensor) -> Tensor:
    """Sounds (..., length) as the network's successive inputs (..., steps, 64 + 512); a rest at the end is dropped."""
    return F.pad(waves, (CONTEXT, 0)).unfold(-1, CONTEXT + WINDOW, WINDOW)
