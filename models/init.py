"""Initialisation and weight decay, in one place.

| parameter                     | at the start                                            | decayed |
|-------------------------------|---------------------------------------------------------|---------|
| token embedding               | normal, standard deviation 0.02                         | yes     |
| unembedding (untied)          | as torch.nn.Linear: uniform, +-1/sqrt(inputs)           | yes     |
| linear weights                | as torch.nn.Linear                                      | yes     |
| biases                        | as torch.nn.Linear                                      | no      |
| norms                         | 1                                                       | no      |
| experts                       | each as torch.nn.Linear                                 | yes     |
| short convolutions            | as torch.nn.Conv1d                                      | yes     |
| Mamba A_log, D                | log(1..dstate), 1 (S4D-real)                            | no      |
| Mamba delta_bias              | inverse softplus of log-uniform steps in [1e-3, 1e-1]   | no      |
| Mamba-2 A_log, D, delta_bias  | log of uniform in [1, 16], 1, as Mamba's                | no      |
| gated DeltaNet A_log, ...     | as Mamba-2's                                            | no      |
| RWKV mix, decay, bonus        | of a first layer of the published models                | no      |
| RWKV-6 low-rank factors       | uniform, +-1e-4                                         | yes     |
| Hyena skip, filter frequency  | standard normal, 10                                     | no      |
| Hyena modal log_poles         | rates as of the windows, angles of a half circle        | no      |
| Hyena filters                 | of norm about 1 (models/layers/filters.py)              | yes     |

Layers initialise themselves, and nothing here touches them afterwards: a recurrence's start is part of the layer.
"""

from __future__ import annotations

from typing import Any

from torch import nn

EMBEDDING_STD = 0.02


def init_embedding(embedding: nn.Embedding) -> None:
    """Normal, standard deviation EMBEDDING_STD."""
    nn.init.normal_(embedding.weight, std=EMBEDDING_STD)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimiser: what is decayed, and vectors and recurrence parameters, which are not.

    What is exempt is asked of the modules (`Layer.undecayed`): a mark on a parameter is lost when a model is copied.
    """
    exempt = {id(m.get_parameter(name)) for m in model.modules() for name in getattr(m, "undecayed", ())}
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = [p for p in parameters if p.dim() < 2 or id(p) in exempt]
    ids = {id(p) for p in kept}
    decayed = [p for p in parameters if id(p) not in ids]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
