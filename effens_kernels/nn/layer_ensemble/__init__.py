"""LayerEnsemble: options for each layer of a network, and any set of paths through them at the cost of their prefixes.

prefix_tree.py   which prefixes a set of paths has: integers alone
paths.py         sets of paths, drawn or counted
stages.py        the modules that options are made of, with the parameters of all options
layer.py         a layer: from the prefixes before it to those that end in it
module.py        the network
construction.py  what it is made from
"""

from .module import LayerEnsemble
from .prefix_tree import PrefixTree

__all__ = ["LayerEnsemble", "PrefixTree"]
