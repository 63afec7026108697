"""What ``--features`` names: wavelets, a network of torch-fidelity, a TorchScript file, or a function of the user's."""

from __future__ import annotations

import ast
from typing import Any

import torch

from reference_trainer.errors import UserError
from reference_trainer.evaluation.features import Features, Imported
from reference_trainer.evaluation.fidelity import Fidelity
from reference_trainer.evaluation.torchscript import SUFFIXES, TorchScript
from reference_trainer.evaluation.wavelets import Wavelets

SHORT = {"inception": Fidelity(), "dinov2": Fidelity(extractor="dinov2-vit-l-14")}
PARTS: dict[str, Any] = {"Fidelity": Fidelity, "TorchScript": TorchScript}


WAVELETS = Wavelets()


def features_named(name: str, device: torch.device) -> Features:
    """The features ``name``, loaded: ``wavelets``, ``inception``, ``dinov2``, ``Fidelity(...)``, ``TorchScript(...)``,
    the path of a TorchScript file, or ``module:function``.

    Raises:
        UserError: there are none of that name, or they cannot be loaded.
    """
    if name == WAVELETS.name:
        return WAVELETS
    if name in SHORT:
        return SHORT[name].load(name, device)
    if name.partition("(")[0] in PARTS:
        return _part(name).load(name, device)
    if name.endswith(SUFFIXES):
        return TorchScript(path=name).load(name, device)
    return Imported.of(name)


def _part(text: str) -> Any:
    """``Fidelity(...)`` or ``TorchScript(...)`` with literals as arguments; nothing is evaluated as code."""
    kind = text.partition("(")[0]
    try:
        call = ast.parse(text if "(" in text else f"{text}()", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("give every value with its name")
        return PARTS[kind](**{str(given.arg): ast.literal_eval(given.value) for given in call.keywords})
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        said = " ".join(str(error).replace("__init__() ", " ").split())
        example = "Fidelity(weights='PATH')" if kind == "Fidelity" else "TorchScript(path='FILE.pt', images='unit')"
        raise UserError(f"--features {' '.join(text.split())[:80]}: {said}; as in {example}") from error
