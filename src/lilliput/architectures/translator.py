"""A transformer that translates: the encoder-decoder of Marian from the transformers package.

Paper: Attention Is All You Need (Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser,
Polosukhin; NIPS 2017; arXiv 1706.03762)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..core.optional import optional
from ..core.registry import architecture
from ..errors import InputError
from ._checks import check_counts, check_probabilities


class Translator(nn.Module):
    """An encoder-decoder whose output is the logits alone; ``generate`` searches for translations.

    Args:
        network: of the transformers package.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor
    ) -> Tensor:
        """Logits ``(batch, target length, vocabulary)``; see the task ``multi30k`` for the inputs."""
        logits: Tensor = self.network(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            use_cache=False,
        ).logits
        return logits

    def generate(self, **arguments: Any) -> Tensor:
        """Token numbers of translations, ``(batch, length)``; see transformers' ``generate``."""
        made: Tensor = self.network.generate(**arguments)
        return made


@architecture
def translator(
    vocabulary: int = 4000,
    width: int = 128,
    layers: int = 2,
    heads: int = 4,
    inner: int = 512,
    dropout: float = 0.1,
) -> nn.Module:
    """A transformer with as many encoder as decoder layers and tied embeddings, 1,503,232 parameters.

    65,536 of them are sinusoids, of 256 places in the encoder and in the decoder, which do not train.

    Args:
        vocabulary: tokens of both languages.
        width: of the embeddings.
        layers: of the encoder, and of the decoder.
        heads: of an attention.
        inner: width inside the feed-forward layers.
        dropout: probability, behind the embeddings and every attention and feed-forward layer.

    Raises:
        InputError: a count is below 1, the width no multiple of the heads, or the dropout no probability.
        MissingDependency: transformers is not installed.
    """
    check_counts(
        "translator", vocabulary=vocabulary, width=width, layers=layers, heads=heads, inner=inner
    )
    check_probabilities("translator", dropout=dropout)
    if width % heads:
        raise InputError(
            f"translator: width={width} cannot be shared by heads={heads}: give a multiple of the heads."
        )
    transformers = optional("transformers", "transformers", "text", "the architecture 'translator'")
    config = transformers.MarianConfig(
        vocab_size=vocabulary, d_model=width, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=inner,
        decoder_ffn_dim=inner, max_position_embeddings=256, dropout=dropout, scale_embedding=True,
        activation_function="relu", pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, forced_eos_token_id=2, num_beams=1,
    )  # fmt: skip
    return Translator(transformers.MarianMTModel(config))
