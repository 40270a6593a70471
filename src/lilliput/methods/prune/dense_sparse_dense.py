"""Dense, sparse, dense: prune, train under the mask, and let the pruned weights start again from zero.

Paper: DSD: Dense-Sparse-Dense Training for Deep Neural Networks (Han, Pool, Narang, Mao, Gong, Tang, Elsen,
Vajda, Paluri, Tran, Catanzaro, Dally; ICLR 2017; arXiv 1607.04381)

Three stages, of which this method is the second:

- D: train as usual;
- S: in every layer the weights of largest magnitude stay, ``k = N (1 - sparsity)`` of them, chosen once
  from the trained weights; the mask is fixed and the rest train under it;
- D: the mask goes, pruned weights start from zero, and all train at a tenth of the learning rate.

The end is a dense network of the same size, and a better one: the sparse stage moves it out of the
minimum in which it was, and what grows back from zero grows where it helps.

Faithful: choice, fixed mask, restart at zero. The stages before and after are stages of the recipe without
a method; see ``dense_sparse_dense_digits``.

The surprising rule: this makes nothing smaller. After its stage the zeros are held by nothing, and any
stage that follows fills them.

Cost: one selection over the weights. When not to use it: to compress (``magnitude``).
"""

from __future__ import annotations

from typing import Any, ClassVar

from ...core.method import LayerMethod
from ...core.registry import method
from ...core.run import Run
from ...core.types import Change, PerLayer, Sparsity, resolve
from ...mechanisms.encodings import Mask, encoding_of, reapply, stored_masks, take_off
from ...mechanisms.ranking import keep_largest
from ._masking import changes, mask_of, nonzeros, put_masks


@method
class DenseSparseDense(LayerMethod):
    """The sparse stage: hold the smallest weights of every layer at zero, and let go of them at the end.

    Attributes:
        sparsity: fraction of zeros, exactly; for every layer or by layer pattern. The paper has 0.25 to
            0.5, and often leaves the first layer whole.
        layers: pattern over module names.

    Example:
        >>> DenseSparseDense(sparsity={"conv1": 0.0, "*": 0.3}).sparsity["*"]
        0.3
    """

    family: ClassVar[str] = "prune"

    sparsity: PerLayer[Sparsity] = 0.3

    def amounts(self) -> Any:
        """The setting that decides which layers take part."""
        return self.sparsity

    def attach(self, run: Run) -> None:
        """Choose once, and put the masks on."""
        chosen, memory = self.weights(run.model), self.memory(run)
        memory["before"] = {w.name: nonzeros(w.value) for w in chosen}
        memory["held"] = {
            w.name: mask.mask.clone() for w in chosen if (mask := encoding_of(w, Mask))
        }
        put_masks(chosen)
        for weight in chosen:
            kept = keep_largest(
                weight.value.detach().abs(), resolve(self.sparsity, weight.layer) or 0.0
            )
            mask_of(weight).update(mask_of(weight).mask & kept)
        reapply(stored_masks(run.model))

    def finish(self, run: Run) -> list[Change]:
        """Let go of what was chosen; what an earlier stage has pruned stays so."""
        chosen, memory = self.weights(run.model), self.memory(run)
        found = changes(
            self.method_name(), chosen, memory["before"], lambda w: "zero until here, free now"
        )
        for weight in chosen:
            if weight.name in memory["held"]:
                mask_of(weight).update(memory["held"][weight.name].to(weight.value.device))
            else:
                take_off(weight, Mask)
        return found
