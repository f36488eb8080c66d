"""Our own method: what its fields reach."""

from __future__ import annotations

from typing import Any, cast

import pytest

from offramp.candidates import Candidates
from offramp.methods import offramp as module
from offramp.methods.offramp import Offramp


def test_its_fields_are_those_of_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[dict[str, Any]] = []

    class Noted:
        def __init__(self, candidates: Candidates, **options: Any) -> None:
            searched.append(options)

        def run(self) -> None:
            searched[-1]["ran"] = True

    monkeypatch.setattr(module, "Search", Noted)
    changed: dict[str, Any] = {
        "student_shares": (0.02,),
        "pooled": False,
        "trunks": False,
        "reads": False,
        "student_temperature": 3.0,
        "mixtures": False,
        "bfloat16": False,
    }
    Offramp(**changed).learn(cast(Candidates, None), 0.02)
    assert searched == [changed | {"tolerance": 0.02, "ran": True}]
