"""The published methods and our own, one file per recipe. A new one is a file and a line in METHODS."""

from __future__ import annotations

import importlib

from offramp.errors import InputError
from offramp.methods.base import Method

__all__ = ["METHODS", "Method", "method_named"]

METHODS = {  # name -> class, imported when asked for
    "offramp": "offramp.methods.offramp:Offramp",
    "gati": "offramp.methods.gati:Gati",
    "selfxit": "offramp.methods.selfxit:SelfXit",
    "branchynet": "offramp.methods.branchynet:BranchyNet",
    "approximate_key": "offramp.methods.approximate_key:ApproximateKey",
    "freeze": "offramp.methods.freeze:Freeze",
}


def method_named(method: str | Method) -> Method:
    """The method of that name with its default hyper-parameters, or the method that was given; an InputError lists
    the known ones."""
    if isinstance(method, Method):
        return method
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    module, name = METHODS[method].split(":")
    made: Method = getattr(importlib.import_module(module), name)()
    return made
