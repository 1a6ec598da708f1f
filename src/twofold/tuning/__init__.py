"""Fine-tuning on an ordinary machine: adapters of PEFT and the factors themselves, trained by TRL's SFTTrainer."""

from twofold.tuning.settings import TuneSettings, make_settings

__all__ = ["TuneSettings", "make_settings"]
