"""Fine-tuning on an ordinary machine: adapters of PEFT and the factors themselves, trained by TRL's SFTTrainer."""
