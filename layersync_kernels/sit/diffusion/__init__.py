"""Between noise and data: interpolants, training targets, samplers."""
