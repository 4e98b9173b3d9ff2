"""Exact rewriting of a trained model for inference: the output stays the same up to rounding.

Every change of a model's shape for deployment is made here; export.py and the runtimes only call it. `fold_model`
folds batch norm into the convolutions of a `Model`, which stays one. `rewrite` goes further and returns a graph
without the model's modules: all batch norm folded, shuffles folded into the input channels of what reads them (but not
ShuffleNetV2's where a split follows, which takes channels in their order), 1x1 convolutions moved before upsampling,
dead ends gone, the head split into its convolutions and a `Decoder`.

Tried and left out, since neither ONNX Runtime nor OpenVINO gained: flattening nested concatenations, splitting the sum
behind a GSConv among its halves, folding a GSBottleneck's linear shortcut into the convolution after it.
"""

from __future__ import annotations

import copy
import linecache
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule, _symbolic_trace, graph_module
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from models.common import Contract, Conv, DySample, Expand, Sum, TransformerBlock, alternate_halves, interleave_halves
from models.heads import Head

Layout = tuple[int, ...]  # layout[place] is the channel of the trained model that stands there

# What treats every channel alike, so that a layout passes through
_ACTIVATIONS = "ELU GELU Hardsigmoid Hardswish Hardtanh LeakyReLU Mish ReLU ReLU6 SiLU Sigmoid Softplus Tanh".split()
_CHANNELWISE_MODULES = (
    *(nn.AvgPool2d, nn.Dropout, nn.Identity, nn.MaxPool2d, nn.Upsample, nn.ZeroPad2d),
    *(getattr(nn, name) for name in _ACTIVATIONS),
)
_CHANNELWISE_FUNCTIONS = (F.relu, F.silu)
_SUMS = (operator.add, operator.iadd, torch.add)

_TRACED_FILES = ("models.common", "models.experimental")  # blocks of other files are taken as they are
_WHOLE_BLOCKS = (Contract, DySample, Expand, Sum, TransformerBlock)  # they mix channels, or hold nothing to fold
_SHUFFLES = {  # the channel that comes to each place of c
    interleave_halves: lambda c: (*range(0, c, 2), *range(1, c, 2)),
    alternate_halves: lambda c: tuple(place // 2 + place % 2 * (c // 2) for place in range(c)),
}
_PROBE_PX = 128  # side of the blank image that tells each node's channels: the largest stride there is (P7)


@torch.no_grad()
def fold_batchnorm(conv: nn.Conv2d, bn: nn.BatchNorm2d, channels: slice = slice(None)) -> nn.Conv2d:
    """Changes `conv` so that alone it does what it and then `bn` in evaluation mode did; returns it.

    W' = W * gamma / sqrt(var + eps) for each output channel, b' = beta + (b - mean) * gamma / sqrt(var + eps); computed
    in float64 and kept in the type and memory format of W. The result is not for training: it wants no gradient.
    `channels` are those of the norm that the convolution's output makes up.
    """
    weight = conv.weight
    scale = (bn.running_var[channels].double() + bn.eps).rsqrt()
    shift = -bn.running_mean[channels].double()
    if conv.bias is not None:
        shift += conv.bias.double()
    if bn.affine:
        scale *= bn.weight[channels].double()
    bias = shift * scale + (bn.bias[channels].double() if bn.affine else 0)
    conv.weight = nn.Parameter((weight.double() * scale.view(-1, 1, 1, 1)).to(weight.dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=False)
    return conv


def fold_model(model: nn.Module) -> nn.Module:
    """Folds the batch norm of every `Conv` (and subclass) in `model`, in place; returns the model.

    Batch norms outside a Conv (in BottleneckCSP and MixConv2d) stay. The result is for evaluation only.
    """
    for block in model.modules():
        if isinstance(block, Conv) and block.bn is not None:
            fold_batchnorm(block.conv, block.bn)
            block.bn = None
    return model


class InferenceModel(nn.Module):
    """A rewritten model: images in, decoded rows out.

    Attributes:
        trunk: graph from images (b, ch, h, w) to the head's raw maps, one (b, na * channels, ny, nx) per level.
        decoder: maps to rows.
        names: class names {number: name}.
        stride: float32 (nl,), pixels per cell of each level.
    """

    def __init__(self, trunk: fx.GraphModule, decoder: nn.Module, names: Mapping[int, str], stride: Tensor):
        """Takes the two halves and what describes them."""
        super().__init__()
        self.trunk, self.decoder = trunk, decoder
        self.names, self.stride = dict(names), stride

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (b, ch, h, w) of values 0 to 1 to rows (b, n, 5 + nc), or to what the decoder makes of them."""
        return self.decoder(self.trunk(x))


@torch.no_grad()
def rewrite(model: nn.Module, raw: bool = False) -> InferenceModel:
    """Returns a trained model as a graph for inference; `model` itself stays as it is.

    Args:
        model: `models.yolo.Model`, batch norm folded or not.
        raw: leave the decoding to the host: the trunk ends in the head's `score_maps`, which the decoder passes on.
    """
    folded = fold_model(copy.deepcopy(model)).eval().requires_grad_(False)
    trunk = _trace(folded, raw)
    _fold_loose_norms(trunk)
    ShapeProp(trunk).propagate(next(folded.parameters()).new_zeros(1, folded.yaml["ch"], _PROBE_PX, _PROBE_PX))
    _fold_shuffles(trunk)
    _move_pointwise_before_upsample(trunk)
    trunk.graph.eliminate_dead_code()
    trunk.delete_all_unused_submodules()
    recompile(trunk)
    decoder = nn.Identity() if raw else folded.head.decoder()
    return InferenceModel(trunk.eval(), decoder, model.names, model.stride.detach().clone())


class _Tracer(fx.Tracer):
    """Follows YOLOv5's blocks and the head's maps down to torch's layers; the shuffle and other blocks stay whole."""

    def __init__(self, raw: bool) -> None:
        super().__init__(autowrap_functions=tuple(_SHUFFLES))
        self._raw = raw

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        known = type(module).__module__ in _TRACED_FILES and not isinstance(module, _WHOLE_BLOCKS)
        return not known and not isinstance(module, nn.Sequential)

    def call_module(
        self, m: nn.Module, forward: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
    ) -> object:
        if isinstance(m, Head):
            return (m.score_maps if self._raw else m.maps)(*args)
        return super().call_module(m, forward, args, kwargs)


def _trace(model: nn.Module, raw: bool) -> fx.GraphModule:
    """Returns the graph from images to the head's raw maps, or its `score_maps`."""
    graph = _Tracer(raw).trace(model, concrete_args={"augment": False, "visualize": None})
    for node in graph.find_nodes(op="placeholder"):
        if not node.users:  # the record of the argument that was left out
            graph.erase_node(node)
    return fx.GraphModule(model, graph)


def _module_of(trunk: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return trunk.get_submodule(node.target) if node.op == "call_module" else None


def _fold_loose_norms(trunk: fx.GraphModule) -> None:
    """Folds batch norms that read one convolution, or convolutions put beside each other, that nothing else reads."""
    for node in list(trunk.graph.nodes):
        norm = _module_of(trunk, node)
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        source = node.args[0]
        parts = list(source.args[0]) if _is_joint(source) else [source]
        convs = [_module_of(trunk, part) for part in parts]
        alone = all(len(part.users) == 1 for part in {source, *parts})
        if not alone or not all(isinstance(conv, nn.Conv2d) for conv in convs):
            continue
        start = 0
        for conv in convs:
            fold_batchnorm(conv, norm, slice(start, start + conv.out_channels))
            start += conv.out_channels
        node.replace_all_uses_with(source)
        trunk.graph.erase_node(node)


def _fold_shuffles(trunk: fx.GraphModule) -> None:
    """Takes the shuffles out of the graph and puts the order of channels into the weights of what reads them."""
    if not any(node.target in _SHUFFLES for node in trunk.graph.nodes):
        return
    plan = _Layouts(trunk)
    for node in trunk.graph.nodes:
        conv = _module_of(trunk, node)
        if isinstance(conv, nn.Conv2d):
            outputs = list(plan.layouts[node])
            weight = conv.weight[:, list(plan.layouts[node.args[0]])] if conv.groups == 1 else conv.weight
            conv.weight = nn.Parameter(weight[outputs], requires_grad=False)
            if conv.bias is not None:
                conv.bias = nn.Parameter(conv.bias[outputs], requires_grad=False)
    for node in list(trunk.graph.nodes):
        if node.target in _SHUFFLES and node not in plan.kept:
            node.replace_all_uses_with(node.args[0])
            trunk.graph.erase_node(node)


def _move_pointwise_before_upsample(trunk: fx.GraphModule) -> None:
    """Moves 1x1 convolutions before the upsampling that they read, alone or joined with other maps.

    Both are linear and neither sees the other's axes, so that they commute: W cat(up(x), y) + b = up(W_x x) + (W_y y +
    b). A quarter of the work on x is left, and the joint map is never written. At 640 px this saves 2 to 3 % of the
    time of yolov5s and its slim-neck variants in ONNX Runtime and OpenVINO, 1 to 2 % in int8.
    """
    for node in list(trunk.graph.nodes):
        if not _is_pointwise(trunk, node):
            continue
        source = node.args[0]
        joint = _is_joint(source)
        parts = list(source.args[0]) if joint else [source]
        if any(_enlarges(trunk, part) for part in parts):
            if not joint or all(_is_pointwise(trunk, reader) for reader in source.users):
                _split_pointwise(trunk, node, parts)


def _is_pointwise(trunk: fx.GraphModule, node: fx.Node) -> bool:
    """Tells whether a node is a convolution of each cell on its own, over all channels."""
    conv = _module_of(trunk, node)
    if not isinstance(conv, nn.Conv2d) or conv.groups > 1:
        return False
    return conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0)


def _enlarges(trunk: fx.GraphModule, node: fx.Node) -> bool:
    if not isinstance(_module_of(trunk, node), nn.Upsample):
        return False
    before, after = (place.meta["tensor_meta"].shape[2:] for place in (node.args[0], node))
    return before.numel() < after.numel()


def _split_pointwise(trunk: fx.GraphModule, node: fx.Node, parts: Sequence[fx.Node]) -> None:
    """Replaces a 1x1 convolution over joined maps by a sum: one over the plain maps, one before each upsampling.

    Args:
        trunk: the graph.
        node: the convolution.
        parts: the maps that are joined, in order.
    """
    graph, conv = trunk.graph, _module_of(trunk, node)
    weights = conv.weight.split([part.meta["tensor_meta"].shape[1] for part in parts], dim=1)
    late = [place for place, part in enumerate(parts) if _enlarges(trunk, part)]
    plain = [place for place in range(len(parts)) if place not in late]
    terms = []
    with graph.inserting_before(node):
        if plain:
            sources = [parts[place] for place in plain]
            source = sources[0] if len(plain) == 1 else graph.call_function(torch.cat, (sources,), {"dim": 1})
            weight = torch.cat([weights[place] for place in plain], dim=1)
            terms.append(_add_pointwise(trunk, f"{node.target}_plain", weight, conv.bias, source))
        for place in late:
            bias = None if terms else conv.bias
            small = _add_pointwise(trunk, f"{node.target}_small{place}", weights[place], bias, parts[place].args[0])
            terms.append(graph.call_module(parts[place].target, (small,)))
        total = terms[0]
        for term in terms[1:]:
            total = graph.call_function(operator.add, (total, term))
    total.meta["tensor_meta"] = node.meta["tensor_meta"]
    node.replace_all_uses_with(total)
    graph.erase_node(node)


def _add_pointwise(trunk: fx.GraphModule, name: str, weight: Tensor, bias: Tensor | None, source: fx.Node) -> fx.Node:
    """Adds a 1x1 convolution with weight (c2, c1, 1, 1) and bias (c2,) to the graph; returns its node."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None, device="meta")
    conv.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias, requires_grad=False)
    trunk.add_submodule(name, conv)
    return trunk.graph.call_module(name, (source,))


class _Layouts:
    """In which order each node of a graph has its channels once shuffles have been left out.

    A shuffle that is left out leaves its channels in the order that they came in, and the layout tells which channel
    stands where. Dense convolutions read any layout and write any: the identity unless a sum asks for another, so that
    its operands agree. Where a reader can take the identity only, the shuffles before it are kept.

    Attributes:
        kept: shuffles that stay in the graph.
        layouts: the layout of each node that holds maps.
    """

    def __init__(self, trunk: fx.GraphModule) -> None:
        """Plans the layouts of a traced graph whose nodes know their shapes."""
        self._trunk = trunk
        self._wanted: dict[fx.Node, Layout] = {}  # dense convolutions that write another layout than the identity
        self._settled: set[fx.Node] = set()  # dense convolutions that must write the identity
        self.kept: set[fx.Node] = set()
        self.layouts: dict[fx.Node, Layout] = {}
        while not self._plan():  # ends: each round binds a convolution or keeps a shuffle more
            self.layouts.clear()

    def _plan(self) -> bool:
        """Follows the layouts through the graph; returns False when a choice had to be changed on the way."""
        for node in self._trunk.graph.nodes:
            rule = self._rule_of(node)
            layout = rule(node)
            if layout is None:
                return False
            self.layouts[node] = layout
        return True

    def _rule_of(self, node: fx.Node) -> Callable[[fx.Node], Layout | None]:
        """Returns how a node's layout follows from its inputs'."""
        module = _module_of(self._trunk, node)
        if isinstance(module, nn.Conv2d):
            return self._dense if module.groups == 1 else self._same if _is_depthwise(module) else self._rigid
        if isinstance(module, _CHANNELWISE_MODULES) or node.target in _CHANNELWISE_FUNCTIONS:
            return self._same
        if node.target in _SHUFFLES and node not in self.kept:
            return self._unshuffled
        if _is_joint(node):
            return self._joined
        if node.target in _SUMS and all(isinstance(operand, fx.Node) for operand in node.args):
            return self._summed
        return self._rigid

    def _dense(self, node: fx.Node) -> Layout:
        return self._wanted.get(node, _identity(node))

    def _same(self, node: fx.Node) -> Layout:
        return self.layouts[node.args[0]]

    def _unshuffled(self, node: fx.Node) -> Layout:
        layout = self.layouts[node.args[0]]
        place = _inverse(_SHUFFLES[node.target](len(layout)))
        return tuple(place[channel] for channel in layout)

    def _joined(self, node: fx.Node) -> Layout:
        layout: list[int] = []
        for part in node.args[0]:
            layout += [len(layout) + channel for channel in self.layouts[part]]
        return tuple(layout)

    def _summed(self, node: fx.Node) -> Layout | None:
        """The operands' common layout; where they differ, a convolution behind one of them is to write the other's."""
        first, second = (self.layouts[operand] for operand in node.args)
        if first == second:
            return first
        for operand, other in ((node.args[1], first), (node.args[0], second)):
            conv = self._writer(operand)
            if conv is not None and conv not in self._wanted and conv not in self._settled:
                self._wanted[conv] = other
                return None
        self._keep_before(node.args)
        return None

    def _rigid(self, node: fx.Node) -> Layout | None:
        """Nodes that need their inputs in the trained order, and write it."""
        shuffled = [source for source in node.all_input_nodes if self.layouts[source] != _identity(source)]
        if not shuffled:
            return _identity(node)
        self._keep_before(shuffled)
        return None

    def _writer(self, node: fx.Node) -> fx.Node | None:
        """Returns the dense convolution whose layout `node` has because all between them keep it; None without one."""
        while self._rule_of(node) == self._same:
            node = node.args[0]
        return node if self._rule_of(node) == self._dense else None

    def _keep_before(self, nodes: Sequence[fx.Node]) -> None:
        """Makes sure that `nodes` have the identity: keeps the shuffles and settles the convolutions before them."""
        open_nodes = list(nodes)
        while open_nodes:
            node = open_nodes.pop()
            rule = self._rule_of(node)
            if rule == self._unshuffled:
                self.kept.add(node)
            if rule == self._dense:
                self._settled.add(node)
                self._wanted.pop(node, None)
            elif rule != self._rigid:
                open_nodes += node.all_input_nodes


def _is_joint(node: fx.Node) -> bool:
    return node.target is torch.cat and node.kwargs.get("dim") == 1


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups == conv.in_channels == conv.out_channels


def _identity(node: fx.Node) -> Layout:
    """Returns the layout of a node whose channels are in the trained order; empty for what is no map."""
    shape = getattr(node.meta.get("tensor_meta"), "shape", ())
    return tuple(range(shape[1])) if len(shape) == 4 else ()


def _inverse(order: Sequence[int]) -> Layout:
    places = [0] * len(order)
    for place, channel in enumerate(order):
        places[channel] = place
    return tuple(places)


def forget_source(forward: FunctionType) -> None:
    """Drops what torch.fx keeps of a graph that it has compiled as long as the process lives: 30 KB and more a model.

    It is meant for tracebacks and for tracing the compiled code once more. Names that torch does not promise are looked
    up with care: where they are gone, nothing is dropped.
    """
    name = forward.__code__.co_filename
    linecache.cache.pop(name, None)
    getattr(getattr(graph_module, "_loader", None), "eval_cache", {}).pop(name, None)
    wrapped = getattr(_symbolic_trace, "_wrapped_fns_to_patch", {})
    for key in [key for key, names in wrapped.items() if names is forward.__globals__]:
        del wrapped[key]


def recompile(graph: GraphModule) -> None:
    """Compiles a changed graph; the former source is dropped at once, the new one when the graph goes."""
    forget_source(type(graph).forward)
    graph.recompile()
    weakref.finalize(graph, forget_source, type(graph).forward)
