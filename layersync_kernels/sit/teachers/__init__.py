"""External teachers: pretrained networks whose tokens of the clean image a block is aligned with (REPA)."""
