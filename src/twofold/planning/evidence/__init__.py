"""What an allocation asks to be measured on the model."""
