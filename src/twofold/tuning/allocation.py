"""AdaLoRA's own step: it spreads the ranks over the layers while it trains."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import TrainerCallback


class AdaLoraSteps(TrainerCallback):  # type: ignore[misc]
    """Tells AdaLoRA of each step, while its gradients are there."""

    def __init__(self, adapted: PeftModel) -> None:
        self.adapted = adapted

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.adapted.base_model.update_and_allocate(state.global_step + 1)
