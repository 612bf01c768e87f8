"""Whether torch.compile(mode="reduce-overhead") would replay a step as CUDA graphs, found out without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from . import pretended_gpu
from .cards import CARDS, Card
from .gpu_graph import Part, compile_step


def cuda_graph_obstacles(
    make: Callable[[], Callable[[], Part]], *, card: Card = CARDS["h100"], backend: str = "cuda"
) -> list[str]:
    """Why a step, forward and backward, would not run as one CUDA graph per pass under mode="reduce-overhead".

    Both passes are lowered for the card with CUDA graphs on, and nothing is run. Looked for are Inductor's own reasons,
    inputs that are written to and are no parameters, graphs that are cut into parts, tensors on the CPU, and results
    that share memory with an input, whose address changes from call to call.

    Args:
        make: as `count_gpu_step` takes it.
        card: whose code Inductor writes.
        backend: of our ops, "cuda" or "triton".

    Returns:
        the reasons, each with its pass; none where the graphs are accepted.

    Raises:
        as `count_gpu_step`.
    """
    found: list[str] = []

    def lowered(graph: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> None:
        phase = "backward" if options.get("is_backward") else "forward"
        made = pretended_gpu.lower(graph, inputs, card, **options)
        found.extend(f"{phase}: {reason}" for reason in _obstacles(made, options))

    with pretended_gpu.cuda_graphs():
        compile_step(make, lowered, backend)
    return found


def _obstacles(made: pretended_gpu.Lowered, options: dict[str, Any]) -> list[str]:
    found = list(pretended_gpu.refusals(made.compiled))
    fixed = set(options.get("static_input_idxs", ()))
    inputs = [node for node in made.graph.graph.nodes if node.op == "placeholder"]
    changed = [inputs[place].name for place in made.compiled.mutated_input_idxs if place not in fixed]
    if changed:
        found.append(f"writes to its inputs {', '.join(changed)}")
    parts = made.compiled.partition_maps or ()
    if len(parts) > 1:
        found.append(f"is cut into {len(parts)} graphs")
    host = [node.name for node in made.graph.graph.nodes if _is_on_host(node.meta.get("val"))]
    if host:
        found.append(f"has tensors on the CPU: {', '.join(host)}")
    if not options.get("is_backward"):  # what is kept for the backward pass may be an input
        found += _aliases(made, inputs, fixed)
    return found


def _aliases(made: pretended_gpu.Lowered, inputs: Sequence[fx.Node], fixed: set[int]) -> list[str]:
    (output,) = (node for node in made.graph.graph.nodes if node.op == "output")
    given = {_storage(node): node.name for place, node in enumerate(inputs) if place not in fixed}
    visible = [output.args[0][place] for place in output.meta.get("user_visible_output_idxs", ())]
    shared = [f"{node.name} is {given[_storage(node)]}" for node in visible if _storage(node) in given]
    return [f"its results share memory with its inputs: {', '.join(shared)}"] if shared else []


def _storage(node: Any) -> object:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else object()


def _is_on_host(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device == torch.device("cpu")
