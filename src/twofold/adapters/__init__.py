"""LoRA on factored layers: trained, saved and loaded by PEFT, merged exactly by growing the rank; and LoRA out of two models."""
