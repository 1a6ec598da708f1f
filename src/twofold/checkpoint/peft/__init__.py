"""The half of the checkpoint plug-in that PEFT needs."""
