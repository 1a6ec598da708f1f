"""What is measured on the model for an allocation, beside the spectra."""
