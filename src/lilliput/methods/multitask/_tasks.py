"""What the methods share that add a task to a network: its name, its own layers, and what must not move.

The surprising rule: with other tasks in the network, biases and normalization are frozen, running
statistics included, for the others see them too.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from ...core.method import LayerMethod
from ...core.run import Run
from ...core.select import Weight, matches, weights
from ...core.types import Layers
from ...errors import InputError, NothingMatched, did_you_mean
from ...measure import effective_state
from ...mechanisms.encodings import strip
from ...mechanisms.packing import Pack, Tensors, fit, pack_of, tensors_inside

_NORMS = nn.modules.batchnorm._NormBase


class TaskMethod(LayerMethod):
    """Base of the methods that add a task.

    Attributes:
        task: its name.
        own: pattern over the modules whose tensors the task has for itself; by default the last layer with
            weights. Linear layers and convolutions among them start anew with a new task.
        outputs: width of the last layer, where it is another one than before; for a single linear layer.
        layers: pattern over module names, the same for all tasks of a network.
    """

    family: ClassVar[str] = "multitask"
    kind: ClassVar[str]

    task: Annotated[str, Field(min_length=1)]
    own: Layers | None = None
    outputs: Annotated[int, Field(ge=1)] | None = None

    def own_layers(self, model: nn.Module) -> list[str]:
        """The modules that belong to the task.

        Raises:
            NothingMatched: there is none.
        """
        if self.own is None:
            return [w.layer for w in weights(model)][-1:]
        having = [
            n for n, m in model.named_modules() if n and any(True for _ in m.parameters(False))
        ]
        found = [name for name in having if matches(self.own, name)]
        if not found:
            hint = did_you_mean(str(self.own).strip("*!"), having)
            raise NothingMatched(
                f"{self.method_name()}: own: {self.own!r} covers no layer with parameters.{hint}"
            )
        return found

    def weights(self, model: nn.Module) -> list[Weight]:
        """The weights of the backbone: those of the layers that the pattern covers, but the task's own."""
        own = set(self.own_layers(model))
        chosen = [w for w in super().weights(model) if w.layer not in own]
        if not chosen:
            raise NothingMatched(
                f"{self.method_name()}: the layers {self.layers!r} are all the task's own: there is no "
                "backbone."
            )
        return chosen

    def check(self, model: nn.Module) -> None:
        """Layers must be there, and the widths make sense."""
        super().check(model)
        own = self.own_layers(model)
        linear = [name for name in own if isinstance(model.get_submodule(name), nn.Linear)]
        if self.outputs is not None and len(linear) != 1:
            raise InputError(
                f"{self.method_name()}: outputs wants a single linear layer of the task's own, and {own} has "
                f"{len(linear)}. Name it with own: ..., or leave outputs out."
            )

    def begin(self, run: Run, pack: Pack) -> None:
        """Give the task its own layers, and freeze what other tasks see too.

        Args:
            run: of this stage.
            pack: what the network knows of its tasks.

        Raises:
            InputError: the task exists already and is not the last one, or the pack is another method's.
        """
        if pack.kind != self.kind:
            raise InputError(
                f"{self.method_name()}: the network's tasks {', '.join(pack.tasks)} are kept as "
                f"{pack.kind}, which this method does not extend."
            )
        if self.task in pack.tasks and not self.continues(pack):
            raise InputError(
                f"{self.method_name()}: the network has a task {self.task!r} already. Choose another "
                "name, or remove it first (lilliput.remove_task)."
            )
        self._same_layers(run.model, pack)
        if pack.tasks and not self.continues(pack):
            self._new_layers(run.model)
        # Not the same as whether a parameter was frozen: normalization may have none, or none that trains.
        still = self.kind == "masks" or any(name != self.task for name in pack.tasks)
        self.memory(run)["still"] = still
        self.memory(run)["frozen"] = self._freeze(run.model) if still else []

    def continues(self, pack: Pack) -> bool:
        """Whether the stage goes on with the task that came last."""
        return bool(pack.tasks) and pack.tasks[-1] == self.task == pack.current

    def before_step(self, run: Run) -> None:
        """Frozen statistics do not move: the engine has put all modules in train mode."""
        if self.memory(run)["still"]:
            own = self.own_layers(run.model)
            for name, module in run.model.named_modules():
                if isinstance(module, _NORMS) and module.track_running_stats and name not in own:
                    module.eval()

    def conclude(self, run: Run) -> tuple[Tensors, Tensors]:
        """Thaw; the tensors that are the task's own now, and those that all tasks share."""
        parameters = dict(run.model.named_parameters())
        for name in self.memory(run)["frozen"]:
            if name in parameters:
                parameters[name].requires_grad_(True)
        state = {name: tensor.clone() for name, tensor in effective_state(run.model).items()}
        own = set(tensors_inside(run.model, self.own_layers(run.model)))
        backbone = {w.name for w in self.weights(run.model)}
        shared = {n: t for n, t in state.items() if n not in own and n not in backbone}
        return {name: state[name] for name in state if name in own}, shared

    def _same_layers(self, model: nn.Module, pack: Pack) -> None:
        chosen = {w.name for w in self.weights(model)}
        if pack.weights and chosen != pack.weights.keys():
            other = sorted(chosen ^ pack.weights.keys())
            raise InputError(
                f"{self.method_name()}: the tasks of a network share one backbone, and "
                f"{', '.join(other[:3])} would be in it for some of them only. Give layers and own as for "
                "the first task."
            )

    def _new_layers(self, model: nn.Module) -> None:
        for name in self.own_layers(model):
            module = model.get_submodule(name)
            if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                continue
            strip(Weight(name, module, "weight"))  # masks and shared values are another task's
            if isinstance(module, nn.Linear) and self.outputs is not None:
                wider = {
                    f"{name}.weight": module.weight.new_empty(self.outputs, module.in_features)
                }
                if module.bias is not None:
                    wider[f"{name}.bias"] = module.weight.new_empty(self.outputs)
                fit(model, wider)
            module.reset_parameters()

    def _freeze(self, model: nn.Module) -> list[str]:
        """Freeze all but the backbone's weights and the task's own tensors; which were frozen here."""
        mine = [*self.own_layers(model), *(w.layer for w in self.weights(model))]
        kept = {
            id(p)
            for name in mine
            for leaf, p in model.get_submodule(name).named_parameters()
            if leaf.partition(".")[0] != "bias" or name in self.own_layers(model)
        }
        found = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in kept]
        for name in found:
            model.get_parameter(name).requires_grad_(False)
        return found


def known(run: Run, kind: str) -> Pack:
    """The network's pack, or an empty one."""
    return pack_of(run.model) or Pack(kind)
