"""One half of a block, lowered once: its XNNPACK delegate serves every layer of the same kind with other constants.

A delegate's blob holds no weights. It names them by keys of equal length, which are looked up in the `.pte` when it is loaded: so
a blob that was lowered over random integers serves a layer once its keys are replaced by names of that layer's constants.
Lowering re-traces a graph a dozen times and does not depend on the weights: 26 layers at once take minutes and gigabytes, one
takes seconds. Source of the keys: executorch 1.5, backends/xnnpack/operators/node_visitor.py. Our own packing must give all these
keys, which is asserted: a library that packs in another way fails here and not on a phone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, to_edge, to_edge_transform_and_lower
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir.backend.partitioner import Partitioner
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor, nn
from torch.export import ExportedProgram, export

from gemma_edge.export.executorch.packing import SCALE, Constant, packed
from gemma_edge.export.executorch.seams import DECOMPOSITIONS, Half, Limits, Linear

COMPILE = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
BACKEND = "XnnpackBackend"
ALIGNMENT = 16  # bytes, of a constant: XNNPACK's


@dataclass(frozen=True)
class Delegate:
    """XNNPACK's delegate of a half, without its constants."""

    blob: bytes
    keys: Mapping[str, Constant]  # key in the blob -> which weight's bytes belong there
    shared: Mapping[str, bytes]  # key -> bytes of a constant that is the same in every layer
    arguments: Sequence[int | str | Tensor]  # index of an input of the half, name of a norm, or a constant
    outputs: Sequence[int]  # indices of the delegate's outputs, in the half's order


@dataclass(frozen=True)
class Template:
    """A delegate, and what stands for it while the composed graph is traced."""

    delegate: Delegate
    stub: ExportedProgram


def lower_half(half: Half, limits: Limits) -> Delegate:
    """Lower a half to one XNNPACK delegate.

    Raises:
        RuntimeError: it became more than one, something stayed outside, or the library packs in another way than we do.
    """
    module, arguments, outputs = delegated(half, limits, XnnpackPartitioner())
    keys, shared = _constants(half, module)
    if module.backend_id != BACKEND or module.compile_specs:
        raise RuntimeError(
            f"{type(half).__name__} lowered to {module.backend_id} with {len(module.compile_specs)} specs"
        )
    return Delegate(bytes(module.processed_bytes), keys, shared, arguments, outputs)


def delegated(
    half: Half, limits: Limits, partitioner: Partitioner
) -> tuple[LoweredBackendModule, list[int | str | Tensor], list[int]]:
    """A half as one delegate of any kind: the delegate, its arguments, and its outputs in the half's order, as in `Delegate`.

    Raises:
        RuntimeError: it became more than one, or something stayed outside.
    """
    inputs, sizes = half.example(limits)
    with torch.no_grad():
        program = export(half, inputs, dynamic_shapes=sizes, strict=False)
    program = program.run_decompositions(dict(DECOMPOSITIONS))
    lowered = to_edge_transform_and_lower(program, partitioner=[partitioner], compile_config=COMPILE)
    edge = lowered.exported_program()
    call = _only_delegate(half, edge)
    module: LoweredBackendModule = getattr(edge.graph_module, str(call.args[0].target))
    results: Any = next(node.args[0] for node in edge.graph.nodes if node.op == "output")
    return module, [_argument(edge, node) for node in call.args[1:]], [node.args[1] for node in results]


def _only_delegate(half: Half, edge: ExportedProgram) -> Any:
    calls = [node for node in edge.graph.nodes if node.op == "call_function"]
    delegates = [node for node in calls if "executorch_call_delegate" in str(node.target)]
    others = sorted({str(node.target) for node in calls if node not in delegates and "getitem" not in str(node.target)})
    if len(delegates) != 1 or others:
        raise RuntimeError(
            f"{type(half).__name__} lowered to {len(delegates)} delegates, expected one; outside of them: {others}"
        )
    return delegates[0]


def _constants(half: Half, module: LoweredBackendModule) -> tuple[dict[str, Constant], dict[str, bytes]]:
    """The weight that each constant of the blob belongs to, identified by the hash of its bytes."""
    store = module.named_data_store_output
    constants = {key: store.buffers[entry.buffer_index] for key, entry in store.pte_data.items()}
    keys, expected = {}, 0
    for linear in (child for child in half.modules() if isinstance(child, Linear)):
        for part, values in packed(linear.given).items():
            expected += 1
            key = hashlib.sha256(values.numpy().tobytes()).hexdigest()
            key = f"scale_{key}" if part == SCALE else key
            if key not in constants:
                raise RuntimeError(
                    f"{part} of {linear.name} is not in its delegate: this executorch packs in another way"
                )
            keys[key] = Constant(linear.name, part, linear.piece)
    if len(keys) != expected:
        raise RuntimeError(f"{type(half).__name__}: {expected} constants have {len(keys)} keys: two of them are equal")
    return keys, {key: value for key, value in constants.items() if key not in keys}


def _argument(edge: ExportedProgram, node: Any) -> int | str | Tensor:
    """What a delegate's argument is: see `Template.arguments`."""
    signature = edge.graph_signature
    if node.name in signature.user_inputs:
        return list(signature.user_inputs).index(node.name)
    if node.name in signature.inputs_to_parameters:
        return str(signature.inputs_to_parameters[node.name]).removeprefix("block.")
    names = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    name = names[node.name]
    value: Tensor = edge.constants[name] if name in edge.constants else edge.state_dict[name]
    return value


class _Stub(nn.Module):
    """The delegate's signature and nothing else."""

    def __init__(self, half: Half, order: Sequence[int], outputs: Sequence[int]) -> None:
        super().__init__()
        self.outline, self.order, self.outputs = half.outline, order, outputs

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        """Zeros of the right shapes, from the delegate's arguments."""
        zeros = self.outline(*(args[index] for index in self.order))
        return tuple(zeros[self.outputs.index(index)] for index in range(len(zeros)))


def template(half: Half, delegate: Delegate, limits: Limits) -> Template:
    """Put to a half's delegate what stands for its program while the composed graph is traced, which re-runs it at every pass:
    without it each layer costs seconds. The half's weights are not read.
    """
    arguments = delegate.arguments
    inputs, sizes = half.example(limits)
    given = {argument: at for at, argument in enumerate(arguments) if isinstance(argument, int)}
    order = [given[index] for index in range(len(sizes))]  # the half's inputs among the delegate's arguments
    norms = {name.removeprefix("block."): value for name, value in half.named_parameters()}
    args = tuple(
        inputs[argument]
        if isinstance(argument, int)
        else torch.zeros_like(norms[argument] if isinstance(argument, str) else argument)
        for argument in arguments
    )
    free = tuple(sizes[argument] if isinstance(argument, int) else None for argument in arguments)
    stub = _Stub(half, order, delegate.outputs)
    program = export(stub, args, dynamic_shapes=(free,), strict=False)
    edge: ExportedProgram = to_edge(program, compile_config=COMPILE).exported_program()
    return Template(delegate, edge)


class Called(nn.Module):
    """A delegate in place of the half that it was made from."""

    def __init__(
        self, delegate: LoweredBackendModule, arguments: Sequence[int | Tensor], outputs: Sequence[int]
    ) -> None:
        """Keep the delegate and the constants among its arguments; both lists are as in `Delegate`."""
        super().__init__()
        self.delegate, self.arguments, self.outputs = delegate, list(arguments), outputs
        for at, argument in enumerate(arguments):
            if isinstance(argument, Tensor):
                self.register_buffer(f"argument_{at}", argument)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The half's outputs of the half's inputs."""
        arguments = [
            inputs[argument] if isinstance(argument, int) else self.get_buffer(f"argument_{at}")
            for at, argument in enumerate(self.arguments)
        ]
        results = self.delegate(*arguments)
        return tuple(results[index] for index in self.outputs)


class Lowered(Called):
    """A template as the delegate of one layer, or of the head."""

    def __init__(self, template: Template, prefix: str, vector: Callable[[str], Tensor], *, piece: int = 0) -> None:
        """Name the constants and take the norms.

        Args:
            template: of the same kind.
            prefix: what the names of its weights and norms begin with: `model.layers.3.`, or empty for the head.
            vector: a norm by its name in the checkpoint.
            piece: which piece of the head it is.
        """
        delegate = template.delegate
        blob, store = delegate.blob, NamedDataStore()
        for key, constant in delegate.keys.items():
            own = replace(constant, weight=prefix + constant.weight, piece=constant.piece + piece).key
            if blob.count(key.encode()) != 1 or len(own) != len(key):
                raise RuntimeError(
                    f"{prefix}{constant.weight}: its key is not once in the delegate; another executorch?"
                )
            blob = blob.replace(key.encode(), own.encode())
            # holds the place: pte.py streams the bytes into the file
            store.add_named_data(own, own.encode(), ALIGNMENT)
        for key, value in delegate.shared.items():
            store.add_named_data(key, value, ALIGNMENT)
        module = LoweredBackendModule(template.stub, BACKEND, blob, [], store.get_named_data_store_output())
        arguments = [vector(prefix + each) if isinstance(each, str) else each for each in delegate.arguments]
        super().__init__(module, arguments, delegate.outputs)
