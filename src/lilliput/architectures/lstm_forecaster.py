"""A recurrent network that reads some hours of several series and forecasts the hours that follow.

The mean of the window is taken off each series before and put back afterwards: from season to season the
level drifts, and a network that knows absolute levels forecasts worse than yesterday repeated.

Paper: Long Short-Term Memory (Hochreiter, Schmidhuber; Neural Computation 1997; doi
10.1162/neco.1997.9.8.1735)
"""

from __future__ import annotations

from torch import Tensor, nn

from ..core.registry import architecture
from ._checks import check_counts


class LstmForecaster(nn.Module):
    """An LSTM over the window; a linear layer makes all hours of the forecast from its last output.

    Args:
        features: series.
        hidden: width of the LSTM.
        layers: of the LSTM, one on the other.
        horizon: hours to forecast.
    """

    def __init__(self, features: int, hidden: int, layers: int, horizon: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, horizon * features)
        self.unflatten = nn.Unflatten(1, (horizon, features))

    def forward(self, window: Tensor) -> Tensor:
        """From ``(batch, window, features)`` to ``(batch, horizon, features)``."""
        level = window.mean(1, keepdim=True)
        outputs, _ = self.lstm(window - level)
        forecast: Tensor = self.unflatten(self.head(outputs[:, -1])) + level
        return forecast


@architecture
def lstm_forecaster(
    features: int = 7, hidden: int = 64, layers: int = 1, horizon: int = 24
) -> nn.Module:
    """An LSTM and a linear layer that forecast several series at once, 29,608 parameters.

    Input ``(batch, window, features)`` for a window of any length, output ``(batch, horizon, features)``.

    Args:
        features: series.
        hidden: width of the LSTM.
        layers: of the LSTM, one on the other.
        horizon: hours to forecast.

    Raises:
        InputError: a count is below 1.

    Example:
        >>> import torch
        >>> lstm_forecaster(hidden=8)(torch.zeros(2, 168, 7)).shape
        torch.Size([2, 24, 7])
    """
    check_counts(
        "lstm_forecaster", features=features, hidden=hidden, layers=layers, horizon=horizon
    )
    return LstmForecaster(features, hidden, layers, horizon)
