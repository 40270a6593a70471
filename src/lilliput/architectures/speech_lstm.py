"""A recurrent classifier of spectrograms, for single spoken words.

Paper: Long Short-Term Memory (Hochreiter, Schmidhuber; Neural Computation 1997; doi
10.1162/neco.1997.9.8.1735)
"""

from __future__ import annotations

from torch import Tensor, nn

from ..core.registry import architecture
from ._checks import check_counts


class SpeechLstm(nn.Module):
    """An LSTM over the frames; the mean of its outputs goes to a linear layer.

    Args:
        bands: of a frame.
        hidden: width of the LSTM.
        layers: of the LSTM, one on the other.
        classes: number of outputs.
    """

    def __init__(self, bands: int, hidden: int, layers: int, classes: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(bands, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, frames: Tensor) -> Tensor:
        """From ``(batch, frames, bands)`` to logits ``(batch, classes)``."""
        outputs, _ = self.lstm(frames)
        logits: Tensor = self.head(outputs.mean(1))
        return logits


@architecture
def speech_lstm(
    bands: int = 40, hidden: int = 128, layers: int = 1, classes: int = 10
) -> nn.Module:
    """An LSTM over spectrogram frames with a linear classifier, 88,330 parameters.

    Input ``(batch, frames, bands)`` with any number of frames, output logits ``(batch, classes)``.

    Args:
        bands: of a frame.
        hidden: width of the LSTM.
        layers: of the LSTM, one on the other.
        classes: number of outputs.

    Raises:
        InputError: a count is below 1.

    Example:
        >>> sum(p.numel() for p in speech_lstm().parameters())
        88330
    """
    check_counts("speech_lstm", bands=bands, hidden=hidden, layers=layers, classes=classes)
    return SpeechLstm(bands, hidden, layers, classes)
