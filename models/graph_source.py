"""What torch.fx keeps of every graph that it compiles, as long as the process lives: 30 KB and more for each model.

It is meant for tracebacks and for tracing the compiled code once more. Names that torch does not promise are looked up
with care: where they are gone, nothing is dropped.
"""

from __future__ import annotations

import linecache
import weakref
from types import FunctionType

from torch.fx import GraphModule, _symbolic_trace, graph_module


def forget_source(forward: FunctionType) -> None:
    """Drops the source and the globals of a graph's compiled `forward`."""
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
