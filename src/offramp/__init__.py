"""offramp: automated layer caching for PyTorch. Certified early answers from a pretrained model.

The public names, loaded on first use so that importing the package, or asking the command line for help, is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offramp.artifact import load as load
    from offramp.artifact import save as save
    from offramp.caches.recent import RecentCache as RecentCache
    from offramp.caches.result import ResultCache as ResultCache
    from offramp.errors import (
        ArtifactError as ArtifactError,
    )
    from offramp.errors import (
        BackendError as BackendError,
    )
    from offramp.errors import (
        InputError as InputError,
    )
    from offramp.errors import (
        MissingExtraError as MissingExtraError,
    )
    from offramp.errors import (
        OfframpError as OfframpError,
    )
    from offramp.errors import (
        SplitError as SplitError,
    )
    from offramp.errors import (
        StorageError as StorageError,
    )
    from offramp.errors import (
        StreamError as StreamError,
    )
    from offramp.evaluation import evaluate as evaluate
    from offramp.fitting import fit as fit
    from offramp.fitting import uncached as uncached
    from offramp.merging import Merging as Merging
    from offramp.model import CachedModel as CachedModel
    from offramp.model import Prediction as Prediction
    from offramp.online_model import OnlineModel as OnlineModel
    from offramp.online_model import online as online
    from offramp.optimizing import optimize as optimize
    from offramp.profiling import Profile as Profile
    from offramp.profiling import profile as profile
    from offramp.refresh import Refresh as Refresh
    from offramp.splitting import split as split
    from offramp.types import Certificate as Certificate
    from offramp.types import Evaluation as Evaluation
    from offramp.types import Plan as Plan

_HOME = {
    "fit": "fitting",
    "uncached": "fitting",
    "split": "splitting",
    "evaluate": "evaluation",
    "optimize": "optimizing",
    "profile": "profiling",
    "online": "online_model",
    "save": "artifact",
    "load": "artifact",
    "Merging": "merging",
    "CachedModel": "model",
    "OnlineModel": "online_model",
    "Refresh": "refresh",
    "Prediction": "model",
    "RecentCache": "caches.recent",
    "ResultCache": "caches.result",
    "Plan": "types",
    "Certificate": "types",
    "Evaluation": "types",
    "Profile": "profiling",
    "OfframpError": "errors",
    "ArtifactError": "errors",
    "BackendError": "errors",
    "InputError": "errors",
    "MissingExtraError": "errors",
    "SplitError": "errors",
    "StorageError": "errors",
    "StreamError": "errors",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'offramp' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
    value = getattr(importlib.import_module(f"offramp.{_HOME[name]}"), name)
    globals()[name] = value
    return value
